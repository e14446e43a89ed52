"""Which stages run and which results are kept. The stages here only write a file; real ones have tests of their own."""

import json
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Barrier, Event, Lock, main_thread
from typing import Any

import pytest
import yaml

from rlhf_ray.config.evaluation import EvaluateConfig
from rlhf_ray.config.load import load
from rlhf_ray.config.pipeline import load_pipeline
from rlhf_ray.config.stages import config_of
from rlhf_ray.errors import ConfigError, ResourceError, StopRequested, TrainingError
from rlhf_ray.runtime.digests import Digests
from rlhf_ray.stages import jobs, pipeline


class Stages:
    """In place of the real ones: each writes its model, made of what it was given, and a summary."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fails: str | None = None

    def runner_of(self, command: str) -> Any:
        def run(config: Any, address: str | None) -> dict[str, Any]:
            self.ran.append(command)
            folder = Path(config.output_dir) / config.name
            folder.mkdir()  # two runs in one folder are an error, as they are for real stages
            if self.fails == command:
                raise TrainingError(f"{command} failed")
            made = folder / "model"
            made.write_text(f"{command} of {Path(config.model).read_text()}, {config.training.epochs} epochs")
            summary = {"model": str(made), "loss": 0.5}
            (folder / "summary.json").write_text(json.dumps(summary))
            return summary

        return run


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    found = Stages()
    monkeypatch.setattr(pipeline, "runner_of", found.runner_of)
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "start").write_text("base")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    data = {"path": str(tmp_path / "rows.jsonl")}
    tree = {
        "name": "line",
        "output_dir": str(tmp_path / "runs"),
        "stages": {
            "sft": {"model": str(tmp_path / "start"), "data": data},
            "reward": {"model": "${sft.model}", "data": data},
            "dpo": {"model": "${sft.model}", "data": data},
        },
    }
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def go(file: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    return pipeline.Pipeline(*load_pipeline(file, list(overrides)), None).run(options.get("again", ()))


def test_each_stage_runs_on_what_others_left_and_is_found_by_its_name(file: Path, stages: Stages) -> None:
    summary = go(file)
    assert stages.ran == ["sft", "reward", "dpo"]
    made = file.parent / "runs/line/reward/model"
    assert made.read_text() == "reward of sft of base, 1 epochs, 1 epochs"
    assert made.resolve().parent == Path(summary["reward"]["folder"])
    assert json.loads((file.parent / "runs/line/summary.json").read_text()) == summary


def test_finished_stages_are_skipped(file: Path, stages: Stages) -> None:
    go(file)
    summary = go(file, "stages.reward.telemetry.wandb=off")
    assert stages.ran == ["sft", "reward", "dpo"]
    assert {stage["state"] for stage in summary.values()} == {"kept"}


def test_a_changed_key_runs_its_stage_and_what_depends_on_it(file: Path, stages: Stages) -> None:
    go(file)
    go(file, "stages.dpo.training.epochs=2")
    assert stages.ran[3:] == ["dpo"]
    go(file, "stages.sft.training.epochs=2")
    assert stages.ran[4:] == ["sft", "reward", "dpo"]
    go(file)
    assert len(stages.ran) == 7, "the first results are still there"


def test_a_changed_input_file_runs_what_reads_it(file: Path, stages: Stages) -> None:
    go(file)
    (file.parent / "start").write_text("another base")
    go(file)
    assert stages.ran[3:] == ["sft", "reward", "dpo"]


def test_a_changed_file_is_seen_by_its_bare_name_too(
    file: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    go(file, "stages.sft.model=start")
    Path("start").write_text("another base")
    go(file, "stages.sft.model=start")
    assert stages.ran[3:] == ["sft", "reward", "dpo"]


def test_a_text_too_long_to_be_a_file_is_a_text(tmp_path: Path) -> None:
    config = EvaluateConfig.model_validate(
        {"name": "e", "policy": {"model": "m"}, "question": "which of the two? " * 50, "reference": ""}
    )
    digests = Digests(tmp_path / "memory.json")
    other = config.model_copy(update={"question": "which?"})
    assert pipeline.digest(config, "evaluate", digests) != pipeline.digest(other, "evaluate", digests)


def test_a_stage_that_is_run_again_and_comes_out_the_same_runs_no_other(file: Path, stages: Stages) -> None:
    go(file)
    go(file, again=["sft"])
    assert stages.ran[3:] == ["sft"]


def test_a_failed_stage_ends_the_run_and_the_next_one_begins_there(
    file: Path, stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    stages.fails = "reward"
    with pytest.raises(TrainingError):
        go(file)
    assert "✗ reward  failed" in capsys.readouterr().err
    stages.fails = None
    go(file)
    assert stages.ran == ["sft", "reward", "reward", "dpo"]


@dataclass
class Jobs:
    """A cluster whose jobs run the stages above; what a job does first is `at[stage]`."""

    stages: Stages
    cpus: int = 8
    at: dict[str, Callable[[], Any]] = field(default_factory=dict)
    running: int = 0
    most: int = 0
    """Jobs that ran at the same time."""
    lock: Lock = field(default_factory=Lock)

    def machines(self, address: str) -> list[dict[str, float]]:
        if not self.cpus:
            raise ResourceError("no list of machines")
        return [{"CPU": float(self.cpus)}]

    def submit_command(self, command: list[str], address: str, working_dir: Path, who: str) -> int:
        _, stage, file = command
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            self.at.get(who.removesuffix(": "), lambda: None)()
            self.stages.runner_of(stage)(load(config_of(stage), file), None)
        except TrainingError:
            return 1
        finally:
            with self.lock:
                self.running -= 1
        return 0


@pytest.fixture
def cluster(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    found = Jobs(stages)
    monkeypatch.setattr(jobs, "machines", found.machines)
    monkeypatch.setattr(jobs, "submit_command", found.submit_command)
    return found


def submitted(file: Path, *overrides: str) -> dict[str, Any]:
    return pipeline.run(*load_pipeline(file, list(overrides)), "http://head:8265")


def test_jobs_that_do_not_depend_on_each_other_run_at_the_same_time(file: Path, cluster: Jobs) -> None:
    both = Barrier(2, timeout=20)
    cluster.at = {"reward": both.wait, "dpo": both.wait}
    assert {stage["state"] for stage in submitted(file).values()} == {"done"}
    assert cluster.stages.ran[0] == "sft"
    assert cluster.most == 2


def test_jobs_that_the_cluster_cannot_hold_together_follow_each_other(file: Path, cluster: Jobs) -> None:
    cluster.cpus = 3
    workers = ["stages.reward.workers.cpus=2", "stages.dpo.workers.cpus=2"]
    cluster.at = {"reward": lambda: time.sleep(0.2)}
    submitted(file, *workers)
    assert cluster.stages.ran == ["sft", "reward", "dpo"]
    assert cluster.most == 1


def test_a_cluster_that_grows_takes_more_jobs(file: Path, cluster: Jobs) -> None:
    both = Barrier(2, timeout=20)
    cluster.cpus = 1
    cluster.at = {"sft": lambda: setattr(cluster, "cpus", 2), "reward": both.wait, "dpo": both.wait}
    assert {stage["state"] for stage in submitted(file).values()} == {"done"}


def test_where_a_clusters_size_cannot_be_had_jobs_follow_each_other_and_it_is_said(
    file: Path, cluster: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.cpus = 0
    submitted(file)
    assert cluster.most == 1
    assert "dpo waits for the others: no list of machines" in capsys.readouterr().err


def test_a_failed_job_lets_those_end_that_run_and_no_other_begins(
    file: Path, cluster: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = yaml.safe_load(file.read_text())
    tree["stages"]["more"] = {**tree["stages"]["sft"], "stage": "sft", "model": "${dpo.model}"}
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    cluster.stages.fails = "reward"
    cluster.at = {"dpo": lambda: time.sleep(0.5)}
    with pytest.raises(TrainingError, match="the job of stage 'reward' failed"):
        submitted(file)
    assert cluster.stages.ran == ["sft", "reward", "dpo"]
    tree_at_the_end = capsys.readouterr().err.rpartition("✗ reward  failed")[2]
    assert "✓ dpo  done" in tree_at_the_end
    assert "· more  waiting" in tree_at_the_end


def test_several_failed_jobs_are_all_named(file: Path, cluster: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    both = Barrier(2, timeout=20)

    def lost() -> None:
        both.wait()
        raise ResourceError("lost the Ray cluster")

    cluster.at = {"reward": lost, "dpo": lost}
    with pytest.raises(ResourceError, match=r"stage '(reward|dpo)': lost the Ray cluster"):
        submitted(file)
    assert re.search("stage '(reward|dpo)' failed as well: .*lost the Ray cluster", capsys.readouterr().err)


def test_who_stops_following_is_told_which_jobs_run_on(file: Path, cluster: Jobs) -> None:
    asked = Event()

    def stop() -> None:
        signal.pthread_kill(main_thread().ident or 0, signal.SIGINT)
        asked.wait(20)

    cluster.at = {"sft": stop}
    with pytest.raises(StopRequested, match="interrupted in sft; jobs run on"):
        submitted(file)
    asked.set()


def test_an_evaluation_shows_what_it_measured() -> None:
    rewards = {"gold": {"mean": 0.5, "se": 0.1}, "proxy": {"mean": 1.0, "se": 0.1}}
    answers = {"own": {"responses": 8, "rewards": rewards}, "others": {"responses": 8, "rewards": rewards}}
    assert pipeline._numbers({"policy": "p", "answers": answers}) == {
        "own/gold": 0.5,
        "own/proxy": 1.0,
        "others/gold": 0.5,
    }
    assert pipeline._numbers({"model": "m", "loss": 0.5, "seconds": 3.0}) == {"loss": 0.5}


def test_a_stage_that_is_not_there_is_named_with_those_that_are(file: Path) -> None:
    with pytest.raises(ConfigError, match="no stage 'ppo'; it has sft, reward, dpo"):
        pipeline.run(*load_pipeline(file), until="ppo")
