import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_ray.config.load import load
from rlhf_ray.config.supervised import SFTConfig
from rlhf_ray.errors import ConfigError, ResourceError
from rlhf_ray.telemetry.run_folder import RunFolder, finite, write_atomically


def objects(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_the_configuration_in_the_folder_loads_as_the_same_configuration(config_of: Any) -> None:
    config = config_of(seed=7)
    folder = RunFolder(config)
    assert folder.path == Path(config.output_dir) / "a-run"
    assert load(SFTConfig, folder.config) == config


def test_a_line_can_be_read_as_soon_as_it_is_logged(config_of: Any) -> None:
    folder = RunFolder(config_of())
    folder.log(0, {"sft/loss": 1.5})
    [row] = objects(folder.metrics)
    assert (row["update"], row["sft/loss"]) == (0, 1.5)
    folder.log(1, {"sft/loss": 1.25})
    assert [row["update"] for row in objects(folder.metrics)] == [0, 1]


def test_numbers_that_are_not_finite_are_null(config_of: Any) -> None:
    folder = RunFolder(config_of())
    folder.log(0, {"sft/loss": math.nan, "model/grad_norm": math.inf})
    folder.write_summary({"held_out": [{"loss": -math.inf}]})
    [row] = objects(folder.metrics)
    assert row["sft/loss"] is None
    assert row["model/grad_norm"] is None
    assert json.loads(folder.summary.read_text()) == {"held_out": [{"loss": None}]}


def test_scalars_of_numpy_and_paths_become_json() -> None:
    tree = {"a": np.float32(0.5), "b": np.int64(3), "c": (np.float64("nan"), True, None), "d": Path("x/y")}
    assert finite(tree) == {"a": 0.5, "b": 3, "c": [None, True, None], "d": "x/y"}


def test_samples_keep_their_text_on_one_line_each(config_of: Any) -> None:
    folder = RunFolder(config_of())
    row = {"prompt": "ä\nb", "response": '"quoted"\u2028', "score": 1.0, "kl": 0.25}
    folder.log_samples(3, [row, row])
    assert [json.loads(line) for line in folder.samples.read_text().strip().split("\n")] == [{"update": 3, **row}] * 2


def test_a_second_run_of_the_same_name_is_refused_while_the_first_is_alive(config_of: Any) -> None:
    first = RunFolder(config_of())
    with pytest.raises(ConfigError, match="a run that is alive; choose another name"):
        RunFolder(config_of())
    first.close()
    RunFolder(config_of())


@pytest.mark.parametrize(
    "result", ["metrics.jsonl", "samples.jsonl", "summary.json", "unfinished.json", "checkpoints/x", "model/x"]
)
def test_a_folder_with_results_is_refused(config_of: Any, result: str) -> None:
    first = RunFolder(config_of())
    first.close()
    (first.path / result).parent.mkdir(exist_ok=True)
    (first.path / result).write_text("{}\n")
    with pytest.raises(
        ConfigError, match=rf"a-run already holds a run \({result.split('/')[0]}\); choose another name"
    ):
        RunFolder(config_of())


def test_a_refused_run_leaves_the_folder_as_it_was(config_of: Any) -> None:
    first = RunFolder(config_of(seed=1))
    first.log(0, {"sft/loss": 1.0})
    first.close()
    before = {path.name: path.read_bytes() for path in first.path.iterdir() if path.is_file()}
    with pytest.raises(ConfigError):
        RunFolder(config_of(seed=2))
    assert {path.name: path.read_bytes() for path in first.path.iterdir() if path.is_file()} == before


def test_a_run_that_died_before_its_first_update_is_replaced(config_of: Any) -> None:
    RunFolder(config_of(seed=1)).close()
    folder = RunFolder(config_of(seed=2))
    assert load(SFTConfig, folder.config).seed == 2


def test_a_killed_run_lets_go_of_its_folder(config_of: Any) -> None:
    config = config_of()
    code = (
        "import os, sys; from rlhf_ray.config.supervised import SFTConfig;"
        "from rlhf_ray.telemetry.run_folder import RunFolder;"
        "folder = RunFolder(SFTConfig.model_validate_json(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, config.model_dump_json()], check=False).returncode == -9
    RunFolder(config)


@pytest.mark.parametrize("file", ["runs", "runs/a-run"])
def test_a_file_in_the_folders_way_is_told(config_of: Any, tmp_path: Path, file: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("")
    with pytest.raises(ConfigError, match="runs/a-run cannot be the run's folder: there is a file in its way"):
        RunFolder(config_of())


def test_a_full_disk_is_an_error_that_names_the_file(config_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(config_of())
    folder._metrics.close()
    monkeypatch.setattr(folder, "_metrics", open("/dev/full", "a"))  # noqa: SIM115, PTH123
    with pytest.raises(ResourceError, match="/dev/full: cannot be written: No space left on device"):
        folder.log(0, {"sft/loss": 1.0})


def test_a_summary_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_atomically(path, "old")

    def fails(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_unfinished_results_stand_until_the_summary_does(config_of: Any) -> None:
    folder = RunFolder(config_of())
    folder.write_unfinished({"first": 1.0})
    folder.write_unfinished({"first": 1.0, "second": float("nan")})
    assert json.loads(folder.unfinished.read_text()) == {"first": 1.0, "second": None}
    folder.write_summary({"first": 1.0, "second": 2.0})
    assert json.loads(folder.summary.read_text()) == {"first": 1.0, "second": 2.0}
    assert not folder.unfinished.exists()


def test_a_secret_in_the_configuration_is_masked_in_the_folder(config_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_TOKEN", "abcdefghijk")
    folder = RunFolder(config_of(model="https://abcdefghijk.example/m"))
    folder.write_summary({"model": "abcdefghijk"})
    assert "abcdefghijk" not in folder.config.read_text() + folder.summary.read_text()
    assert load(SFTConfig, folder.config).model == "https://<redacted>.example/m"


def test_a_run_that_goes_on_keeps_what_was_told_before_its_checkpoint_and_forgets_the_rest(config_of: Any) -> None:
    folder = RunFolder(config_of())
    for update in range(4):
        folder.log(update, {"sft/loss": float(update)})
        folder.log_samples(update, [{"prompt": "p", "response": str(update)}] * 2)
        folder.log_event({"event": "trained", "update": update})
    folder.close()
    with folder.metrics.open("a") as file:
        file.write('{"update": 4, "sft/lo')  # killed in the middle of a line
    again = RunFolder(config_of(), resumable=True)
    kept = again.rewind(2)
    assert [row["sft/loss"] for row in kept] == [0.0, 1.0]
    again.log(2, {"sft/loss": 2.5})
    assert [row["sft/loss"] for row in objects(again.metrics)] == [0.0, 1.0, 2.5]
    assert [row["update"] for row in objects(again.samples)] == [0, 0, 1, 1]
    again.log_event({"event": "resumed"})
    assert [row["event"] for row in objects(again.history)] == ["trained"] * 4 + ["resumed"]


def test_a_run_that_begins_anew_has_a_history_of_its_own(config_of: Any) -> None:
    folder = RunFolder(config_of())
    folder.log_event({"event": "began"})
    folder.close()
    again = RunFolder(config_of(), resumable=True)
    assert again.rewind(0) == []
    again.log_event({"event": "began"})
    assert objects(again.history) == [{"event": "began"}]
