"""Every formula against the same one in plain Python floats, and against other people's code where it exists."""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import batches, grouped_returns, masked_batches
from torch import Tensor
from torch.distributions import Categorical

from rlhf_ray.algorithms import advantages, correction, policy_loss, preference_loss, statistics, value_loss
from rlhf_ray.algorithms.aggregation import AGGREGATIONS
from rlhf_ray.algorithms.kl import token_rewards
from rlhf_ray.algorithms.logprobs import logprobs_and_entropy

Batch = tuple[list[Tensor], Tensor]
MaskedBatch = tuple[list[Tensor], Tensor, Tensor]
Share = st.floats(0, 1)
# 1024ths, for which 1 - p is exact, so that rounding moves no pair to another bin.
Pairs = st.lists(st.tuples(*[st.integers(0, 1024).map(lambda x: x / 1024)] * 2), min_size=1, max_size=20)


def check(fast: Tensor, slow: object) -> None:
    expected = torch.tensor(slow, dtype=torch.bool if fast.dtype == torch.bool else torch.float64)
    torch.testing.assert_close(fast, expected, rtol=1e-10, atol=1e-10, equal_nan=True)


def lists(*tensors: Tensor) -> list[list]:
    return [tensor.tolist() for tensor in tensors]


@given(batches(columns=1), st.booleans())
def test_statistics(batch: Batch, keep_mean: bool) -> None:
    (x,), offsets = batch
    check(statistics.sequence_sums(x, offsets), oracle.sequence_sums(*lists(x, offsets)))
    check(statistics.sequence_means(x, offsets), oracle.sequence_means(*lists(x, offsets)))
    if len(x):
        check(statistics.whiten(x, keep_mean), oracle.whiten(x.tolist(), keep_mean))


@given(batches(columns=2, shortest=1), st.floats(0, 2))
def test_token_rewards(batch: Batch, beta: float) -> None:
    (kl, noise), offsets = batch
    scores = noise[: len(offsets) - 1]
    check(token_rewards(kl, scores, offsets, beta), oracle.token_rewards(*lists(kl, scores, offsets), beta))


@given(masked_batches(columns=2), Share, Share)
def test_generalised_advantages(batch: MaskedBatch, gamma: float, lam: float) -> None:
    (rewards, values), offsets, mask = batch
    for given_mask, own in ((mask, mask), (None, torch.ones_like(mask))):
        fast = advantages.gae(rewards, values, offsets, gamma, lam, given_mask)
        slow = oracle.gae(*lists(rewards, values, offsets), gamma, lam, own.tolist())
        check(fast[0], slow[0])
        check(fast[1], slow[1])


@given(masked_batches(columns=1), Share)
def test_rewards_to_go(batch: MaskedBatch, gamma: float) -> None:
    (rewards,), offsets, mask = batch
    for given_mask, own in ((mask, mask), (None, torch.ones_like(mask))):
        fast = advantages.rewards_to_go(rewards, offsets, gamma, given_mask)
        check(fast, oracle.rewards_to_go(*lists(rewards, offsets), gamma, own.tolist()))


@given(grouped_returns(), st.booleans())
def test_group_advantages(batch: tuple[Tensor, Tensor], scale: bool) -> None:
    check(advantages.group(*batch, scale), oracle.group(*lists(*batch), scale))


@given(grouped_returns(smallest=2))
def test_leave_one_out_advantages(batch: tuple[Tensor, Tensor]) -> None:
    check(advantages.leave_one_out(*batch), oracle.leave_one_out(*lists(*batch)))


@pytest.mark.parametrize("name", policy_loss.RATIOS)
@given(batch=batches(columns=2))
def test_log_ratios(name: str, batch: Batch) -> None:
    (logp, old), offsets = batch
    slow = getattr(oracle, f"{name}_log_ratio")(*lists(logp, old, offsets))
    check(policy_loss.RATIOS[name](logp, old, offsets), slow)


@pytest.mark.parametrize("dual", [None, 2.0])
@given(batch=batches(columns=2), low=st.floats(0.01, 0.99), high=st.floats(0.01, 2))
def test_policy_loss_and_its_gradient(dual: float | None, batch: Batch, low: float, high: float) -> None:
    (log_ratio, weights), _ = batch
    log_ratio.requires_grad_()
    fast = policy_loss.clipped(log_ratio, weights, low, high, dual)
    fast.loss.sum().backward()
    assert log_ratio.grad is not None
    pairs = zip(log_ratio.tolist(), weights.tolist(), strict=True)
    slow = list(zip(*(oracle.clipped(*pair, low, high, dual) for pair in pairs), strict=True)) or [()] * 5
    for column, expected in zip((*fast, log_ratio.grad), slow, strict=True):
        check(column.detach(), list(expected))


