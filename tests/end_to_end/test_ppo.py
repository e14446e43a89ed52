"""PPO with its real roles, run as a person runs it: what it computes, and what it leaves."""

import json
import math
import socket
import subprocess
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import PROMPTS, SAMPLES, UPDATES, Project, is_progress, rows
from transformers import AutoModelForCausalLM, AutoTokenizer
from wandb_records import logged, of, records

from rlhf_ray.config.load import load
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.models.load import check_same_tokenizer
from rlhf_ray.telemetry.catalogue import SECTIONS

pytestmark = pytest.mark.real

Ran = subprocess.CompletedProcess[str]
METRICS = {metric.name for title, section in SECTIONS.items() if title.startswith("PPO") for metric in section}


@pytest.fixture
def metrics(project: Project, ran: Ran) -> list[dict[str, Any]]:
    return project.metrics("run")


# What the plain run says and leaves


def test_a_run_ends_well_and_says_only_what_a_person_wants_to_know(project: Project, ran: Ran) -> None:
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == json.loads((project.results("run") / "summary.json").read_text())
    notice, *progress = ran.stderr.splitlines()
    assert notice.startswith("W&B: recording offline")
    assert len(progress) == UPDATES and all(map(is_progress, progress)), ran.stderr


def test_the_kept_configuration_is_what_was_asked(project: Project, ran: Ran) -> None:
    asked = load(PPOConfig, project.folder / "run.yaml", ["checkpoint.keep=2", "telemetry.wandb=offline"])
    assert load(PPOConfig, project.results("run") / "config.yaml") == asked


def test_every_update_logs_every_metric_and_each_is_finite(metrics: list[dict[str, Any]]) -> None:
    assert [line["update"] for line in metrics] == list(range(UPDATES))
    for line in metrics:
        assert set(line) - {"update", "time"} == METRICS
        assert [name for name, value in line.items() if value is None or not math.isfinite(value)] == []


def test_the_policy_starts_as_its_own_reference_and_leaves_it(metrics: list[dict[str, Any]]) -> None:
    assert abs(metrics[0]["objective/kl"]) < 1e-6
    assert abs(metrics[0]["objective/kl_per_token"]) < 1e-6
    assert metrics[1]["objective/kl"] > 1e-3


def test_the_first_minibatch_of_every_update_is_on_policy(metrics: list[dict[str, Any]]) -> None:
    assert all(line["val/ratio_max_first"] <= 1e-5 for line in metrics)
    assert all(line["policy/approxkl_avg"] > 0 for line in metrics)  # the later ones are not


def test_engine_and_learner_agree_on_every_token_and_after_every_publication(metrics: list[dict[str, Any]]) -> None:
    for line in metrics:
        assert 0 <= line["rollout/logprob_gap_mean"] <= line["rollout/logprob_gap_max"] < 1e-3
        assert line["weights/canary_gap"] < 1e-3
    assert [line["weights/version"] for line in metrics] == [1, 2, 3]


def test_phases_add_up_to_the_update(metrics: list[dict[str, Any]]) -> None:
    for line in metrics:
        phases = [value for name, value in line.items() if name.startswith("time/") and name != "time/update"]
        assert sum(phases) == pytest.approx(line["time/update"], rel=0.02)
        assert min(phases) >= 0
    spans = [after["time"] - before["time"] for before, after in pairwise(metrics)]
    assert spans == pytest.approx([line["time/update"] for line in metrics[1:]], rel=0.02, abs=0.02)


def test_tokens_are_counted_once(metrics: list[dict[str, Any]]) -> None:
    total = 0
    for line in metrics:
        answers = PROMPTS * SAMPLES
        assert answers <= line["tokens/generated"] <= 16 * answers
        assert line["tokens/generated"] == pytest.approx(line["tokens/response_length"] * answers)
        assert line["tokens/per_s"] == pytest.approx(line["tokens/generated"] / line["time/update"])
        total += line["tokens/generated"]
        assert line["tokens/total"] == total


def test_the_summary_is_what_the_metrics_say(project: Project, ran: Ran, metrics: list[dict[str, Any]]) -> None:
    summary = json.loads(ran.stdout)
    assert summary["updates"] == UPDATES
    assert summary["tokens"] == metrics[-1]["tokens/total"]
    assert (summary["kl_first"], summary["kl"]) == (metrics[0]["objective/kl"], metrics[-1]["objective/kl"])
    assert summary["scores_last"] == metrics[-1]["objective/scores"]
    assert summary["logprob_gap_max"] == max(line["rollout/logprob_gap_max"] for line in metrics)
    assert Path(summary["policy"]) == project.results("run") / "checkpoints/update_000003/policy"


def test_a_few_answers_of_every_update_can_be_read(project: Project, ran: Ran, metrics: list[dict[str, Any]]) -> None:
    samples = rows(project.results("run") / "samples.jsonl")
    assert {sample["update"] for sample in samples} == set(range(UPDATES))
    for sample in samples:
        assert set(sample) == {"update", "prompt", "response", "score", "kl"}
        assert sample["prompt"] and set(sample["prompt"].replace(" ", "")) <= set("abcdefgh")
        assert math.isfinite(sample["score"]) and math.isfinite(sample["kl"])
    assert any(sample["response"] for sample in samples)


