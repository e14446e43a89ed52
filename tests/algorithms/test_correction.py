import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import batches
from torch import Tensor

from rlhf_ray.algorithms.correction import LEVELS, effective_sample_share, gap, log_weights, mask, truncate


def logs(*ratios: float) -> Tensor:
    return torch.tensor(ratios, dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("level", "weights"),
    [
        ("token", [2.0, 8.0, 3.0]),
        ("sequence", [16.0, 16.0, 3.0]),
        ("geometric", [4.0, 4.0, 3.0]),
    ],
)
def test_weights_of_each_level_match_numbers_worked_by_hand(level: str, weights: list[float]) -> None:
    # Two tokens, an empty sequence, one token. The learner finds them likelier than the sampler: the weight is above 1.
    sampler = torch.tensor([-5.0, -6.0, -7.0], dtype=torch.float64)
    learner = sampler + logs(2, 8, 3)
    assert log_weights(learner, sampler, torch.tensor([0, 2, 2, 3]), level).exp().tolist() == pytest.approx(weights)


def test_truncation_takes_the_cap_for_what_is_above_it() -> None:
    corrected = truncate(logs(0.1, 1, 1.9, 3, 100), cap=2.0)
    assert corrected.weights.tolist() == pytest.approx([0.1, 1, 1.9, 2, 2])
    assert corrected.clipped.tolist() == [False, False, False, True, True]


def test_masking_drops_what_is_outside_and_keeps_the_weight_inside() -> None:
    corrected = mask(logs(0.1, 0.6, 1, 4.9, 5.1), low=0.5, high=5.0)
    assert corrected.weights.tolist() == pytest.approx([0, 0.6, 1, 4.9, 0])
    assert corrected.clipped.tolist() == [True, False, False, False, True]


def test_a_mask_without_a_lower_bound_keeps_weights_of_zero() -> None:
    corrected = mask(torch.tensor([-1000.0, 0.0]), low=0.0, high=2.0)
    assert corrected.weights.tolist() == [0.0, 1.0]
    assert not corrected.clipped.any()


def test_the_weight_of_a_long_sequence_overflows_into_the_cap_or_the_mask() -> None:
    # 10,000 tokens half a nat apart: exp(5000) is infinite and exp(-5000) zero in any float.
    sampler, offsets = torch.zeros(10_000), torch.tensor([0, 10_000])
    for sign, capped in ((0.5, 2.0), (-0.5, 0.0)):
        log_weight = log_weights(torch.full((10_000,), sign), sampler, offsets, "sequence")
        assert truncate(log_weight, 2.0).weights.eq(capped).all()
        assert mask(log_weight, 0.5, 2.0).weights.eq(0).all()
        assert mask(log_weight, 0.5, 2.0).clipped.all()


def test_a_broken_log_probability_shows_and_is_not_masked_away() -> None:
    broken = torch.tensor([math.nan])
    assert mask(broken, 0.5, 5.0).weights.isnan().all()
    assert truncate(broken, 2.0).weights.isnan().all()


@pytest.mark.parametrize("level", LEVELS)
@given(batch=batches(columns=1))
def test_programs_that_agree_need_no_correction(level: str, batch: tuple[list[Tensor], Tensor]) -> None:
    (logp,), offsets = batch
    log_weight = log_weights(logp, logp.clone(), offsets, level)
    for corrected in (truncate(log_weight, 2.0), mask(log_weight, 0.5, 5.0)):
        assert corrected.weights.eq(1).all()
        assert not corrected.clipped.any()


@pytest.mark.parametrize("level", LEVELS)
def test_no_gradient_flows_through_a_weight(level: str) -> None:
    learner = torch.zeros(3, requires_grad=True)
    assert not log_weights(learner, torch.zeros(3), torch.tensor([0, 2, 3]), level).requires_grad
    assert not truncate(learner, 2.0).weights.requires_grad
    assert not mask(learner, 0.5, 5.0).weights.requires_grad
    assert not gap(learner, torch.zeros(3)).mean.requires_grad


@pytest.mark.parametrize(
    ("weights", "share"),
    [
        ([3.0, 3.0, 3.0, 3.0], 1.0),
        ([0.0, 0.0, 7.0, 0.0], 0.25),  # one token does all the work
        ([1.0, 3.0], 16 / 20),
        ([0.0, 0.0], 0.0),
        ([], 0.0),
        ([1e-30, 3e-30], 16 / 20),  # whose squares are zero in float32
        ([1e30, 3e30], 16 / 20),  # whose squares are infinite
    ],
)
def test_effective_sample_share_matches_numbers_worked_by_hand(weights: list[float], share: float) -> None:
    assert effective_sample_share(torch.tensor(weights)).item() == pytest.approx(share)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=20).filter(any))
def test_effective_sample_share_lies_between_one_token_and_all(weights: list[float]) -> None:
    share = effective_sample_share(torch.tensor(weights, dtype=torch.float64)).item()
    assert 1 / len(weights) - 1e-12 <= share <= 1 + 1e-12


def test_the_gap_has_mean_99th_percentile_and_maximum_of_the_distance() -> None:
    # Distances 0.01, 0.02, ..., 2.00 of either sign: mean 1.005; 198 of 200 are at most 1.98.
    apart = torch.arange(1, 201, dtype=torch.float64) / 100
    apart[::2] *= -1
    measured = gap(apart.flip(0) - 3, torch.full((200,), -3.0, dtype=torch.float64))
    assert [value.item() for value in measured] == pytest.approx([1.005, 1.98, 2.0])


def test_a_gap_of_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        gap(torch.zeros(0), torch.zeros(0))


def test_a_weight_at_its_bound_is_the_ratio_itself() -> None:
    one = torch.zeros(1)
    for corrected in (truncate(one, 1.0), mask(one, 1.0, 2.0), mask(one, 0.5, 1.0)):
        assert corrected.weights.item() == 1
        assert not corrected.clipped.item()
