"""From synchronous to asynchronous by one number: the same loop, judged by its numbers and by its own history."""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import yaml
from commands import PROMPTS, RLHF_RAY, SAMPLES, UPDATES, Project, clean_environment, deterministic, rows

from rlhf_ray.config.load import load
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.records import Ragged
from rlhf_ray.runtime.audit import audit, read
from rlhf_ray.runtime.deadlines import fetch

pytestmark = pytest.mark.real

Ran = subprocess.CompletedProcess[str]


def command(project: Project, *words: str) -> Ran:
    return subprocess.run(
        [str(RLHF_RAY), *words],
        cwd=project.folder,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def one_after_the_other(config: PPOConfig, folder: Path) -> list[dict[str, float]]:
    """PPO without a controller: generate all, score all, learn, publish, and only then the next."""
    from rlhf_ray.algorithms.kl import FixedKL
    from rlhf_ray.config.ppo import FixedController
    from rlhf_ray.data.order import SampleOrder
    from rlhf_ray.stages.ppo import canary, prepare
    from rlhf_ray.stages.roles import Chunk, Roles

    assert isinstance(config.ppo.kl.controller, FixedController)
    inputs = prepare(config, folder)
    steps = config.ppo.updates * config.ppo.epochs * config.ppo.minibatches
    order = SampleOrder(len(inputs.prompts), config.seed)
    beta = FixedKL(config.ppo.kl.coefficient)
    found = []

    def wait(refs: Any) -> Any:
        return fetch(refs, 120, "anybody", "anything")

    with Roles(config, inputs.eos_ids, canary(inputs.prompts), steps, folder / "evidence") as roles:
        wait(roles.publish(0))
        for update in range(config.ppo.updates):
            first = order.position
            prompts = Ragged.of([inputs.prompts[row].ids for row in order.take(PROMPTS)], np.int32)
            ids = (first + np.arange(PROMPTS, dtype=np.int64)) * SAMPLES
            stream = roles.engines[0].generate.options(num_returns="streaming").remote(prompts, ids, config.seed, 10**9)
            [trajectories] = list(stream)
            chunk = Chunk(
                trajectories,
                roles.references[0].score.remote(trajectories),
                roles.rewards[0].scores.remote(trajectories),
            )
            ray.wait(chunk.columns, num_returns=3, timeout=120)
            learned = wait(roles.learn([chunk], beta.coefficient, update, (ids // SAMPLES).tolist()))[0]
            wait(roles.publish(update + 1))
            found.append(learned.metrics)
    return found


def test_without_staleness_the_run_equals_the_plain_loop_to_the_last_bit(
    project: Project, ran: Ran, ray_session: None, tmp_path: Path
) -> None:
    assert ran.returncode == 0, ran.stderr
    places = {"policy": "policy", "reward.model": "reward", "data.path": "prompts.jsonl"}
    overrides = [f"{key}={project.folder / name}" for key, name in places.items()]
    expected = one_after_the_other(load(PPOConfig, project.folder / "run.yaml", overrides), tmp_path)
    found = [deterministic(line) for line in project.metrics("run")]
    assert len(expected) == UPDATES
    for line, wanted in zip(found, expected, strict=True):
        # What crosses the wire depends on how answers were put into chunks, and nothing else does.
        names = [name for name in wanted if not name.startswith("wire/")]
        assert {name: line[name] for name in names} == {name: wanted[name] for name in names}


@pytest.fixture(scope="module")
def overlapped(project: Project) -> Ran:
    """Every role twice but the learner; answers long enough for a publication to fall into them."""
    return project.run(
        "name=overlapped",
        "ppo.updates=8",
        "ppo.max_staleness=2",
        "rollout.max_new_tokens=64",
        "ppo.missing_eos_penalty=null",
        *("roles.rollout.engines=2", "roles.reference.replicas=2"),
        "checkpoint.every=null",
        within_s=300,
    )


def test_generation_goes_on_while_the_learner_trains_and_no_token_is_older_than_agreed(
    project: Project, overlapped: Ran
) -> None:
    assert overlapped.returncode == 0, overlapped.stderr
    lines = project.metrics("overlapped")
    assert len(lines) == 8
    assert lines[0]["staleness/max"] == 0
    assert max(line["staleness/max"] for line in lines) == 2
    for line in lines:
        assert line["weights/canary_gap"] < 1e-3 and line["val/ratio_max_first"] <= 1e-5
        assert line["tokens/generated"] == line["tokens/trained"]
        assert all(0 <= line[f"busy/{role}"] <= 1 for role in ("rollout", "scoring", "learner"))
    # What the engines sampled with older weights differs from what the learner says now: that is what is corrected.
    assert max(line["rollout/logprob_gap_mean"] for line in lines[2:]) > 1e-4
    history = read(project.results("overlapped"))
    training = False
    beside = 0
    for row in history:
        training = row["event"] == "training" or (training and row["event"] != "trained")
        beside += training and row["event"] in ("sent", "finished")
    assert beside > 0


def test_the_history_of_a_run_is_audited_by_one_command(project: Project, ran: Ran, overlapped: Ran) -> None:
    for name, updates in (("run", UPDATES), ("overlapped", 8)):
        verdict = audit(read(project.results(name)))
        assert verdict.good and verdict.complete and verdict.trained == PROMPTS * updates, verdict
        told = command(project, "audit", f"runs/{name}")
        assert told.returncode == 0 and "every sample is accounted for; the run is complete" in told.stdout
    assert "0: 24\n" in command(project, "audit", "runs/run").stdout


def test_a_history_that_was_tampered_with_is_told_and_a_folder_without_one_refused(
    project: Project, ran: Ran, tmp_path: Path
) -> None:
    history = read(project.results("run"))
    last = next(row for row in reversed(history) if row["event"] == "training")
    last["groups"][0] = 0
    (tmp_path / "history.jsonl").write_text("\n".join(json.dumps(row) for row in history))
    told = command(project, "audit", str(tmp_path))
    assert told.returncode == 1 and "group 0: training, but it is trained in update 0" in told.stdout
    told = command(project, "audit", "runs")
    assert told.returncode == 2 and "give the folder of a PPO run" in told.stderr and told.stdout == ""


def test_a_trace_has_a_row_for_every_actor(project: Project, overlapped: Ran) -> None:
    told = command(project, "trace", "runs/overlapped")
    assert told.returncode == 0
    place = project.folder / told.stdout.strip()
    events = json.loads(place.read_text())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names >= {"rollout 0", "rollout 1", "reference and reward", "learner"}
    updates = [event for event in events if event["name"] == "update" and event["ph"] == "b"]
    assert [event["args"]["number"] for event in updates] == list(range(8))


@pytest.mark.parametrize("in_flight", ["wait", "abort"])
def test_answers_under_way_at_a_publication_may_be_waited_for_or_begun_anew(project: Project, in_flight: str) -> None:
    ended = project.run(
        f"name={in_flight}",
        f"publication.in_flight={in_flight}",
        "ppo.updates=4",
        "ppo.max_staleness=1",
        "rollout.max_new_tokens=64",
        "checkpoint.every=null",
        within_s=300,
    )
    assert ended.returncode == 0, ended.stderr
    history = read(project.results(in_flight))
    assert audit(history).good and audit(history).complete
    finished = [row for row in history if row["event"] == "finished"]
    assert all(row["oldest"] == row["newest"] for row in finished)
    settings = yaml.safe_load((project.results(in_flight) / "config.yaml").read_text())
    assert settings["publication"]["in_flight"] == in_flight
    assert rows(project.results(in_flight) / "samples.jsonl")
