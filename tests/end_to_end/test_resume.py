"""A run that is killed goes on where it was when the same command is given again, and comes out the same."""

import json
import subprocess

import pytest
from commands import UPDATES, Project, deterministic, rows

from rlhf_ray.runtime.audit import audit, read

pytestmark = pytest.mark.real

Ran = subprocess.CompletedProcess[str]


def test_a_run_killed_twice_ends_with_the_numbers_of_one_that_was_not(project: Project, ran: Ran) -> None:
    assert ran.returncode == 0, ran.stderr
    folder = project.results("killed")
    for lines in (1, 2):
        running = project.start("name=killed", "checkpoint.keep=2")
        try:
            running.wait_until(lambda lines=lines: len(rows(folder / "metrics.jsonl")) >= lines)
        finally:
            running.kill()
        assert not (folder / "summary.json").exists()
    ended = project.run("name=killed", "checkpoint.keep=2", within_s=180)
    assert ended.returncode == 0, ended.stderr
    found, expected = ([deterministic(line) for line in project.metrics(name)] for name in ("killed", "run"))
    assert len(found) == UPDATES and found == expected
    assert rows(folder / "samples.jsonl") == rows(project.results("run") / "samples.jsonl")
    weights = [
        (project.results(name) / f"checkpoints/update_{UPDATES:06d}/policy/model.safetensors").read_bytes()
        for name in ("killed", "run")
    ]
    assert weights[0] == weights[1]
    verdict = audit(read(folder))
    assert verdict.good and verdict.complete, verdict
    assert sum(row["event"] == "resumed" for row in read(folder)) >= 1
    said, plain = (json.loads(one.stdout) for one in (ended, ran))
    assert {name: said[name] for name in ("updates", "tokens", "kl", "scores_last")} == {
        name: plain[name] for name in ("updates", "tokens", "kl", "scores_last")
    }


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_gone_on_from(project: Project, ran: Ran) -> None:
    folder = project.results("damaged")
    running = project.start("name=damaged", "checkpoint.keep=3")
    try:
        running.wait_until(lambda: (folder / "checkpoints/update_000002/state.json").exists())
    finally:
        running.kill()
    place = folder / "checkpoints/update_000002/learner/policy.safetensors"
    content = place.read_bytes()
    place.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    ended = project.run("name=damaged", "checkpoint.keep=3", within_s=180)
    assert ended.returncode == 0, ended.stderr
    assert "update_000002' is damaged (learner/policy.safetensors is not what was written)" in ended.stderr
    assert "going on after update 1" in ended.stderr
    assert [deterministic(line) for line in project.metrics("damaged")] == [
        deterministic(line) for line in project.metrics("run")
    ]


def test_another_configuration_does_not_go_on_with_a_run(project: Project, ran: Ran) -> None:
    refused = project.run("name=damaged", "checkpoint.keep=3", "ppo.epochs=3")
    assert refused.returncode == 2 and "already holds a run" in refused.stderr