def test_the_prompt_that_is_too_long_is_set_aside_with_its_place(project: Project, ran: Ran) -> None:
    [entry] = rows(project.results("run") / "quarantine.jsonl")
    assert (entry["file"], entry["line"]) == ("prompts.jsonl", 41)
    assert "too long" in entry["reason"] and "data.max_tokens is 32" in entry["reason"]


def test_the_newest_checkpoints_stay_and_load_as_an_ordinary_model(project: Project, ran: Ran) -> None:
    checkpoints = project.results("run") / "checkpoints"
    assert sorted(place.name for place in checkpoints.iterdir()) == ["update_000002", "update_000003"]
    states = [json.loads((place / "state.json").read_text())["updates"] for place in sorted(checkpoints.iterdir())]
    assert states == [2, 3]
    before = AutoModelForCausalLM.from_pretrained(project.policy)
    after = AutoModelForCausalLM.from_pretrained(checkpoints / "update_000003/policy")
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.isfinite(new).all() and not torch.equal(old, new), name
    tokenizers = [
        AutoTokenizer.from_pretrained(place) for place in (project.policy, checkpoints / "update_000003/policy")
    ]
    check_same_tokenizer(*tokenizers, "before", "after")
    assert tokenizers[0].chat_template == tokenizers[1].chat_template


def test_wandb_has_the_same_history_configuration_and_summary(
    project: Project, ran: Ran, metrics: list[dict[str, Any]]
) -> None:
    recorded = records(project.results("run"))
    assert logged(recorded) == [{name: value for name, value in line.items() if name != "time"} for line in metrics]
    [run] = of("run", recorded)
    configuration = {name: value for name, value in run["config"]["update"].items() if name != "_wandb"}
    assert configuration == yaml.safe_load((project.results("run") / "config.yaml").read_text())
    assert json.loads(ran.stdout) in [summary["update"] for summary in of("summary", recorded)]
    assert of("alert", recorded) == []
    assert of("exit", recorded)[-1].get("exit_code", 0) == 0


# Many workers

PYTHON_REWARD = """
def length(prompts, responses):
    assert all(isinstance(text, str) for text in prompts + responses)
    return [float(len(response)) for response in responses]
"""
BUSY_PORTS = (6379, 8000, 8265, 10001, 29500)
"""Ray's head, Serve, dashboard and client; torch's rendezvous."""


@pytest.fixture(scope="module")
def many(project: Project) -> Ran:
    """Two of every role, sharded gradients, weights by gloo, a Python reward; usual ports are taken by others."""
    (project.folder / "my_rewards.py").write_text(PYTHON_REWARD)
    options = [
        "name=many",
        "ppo.updates=2",
        "rollout.prompts_per_update=7",  # which two engines and two ranks cannot share out evenly
        "learner.tokens_per_micro_batch=128",
        "learner.zero.stage=2",
        "publication.backend=gloo",
        *("reward.model=null", "reward.function=my_rewards:length"),
        *("roles.rollout.engines=2", "roles.reference.replicas=2", "roles.reward.replicas=2", "roles.learner.ranks=2"),
        "checkpoint.every=null",
    ]
    with ExitStack() as stack:
        for port in BUSY_PORTS:
            with suppress(OSError):  # taken by somebody else: busy as well
                stack.enter_context(socket.create_server(("0.0.0.0", port)))
        return project.run(*options, within_s=300, MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", VLLM_PORT="29500")


def test_two_of_every_role_work_together_while_usual_ports_are_taken(project: Project, many: Ran) -> None:
    assert many.returncode == 0, many.stderr
    lines = project.metrics("many")
    assert [line["update"] for line in lines] == [0, 1]
    for line in lines:
        assert line["val/ratio_max_first"] <= 1e-5
        assert line["weights/canary_gap"] < 1e-3 and line["rollout/logprob_gap_max"] < 1e-3
    assert abs(lines[0]["objective/kl"]) < 1e-6 and lines[1]["objective/kl"] > 1e-3
    assert [line["weights/version"] for line in lines] == [1, 2]


def test_a_reward_function_beside_the_configuration_is_found_by_driver_and_actors(project: Project, many: Ran) -> None:
    assert many.returncode == 0, many.stderr
    samples = rows(project.results("many") / "samples.jsonl")
    assert samples and all(sample["score"] == len(sample["response"]) for sample in samples)


def test_workers_of_every_number_sample_the_same_answers(project: Project, ran: Ran, many: Ran) -> None:
    """Sampling depends on the seed and the sample's id alone; the first prompts are those of the plain run."""
    first = [
        [sample for sample in rows(project.results(name) / "samples.jsonl") if sample["update"] == 0]
        for name in ("run", "many")
    ]
    alone, shared = ([(sample["prompt"], sample["response"]) for sample in samples] for samples in first)
    assert alone == shared