@given(batches(columns=3), st.floats(0.01, 2))
def test_value_loss(batch: Batch, clip: float) -> None:
    columns, _ = batch
    fast = value_loss.clipped(*columns, clip)
    slow = [oracle.clipped_value(*token, clip) for token in zip(*lists(*columns), strict=True)]
    for number, column in enumerate(fast):
        check(column, [token[number] for token in slow])


@pytest.mark.parametrize("kind", AGGREGATIONS)
@given(batch=batches(columns=1), longest=st.integers(7, 20))
def test_aggregations(kind: str, batch: Batch, longest: int) -> None:
    (losses,), offsets = batch
    weights = AGGREGATIONS[kind](offsets.diff().double(), longest)
    fast = (statistics.at_tokens(weights, offsets) * losses).sum()
    check(fast, oracle.aggregate(*lists(losses, offsets), kind, longest))


@pytest.mark.parametrize("level", correction.LEVELS)
@given(batch=batches(columns=2), low=Share, high=st.floats(1, 5))
def test_corrections(level: str, batch: Batch, low: float, high: float) -> None:
    (learner, sampler), offsets = batch
    log_weights = correction.log_weights(learner, sampler, offsets, level)
    slow = oracle.log_weights(*lists(learner, sampler, offsets), level)
    check(log_weights, slow)
    truncated = [oracle.truncate(value, high) for value in slow]
    masked = [oracle.mask(value, low, high) for value in slow]
    for number in range(2):
        check(correction.truncate(log_weights, high)[number], [token[number] for token in truncated])
        check(correction.mask(log_weights, low, high)[number], [token[number] for token in masked])


@given(st.lists(st.floats(0, 1e3).map(lambda x: round(x, 3)), max_size=20))
def test_effective_sample_share(weights: list[float]) -> None:
    fast = correction.effective_sample_share(torch.tensor(weights, dtype=torch.float64))
    check(fast, oracle.effective_sample_share(weights))


@given(st.integers(1, 450), st.integers(0, 2**31))
def test_gap(tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, tokens, generator=generator, dtype=torch.float64)
    for fast, slow in zip(correction.gap(*pair), oracle.gap(*lists(*pair)), strict=True):
        check(fast, slow)


@given(batches(columns=3), Share, st.sampled_from([0.0, 0.01]))
def test_bradley_terry(batch: Batch, margin: float, centre: float) -> None:
    (chosen, rejected, p), _ = batch
    p = p.sigmoid()
    pairs = list(zip(*lists(chosen, rejected, p), strict=True))
    soft = [oracle.bradley_terry(*pair, margin, centre) for pair in pairs]
    check(preference_loss.bradley_terry(chosen, rejected, p, margin, centre), soft)
    hard = [oracle.bradley_terry(one, other, 1.0, 0.0, centre) for one, other, _ in pairs]
    check(preference_loss.bradley_terry(chosen, rejected, centre=centre), hard)


@given(Pairs, st.sampled_from([1, 4, 8, 16]))
def test_preference_measures(pairs: list[tuple[float, float]], bins: int) -> None:
    probabilities, labels = torch.tensor(pairs, dtype=torch.float64).T
    for name in ("accuracy", "brier"):
        check(
            getattr(preference_loss, name)(probabilities, labels), getattr(oracle, name)(*lists(probabilities, labels))
        )
    fast = preference_loss.expected_calibration_error(probabilities, labels, bins)
    check(fast, oracle.expected_calibration_error(*lists(probabilities, labels), bins))


def test_returns_are_those_of_rllib() -> None:
    # Of episodes that all terminate, lying one after the other; RLlib keeps its targets in float32.
    from ray.rllib.utils.postprocessing.value_predictions import compute_value_targets

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (50,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    rewards, values = torch.randn(2, int(offsets[-1]), generator=generator)
    ends = np.zeros(len(rewards))
    ends[offsets[1:] - 1] = 1
    _, returns = advantages.gae(rewards, values, offsets, 0.97, 0.9)
    targets = compute_value_targets(values.numpy(), rewards.numpy(), ends, np.zeros(len(rewards)), 0.97, 0.9)
    torch.testing.assert_close(returns, torch.from_numpy(targets), rtol=1e-5, atol=1e-5)


@given(st.integers(0, 2**31), st.floats(0.1, 3))
def test_log_probabilities_and_entropies_are_those_of_torchs_categorical(seed: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(9, 13, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 13, (9,), generator=generator)
    theirs = Categorical(logits=logits / temperature)
    logp, entropy = logprobs_and_entropy(logits, tokens, temperature)
    torch.testing.assert_close(logp, theirs.log_prob(tokens), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(entropy, theirs.entropy(), rtol=1e-10, atol=1e-10)
