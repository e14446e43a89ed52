"""How a run ends before its time: stopped by a person or by Ray, or because one of its actors died."""

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from subprocess import CompletedProcess

import psutil
import pytest
from commands import Project, Running, deterministic, is_progress, only_message, rows
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.real

FOR_EVER = "ppo.updates=100000"


@contextmanager
def running(project: Project, *overrides: str) -> Iterator[Running]:
    run = project.start(*overrides)
    try:
        yield run
    finally:
        run.kill()


def like_a_terminal(run: Running) -> None:
    os.killpg(run.process.pid, signal.SIGINT)


def like_ray(run: Running) -> None:
    """`ray job stop` tells the driver, and after a while kills."""
    run.process.terminate()


@pytest.mark.parametrize(
    ("stop", "name"), [(like_a_terminal, "SIGINT"), (like_ray, "SIGTERM")], ids=["Ctrl-C", "ray job stop"]
)
def test_a_run_that_is_stopped_saves_its_policy_and_leaves_nobody_behind(
    project: Project, ran: CompletedProcess[str], stop: Callable[[Running], None], name: str
) -> None:
    folder = project.results(name)
    with running(project, f"name={name}", FOR_EVER, "checkpoint.every=2", "telemetry.wandb=offline") as run:
        run.wait_until(lambda: len(project.metrics(name)) >= 3)
        kinds = ("RolloutEngine", "Reference", "Rewards", "Learner")
        assert all(run.actor(kind) for kind in kinds)
        stop(run)
        assert run.end() == 130
        assert run.leftovers() == []

    notice, *told = run.err.read_text().splitlines()
    assert notice.startswith("W&B: recording offline")
    saved = folder / "checkpoints/stopped/policy"
    assert [line for line in told if not is_progress(line)] == [
        f"error: stopped by {name}; the policy as it was is saved in '{saved}'"
    ]
    assert run.out.read_text() == ""
    AutoModelForCausalLM.from_pretrained(saved)
    AutoTokenizer.from_pretrained(saved)
    lines = project.metrics(name)
    assert json.loads((saved.parent / "state.json").read_text())["updates"] in (len(lines), len(lines) + 1)
    assert not (folder / "summary.json").exists()
    assert list((folder / "checkpoints").glob("*.unfinished")) == []

    # Up to there it was the same run as one that was left alone, to the bit.
    whole = project.metrics("run")
    assert [*map(deterministic, lines[: len(whole)])] == [*map(deterministic, whole)]


def test_a_run_that_is_stopped_while_it_starts_ends_as_well(project: Project) -> None:
    with running(project, "name=early") as run:
        run.wait_until(lambda: run.actor("RolloutEngine"))
        like_a_terminal(run)
        assert run.end() == 130
        assert run.leftovers() == []
    assert only_message(run.out.read_text(), run.err.read_text()) == "error: stopped by SIGINT"
    assert not (project.results("early") / "summary.json").exists()


@pytest.mark.parametrize("kind", ["RolloutEngine"])
def test_an_actor_that_dies_ends_the_run_which_says_whose_it_was(project: Project, kind: str) -> None:
    name = f"without-{kind}"
    with running(project, f"name={name}", FOR_EVER, "checkpoint.every=null") as run:
        run.wait_until(lambda: project.metrics(name))
        actor = run.actor(kind)
        assert isinstance(actor, psutil.Process)
        actor.kill()
        assert run.end() == 1
        assert run.leftovers() == []
    said = [line for line in run.err.read_text().splitlines() if not is_progress(line)]
    assert len(said) == 1, said
    assert re.match(rf"error: {kind} \(pid {actor.pid} on [\d.]+\) died while ", said[0]), said
    assert rows(project.results(name) / "metrics.jsonl")
    assert not (project.results(name) / "summary.json").exists()
