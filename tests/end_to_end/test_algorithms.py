"""Policy optimisation without a critic, run as a person runs it: groups, refills, adapters, forms of the KL."""

import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import UPDATES, Project, message
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.real

Ran = subprocess.CompletedProcess[str]

PARITY = """
def parity(prompts, responses):
    return [float(len(response) % 2) for response in responses]


def constant(prompts, responses):
    return [0.5] * len(responses)
"""


@pytest.fixture(scope="module")
def rewards(project: Project) -> None:
    (project.folder / "parity.py").write_text(PARITY)
    tiny.write_reward_model(project.folder / "other", seed=3)


@pytest.fixture(scope="module")
def dapo(project: Project, rewards: None) -> Ran:
    """Two answers a prompt, paid 0 or 1: about half of the prompts say nothing and are replaced."""
    return project.run(
        "name=dapo",
        "ppo.algorithm={name: dapo, max_refills: 3, overlong_buffer: 0}",
        "ppo.kl.estimator={name: full, top_k: 4, placement: loss}",
        "ppo.missing_eos_penalty=null",
        "reward={parts: {parity: {function: 'parity:parity'}}}",
        "reward.parts.watched={ensemble: {models: [reward, other]}, weight: 0}",
        within_s=180,
    )


def test_prompts_whose_answers_are_paid_alike_are_replaced_and_counted(project: Project, dapo: Ran) -> None:
    assert dapo.returncode == 0, dapo.stderr
    lines = project.metrics("dapo")
    assert len(lines) == UPDATES
    for line in lines:
        assert 0 <= line["rollout/refills"] <= 3
        assert line["rollout/prompts_dropped"] >= 0
        assert line["tokens/trained"] <= line["tokens/generated"]
        assert (line["tokens/trained"] < line["tokens/generated"]) == (line["rollout/prompts_dropped"] > 0)
        # Each prompt that is trained on has one answer paid 0 and one paid 1.
        assert line["objective/scores"] == line["scores/parity"] == 0.5
        # An ensemble that is watched and not paid for.
        assert math.isfinite(line["scores/watched"]) and line["disagreement/watched"] > 0
    assert any(line["rollout/prompts_dropped"] > 0 for line in lines)


def test_a_run_without_critic_logs_what_it_has_and_nothing_of_a_critic(project: Project, dapo: Ran) -> None:
    for line in project.metrics("dapo"):
        assert [name for name in line if name.startswith(("critic/", "lr/critic", "loss/value", "val/clip"))] == []
        assert all(value is not None and math.isfinite(value) for value in line.values())
    first, second = project.metrics("dapo")[:2]
    assert first["objective/kl_full"] == pytest.approx(0, abs=1e-5)
    assert second["objective/kl_full"] > 1e-4


def test_a_reward_that_tells_no_answers_apart_ends_the_run_and_says_so(project: Project, rewards: None) -> None:
    ran = project.run(
        "name=alike",
        "ppo.algorithm={name: dapo, max_refills: 1}",
        "ppo.missing_eos_penalty=null",
        *("reward.model=null", "reward.function=parity:constant"),
        within_s=180,
    )
    assert ran.returncode == 1
    assert "all answers to each of 16 prompts are paid alike: nothing to learn from" in message(ran)


@pytest.fixture(scope="module")
def adapted(project: Project) -> Ran:
    return project.run(
        "name=adapted",
        "ppo.algorithm=grpo",
        "ppo.kl.estimator={name: full, placement: both}",
        "learner.lora={rank: 4, share_reference: true}",
        within_s=180,
    )


@pytest.fixture
def adapted_metrics(project: Project, adapted: Ran) -> list[dict[str, Any]]:
    assert adapted.returncode == 0, adapted.stderr
    return project.metrics("adapted")


def test_adapters_reach_the_engines_and_their_absence_is_the_reference(adapted_metrics: list[dict[str, Any]]) -> None:
    assert len(adapted_metrics) == UPDATES
    for line in adapted_metrics:
        assert line["weights/canary_gap"] < 1e-3 and line["rollout/logprob_gap_max"] < 1e-3
    assert adapted_metrics[0]["objective/kl_full"] == pytest.approx(0, abs=1e-5)
    assert adapted_metrics[1]["objective/kl_full"] > 1e-4


def test_the_checkpoint_is_an_ordinary_model_with_its_adapters_added(
    project: Project, adapted_metrics: list[dict[str, Any]]
) -> None:
    before = AutoModelForCausalLM.from_pretrained(project.policy)
    after = AutoModelForCausalLM.from_pretrained(project.results("adapted") / "checkpoints/update_000003/policy")
    changed = [
        name
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(old, new)
    ]
    assert changed and all("_proj" in name for name in changed)


def test_every_configuration_of_the_demo_can_be_read() -> None:
    from rlhf_ray.config.load import load
    from rlhf_ray.config.ppo import PPOConfig
    from rlhf_ray.config.stages import config_of, known

    places = sorted((Path(__file__).parents[2] / "configs/demo").glob("*.yaml"))
    stages = [next((one for one in known() if place.stem.split("-")[0] == one), "ppo") for place in places]
    configs = [load(config_of(stage), place) for stage, place in zip(stages, places, strict=True)]
    algorithms = [config.ppo.algorithm.name for config in configs if isinstance(config, PPOConfig)]
    assert algorithms == ["dapo", "grpo", "gspo", "ppo", "reinforce_pp", "rloo"]
