import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_ray import cli
from rlhf_ray.errors import ResourceError, StopRequested

ROOT = Path(__file__).parents[1]
CLUSTER_CONFIGS = sorted((ROOT / "configs/ppo").glob("llama-*.yaml"))
HEAVY = {"torch", "ray", "transformers", "vllm", "deepspeed", "numpy", "datasets", "wandb"}


@pytest.fixture
def ppo_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("name: x\npolicy: p\nreward: {function: 'a:b'}\ndata: {path: d}\n")
    return path


def command(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HOME": "/nonexistent"}
    environment.pop("RAY_API_SERVER_ADDRESS", None)
    line = [sys.executable, "-m", "rlhf_ray.cli", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, cwd=cwd, env=environment, check=False)


def in_process(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["rlhf-ray", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def fake_stage(monkeypatch: pytest.MonkeyPatch, run: object, name: str = "ppo") -> None:
    monkeypatch.setitem(sys.modules, f"rlhf_ray.stages.{name}", SimpleNamespace(run=run))  # type: ignore[misc]


# Nothing heavy


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["ppo", "--help"], ["ppo", "absent.yaml"], ["ppo", CLUSTER_CONFIGS[0], "--dry-run"]],
    ids=lambda arguments: " ".join(map(str, arguments[:2])),
)
def test_quick_answers_import_nothing_heavy(arguments: list[object]) -> None:
    line = [sys.executable, "-X", "importtime", "-m", "rlhf_ray.cli", *map(str, arguments)]
    ran = subprocess.run(line, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    imported = {row.rpartition("|")[2].strip().partition(".")[0] for row in ran.stderr.splitlines() if "|" in row}
    assert "typer" in imported
    assert not imported & HEAVY


# Dry runs


@pytest.mark.parametrize("path", CLUSTER_CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_for_ppo_passes_a_dry_run_offline(path: Path) -> None:
    ran = command("ppo", path, "--dry-run")
    assert ran.returncode == 0, ran.stderr
    for heading in ("Configuration", "Actors", "Placement", "Batch", "Bytes of each worker"):
        assert f"\n{heading}" in f"\n{ran.stdout}"


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_supervised_stages_have_a_dry_run_as_well(stage: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: x\nmodel: org/m-1.5B\ndata: {path: d}\n")
    ran = command(stage, path, "workers.ranks=2", "--dry-run")
    assert ran.returncode == 0, ran.stderr
    assert "ranks: 2" in ran.stdout
    assert "~1.5 B" in ran.stdout


def test_a_dry_run_shows_overrides_resolved(ppo_yaml: Path) -> None:
    ran = command("ppo", ppo_yaml, "ppo.updates=7", "--dry-run", "rollout.temperature=0.5")
    assert "updates: 7" in ran.stdout
    assert "temperature: 0.5" in ran.stdout


# How things end


def test_an_error_of_the_user_is_one_message_without_a_traceback(ppo_yaml: Path) -> None:
    ran = command("ppo", ppo_yaml, "ppo.updates=-1")
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr.startswith("error: ")
    assert len(ran.stderr.splitlines()) == 1
    assert "ppo.updates" in ran.stderr


def test_a_stages_error_keeps_its_exit_code(
    ppo_yaml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, code in ((ResourceError("no room"), 1), (StopRequested("stopped by SIGTERM"), 130)):

        def fail(config: object, address: object, error: Exception = error) -> dict:
            raise error

        fake_stage(monkeypatch, fail)
        assert in_process(monkeypatch, "ppo", ppo_yaml) == code
        assert capsys.readouterr().err == f"error: {error}\n"


def test_ctrl_c_ends_with_130_and_a_line(
    ppo_yaml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(config: object, address: object) -> dict:
        raise KeyboardInterrupt

    fake_stage(monkeypatch, interrupted)
    assert in_process(monkeypatch, "ppo", ppo_yaml) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_a_bug_shows_its_traceback(ppo_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: object, address: object) -> dict:
        raise ZeroDivisionError("a bug")

    fake_stage(monkeypatch, broken)
    monkeypatch.setattr(sys, "argv", ["rlhf-ray", "ppo", str(ppo_yaml)])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_a_stage_gets_its_configuration_and_address_and_its_summary_is_printed(
    ppo_yaml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def run(config: object, address: object) -> dict:
        seen.append((config.ppo.updates, address))  # type: ignore[attr-defined]
        return {"kl": 0.5}

    fake_stage(monkeypatch, run)
    assert in_process(monkeypatch, "ppo", ppo_yaml, "ppo.updates=3", "--address", "auto") == 0
    assert seen == [(3, "auto")]
    assert '"kl": 0.5' in capsys.readouterr().out


# Submitting


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    seen: list[tuple] = []

    def submit(*arguments: object) -> int:
        seen.append(arguments)
        return 3

    monkeypatch.setitem(sys.modules, "rlhf_ray.runtime.submit", SimpleNamespace(submit=submit))  # type: ignore[misc]
    return seen


def test_submit_takes_the_stage_from_the_folder_and_exits_as_the_job_did(
    submitted: list[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    path = CLUSTER_CONFIGS[0].relative_to(ROOT)
    assert in_process(monkeypatch, "submit", path, "seed=1", "--address", "http://h:8265") == 3
    assert submitted == [(path, "ppo", ["seed=1"], "http://h:8265", ROOT)]


def test_submit_asks_for_the_stage_where_the_folder_does_not_tell(
    submitted: list[tuple], ppo_yaml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert in_process(monkeypatch, "submit", ppo_yaml, "--address", "http://h") == 2
    assert "give --stage" in capsys.readouterr().err
    line = ["submit", ppo_yaml, "output_dir=/shared", "--address", "http://h", "--stage", "ppo"]
    assert in_process(monkeypatch, *line) == 3
    assert [arguments[1] for arguments in submitted] == ["ppo"]


def test_submit_refuses_a_run_whose_results_would_be_deleted_with_the_upload(
    submitted: list[tuple], ppo_yaml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert in_process(monkeypatch, "submit", ppo_yaml, "--address", "http://h", "--stage", "ppo") == 2
    assert "output_dir 'runs' is relative" in capsys.readouterr().err
    assert submitted == []


def test_submit_finds_a_fault_before_it_uploads(
    submitted: list[tuple], ppo_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert in_process(monkeypatch, "submit", ppo_yaml, "x=1", "--address", "http://h", "--stage", "ppo") == 2
    assert submitted == []


def test_submit_says_within_seconds_that_nobody_answers() -> None:
    path = CLUSTER_CONFIGS[0].relative_to(ROOT)
    ran = command("submit", path, "--address", "http://127.0.0.1:9")
    assert ran.returncode == 1
    assert "nobody answers at http://127.0.0.1:9" in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr
