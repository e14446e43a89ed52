"""DeepSpeed against plain torch: an engine is AdamW with clipping, at every stage and on any number of ranks."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from ranks import on_ranks
from transformers import AutoModelForCausalLM

from rlhf_ray.config.common import OptimizerConfig, ZeroConfig
from rlhf_ray.models.zero import BETAS, EPS, rate_factor

STEPS = 3
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, schedule="linear", warmup_share=0.4, max_grad_norm=0.5)
ROWS = [np.random.default_rng(row).integers(6, 42, 4 + 3 * row, dtype=np.int32) for row in range(4)]

Weights = dict[str, np.ndarray]


def as_numpy(named: object) -> Weights:
    return {name: weight.detach().float().numpy().copy() for name, weight in named}  # type: ignore[attr-defined]


def trained(
    rank: int, folder: str, stages: Sequence[int | ZeroConfig], world: int
) -> dict[int, tuple[Weights, list[float]]]:
    """Weights and gradient norms after a few steps on ROWS, shared out over ranks, at each ZeRO stage."""
    from rlhf_ray.models import load, zero
    from rlhf_ray.models.heads import TokenLogprobs
    from rlhf_ray.models.packed import Packed

    found = {}
    tokens = sum(len(row) - 1 for row in ROWS)
    for stage in stages:
        settings = ZeroConfig(stage=stage) if isinstance(stage, int) else stage
        module = TokenLogprobs(load.causal_lm(folder, "cpu"), 1.0)
        engine = zero.make_engine(module, OPTIMIZER, settings, "cpu", STEPS)
        norms = []
        for _ in range(STEPS):
            for row in ROWS[rank::world]:
                logprobs = engine(Packed.of([row], [1], torch.device("cpu"))).logprobs
                engine.backward(-logprobs.sum() * world / tokens)
            norms.append(zero.step(engine, "the model"))
        found[settings.stage] = (as_numpy(zero.whole_weights(engine, module.model.named_parameters())), norms)
    return found


def plainly_trained(folder: str) -> tuple[Weights, list[float]]:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    adam = torch.optim.AdamW(model.parameters(), lr=OPTIMIZER.learning_rate, betas=BETAS, eps=EPS, weight_decay=0.0)
    norms = []
    for factor in (1.0, 1.0, 0.5):  # one step of warm-up, then linearly to zero
        for group in adam.param_groups:
            group["lr"] = factor * OPTIMIZER.learning_rate
        ids = [torch.from_numpy(row.astype(np.int64)) for row in ROWS]
        losses = [-model(row[None]).logits[0, :-1].log_softmax(-1).gather(1, row[1:, None]).sum() for row in ids]
        (torch.stack(losses).sum() / sum(len(row) - 1 for row in ids)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)))
        adam.step()
        adam.zero_grad()
    return as_numpy(model.named_parameters()), norms


def check(found: tuple[Weights, list[float]], expected: tuple[Weights, list[float]], norm_tolerance: float) -> None:
    (weights, norms), (plain, plain_norms) = found, expected
    assert norms == pytest.approx(plain_norms, rel=norm_tolerance)
    assert min(plain_norms) > OPTIMIZER.max_grad_norm  # else clipping is not tested
    assert weights.keys() == plain.keys()
    for name, weight in weights.items():
        np.testing.assert_allclose(weight, plain[name], atol=1e-4, err_msg=name)


@pytest.mark.real
def test_every_stage_is_clipped_adamw_on_one_rank(tied_policy: str) -> None:
    (found,) = on_ranks(1, trained, tied_policy, [0, 1, 2, 3], 1)
    for stage in found:
        check(found[stage], plainly_trained(tied_policy), 1e-3)


@pytest.mark.real
def test_parameters_and_optimizer_in_host_memory_train_alike(policy: str) -> None:
    offloaded = ZeroConfig(stage=3, offload="all")
    (found,) = on_ranks(1, trained_with, policy, offloaded)
    check(found, plainly_trained(policy), 1e-3)


def trained_with(rank: int, folder: str, settings: ZeroConfig) -> tuple[Weights, list[float]]:
    return trained(rank, folder, [settings], 1)[settings.stage]


def bf16_states(rank: int, folder: str, stages: list[int]) -> dict[int, tuple[set[torch.dtype], bool]]:
    """Types of what the optimiser keeps, and whether a step moved the weights, with the settings that GPUs get."""
    import deepspeed

    from rlhf_ray.models import load, zero
    from rlhf_ray.models.heads import TokenLogprobs, checksum
    from rlhf_ray.models.packed import Packed

    found = {}
    for stage in stages:
        module = TokenLogprobs(load.causal_lm(folder, "cpu").bfloat16(), 1.0)
        before = checksum(module)
        zero.import_deepspeed("cpu")
        settings = zero.settings(OPTIMIZER, ZeroConfig(stage=stage, bf16_optimizer=True), "gpu")
        settings["zero_optimization"]["overlap_comm"] = False
        engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=list(module.parameters()),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
            config=settings,
            dist_init_required=False,
        )
        engine.backward(engine(Packed.of([ROWS[0]], [1], torch.device("cpu"))).logprobs.sum())
        zero.step(engine, "the model")
        states = engine.optimizer.optimizer.state.values()
        kinds = {value.dtype for state in states for value in state.values() if value.numel() > 1}
        found[stage] = (kinds, checksum(module) != before)
    return found


@pytest.mark.real
def test_optimizer_states_are_bf16_when_asked_for(policy: str) -> None:
    (found,) = on_ranks(1, bf16_states, policy, [1, 2])
    assert found == {1: ({torch.bfloat16}, True), 2: ({torch.bfloat16}, True)}


@pytest.mark.real
def test_two_ranks_train_as_one(policy: str) -> None:
    first, second = on_ranks(2, trained, policy, [1, 2, 3], 2)
    for stage in first:
        check(first[stage], plainly_trained(policy), 1e-3)
        for name, weight in first[stage][0].items():
            np.testing.assert_array_equal(weight, second[stage][0][name])


def after_a_step_with(rank: int, folder: str, stages: list[int], value: float) -> dict[int, tuple[bool, str]]:
    """Whether a step with a loss of `value` left the parameters as they were, and what it raised."""
    from rlhf_ray.errors import TrainingError
    from rlhf_ray.models import load, zero
    from rlhf_ray.models.heads import TokenLogprobs, checksum
    from rlhf_ray.models.packed import Packed

    found = {}
    for stage in stages:
        module = TokenLogprobs(load.causal_lm(folder, "cpu"), 1.0)
        before = checksum(module)
        engine = zero.make_engine(module, OPTIMIZER, ZeroConfig(stage=stage), "cpu", STEPS)
        engine.backward(engine(Packed.of([ROWS[0]], [1], torch.device("cpu")))[0].sum() * value)
        said = ""
        try:
            zero.step(engine, "the model")
        except TrainingError as error:
            said = str(error)
        found[stage] = (checksum(module) == before, said)
    return found


@pytest.mark.real
def test_a_gradient_that_is_not_finite_is_never_applied(policy: str) -> None:
    (found,) = on_ranks(1, after_a_step_with, policy, [0, 1, 2], math.nan)
    for unchanged, said in found.values():
        assert unchanged
        assert "the gradient norm of the model is" in said


def test_the_learning_rate_rises_falls_and_ends_at_zero() -> None:
    linear = rate_factor(OptimizerConfig(schedule="linear", warmup_share=0.2), 10)
    assert [linear(step) for step in (0, 1, 2, 6, 10, 11)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0, 0.0])
    cosine = rate_factor(OptimizerConfig(schedule="cosine", warmup_share=0.2), 10)
    assert [cosine(step) for step in (2, 6, 10)] == pytest.approx([1.0, 0.5, 0.0], abs=1e-6)
    constant = rate_factor(OptimizerConfig(schedule="constant", warmup_share=0.0), 10)
    assert [constant(step) for step in (0, 10, 100)] == [1.0, 1.0, 1.0]


def test_the_very_first_step_already_moves() -> None:
    for share in (0.0, 0.03, 0.5, 1.0):
        assert rate_factor(OptimizerConfig(warmup_share=share), 100)(0) > 0
