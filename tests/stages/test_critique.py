"""The critique stage with a real engine and a tiny model that talks nonsense: what matters is what is kept of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.common import DataConfig
from rlhf_ray.config.feedback import CritiqueConfig
from rlhf_ray.data.quarantine import Quarantine
from rlhf_ray.data.rows import sft_examples
from rlhf_ray.errors import ConfigError, DataError, ModelError, StopRequested
from rlhf_ray.feedback import constitution as constitutions
from rlhf_ray.models import load
from rlhf_ray.stages import critique
from rlhf_ray.stages.engines import Engines

PROMPTS = ["good day", "what is it", "why", "tell me more", "how so", "and then"]
CONSTITUTION = {
    "name": "short",
    "principles": [
        {"id": f"p{n}", "critique": f"bad{n}", "revision": f"new{n}", "comparison": f"which{n}"} for n in range(3)
    ],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("critique")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    (folder / "constitution.json").write_text(json.dumps(CONSTITUTION))
    return folder


def config_of(files: Path, policy: str, name: str, **changes: Any) -> CritiqueConfig:
    settings: dict[str, Any] = {
        "name": name,
        "output_dir": str(files / "runs"),
        "data": {"path": str(files / "prompts.jsonl"), "max_tokens": 32},
        "generator": {"model": policy, "max_tokens": 256, "max_new_tokens": 60, "cpus": 0.5},
        "constitution": str(files / "constitution.json"),
        "rounds": 2,
        "telemetry": {"wandb": "off"},
    }
    return CritiqueConfig.model_validate({**settings, **changes})


def written(summary: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(summary["transcripts"]).read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(files: Path, policy: str, ray_session: None) -> dict[str, Any]:
    """An uninterrupted run, all prompts at once."""
    return critique.run(config_of(files, policy, "whole"))


@pytest.mark.real
def test_every_prompt_has_a_transcript_and_every_text_is_accounted_for(
    whole: dict[str, Any], files: Path, policy: str
) -> None:
    rows = written(whole)
    assert [row["prompt"][0]["content"] for row in rows] == PROMPTS
    dropped = [row for row in rows if row["dropped"]]
    assert whole["dropped"] == len(dropped) > 0, "the tiny model should fail to stop now and then"
    assert whole["revisions"] > 0, "and finish now and then"
    for row in dropped:
        last = row["rounds"][-1] if row["rounds"] else {"revision": row["response"], "critique": None}
        said = last["revision"] or last["critique"]
        assert said["finish"] == "length" or not said["text"] or "too long" in row["dropped"]
    for row in rows:
        for each in [row["response"], *(part for r in row["rounds"] for part in (r["critique"], r["revision"]))]:
            assert each is None or (each["logprob"] < 0 < each["tokens"] <= 60)
        assert row["constitution_sha"] == constitutions.load(files / "constitution.json").sha
        assert row["feedback_model"] == policy


@pytest.mark.real
def test_revisions_are_rows_that_fine_tuning_reads(whole: dict[str, Any], policy: str) -> None:
    tokenizer = load.tokenizer(policy, "model")
    examples = sft_examples(DataConfig(path=whole["rows"], max_tokens=256), tokenizer, Quarantine())
    assert len(examples) == whole["revisions"]


@pytest.mark.real
def test_a_run_that_was_cut_off_goes_on_and_ends_with_the_same_files(
    whole: dict[str, Any], files: Path, policy: str, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(files, policy, "cut", prompts_at_once=2)
    wait = Engines.sample
    calls = []

    def stopped(self: Engines, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:  # in the second block of five steps each
            raise StopRequested("interrupted")
        return wait(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Engines, "sample", stopped)
        with pytest.raises(StopRequested):
            critique.run(config)
    half = (files / "runs/cut/transcripts.jsonl").read_text()
    assert len(half.splitlines()) == 2
    (files / "runs/cut/transcripts.jsonl").write_text(half + '{"prompt_id": 2, "pro')  # as a crash leaves it
    again = critique.run(config)
    assert written(again) == written(whole)
    assert Path(again["rows"]).read_text() == Path(whole["rows"]).read_text()
    with pytest.raises(ConfigError, match="already holds a run"):
        critique.run(config)


def test_a_run_does_not_go_on_with_another_configuration(files: Path, policy: str) -> None:
    folder = files / "runs/other"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("name: other\n")
    (folder / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="already holds a run"):
        critique.run(config_of(files, policy, "other"))


def test_a_context_that_the_model_does_not_have_is_refused_before_an_engine_starts(files: Path, policy: str) -> None:
    generator = {"model": policy, "max_tokens": 4096, "max_new_tokens": 60}
    with pytest.raises(ModelError, match=r"context of 256 tokens, but generator.max_tokens is 4096"):
        critique.run(config_of(files, policy, "context", generator=generator))


def test_an_empty_file_of_prompts_is_refused(files: Path, policy: str, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match="empty data set"):
        critique.run(config_of(files, policy, "empty", data={"path": str(tmp_path / "none.jsonl")}))
