import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import batches, join, rows
from torch import Tensor

from rlhf_ray.algorithms.policy_loss import RATIOS, clipped, sequence_log_ratio, token_log_ratio


def log(ratio: float) -> Tensor:
    return torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "is_clipped", "gradient"),
    [
        (1.5, 1.0, -1.28, True, 0.0),  # has moved far enough towards a good token
        (1.5, -1.0, 1.5, False, 1.5),  # a bad token grew likelier: pull it back with full force
        (0.5, 1.0, -0.5, False, -0.5),  # a good token grew rarer
        (0.5, -1.0, 0.8, True, 0.0),  # has moved far enough away from a bad token
        (1.25, 2.0, -2.5, False, -2.5),  # inside the interval, though outside the one of 0.2 on both sides
        (1.25, -2.0, 2.5, False, 2.5),
        (0.75, -2.0, 1.6, True, 0.0),  # outside the interval, though inside the one of 0.28 on both sides
        (1.0, 3.0, -3.0, False, -3.0),  # both terms equal: the whole gradient, not half
        (1.5, 0.0, 0.0, False, 0.0),
    ],
)
def test_loss_and_gradient_on_each_side_of_an_asymmetric_clip(
    ratio: float, advantage: float, loss: float, is_clipped: bool, gradient: float
) -> None:
    log_ratio = log(ratio)
    result = clipped(log_ratio, torch.tensor([advantage]), 0.2, 0.28)
    result.loss.sum().backward()
    assert result.loss.item() == pytest.approx(loss)
    assert result.ratio.item() == pytest.approx(ratio)
    assert result.clipped.item() is is_clipped
    assert log_ratio.grad is not None
    assert log_ratio.grad.item() == pytest.approx(gradient)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "is_clipped", "gradient"),
    [
        (5.0, -2.0, 6.0, True, 0.0),  # 3 times the advantage, though the ratio would make it 5
        (2.5, -2.0, 5.0, False, 5.0),  # below the bound
        (0.5, -2.0, 1.6, True, 0.0),  # the other clip is as it was
        (5.0, 2.0, -2.4, True, 0.0),  # and so are good tokens
    ],
)
def test_a_dual_clip_bounds_what_a_bad_token_costs(
    ratio: float, advantage: float, loss: float, is_clipped: bool, gradient: float
) -> None:
    log_ratio = log(ratio)
    result = clipped(log_ratio, torch.tensor([advantage]), 0.2, 0.2, dual=3.0)
    result.loss.sum().backward()
    assert result.loss.item() == pytest.approx(loss)
    assert result.clipped.item() is is_clipped
    assert log_ratio.grad is not None
    assert log_ratio.grad.item() == pytest.approx(gradient)


@pytest.mark.parametrize(("advantage", "dual"), [(1.0, None), (0.0, None), (1.0, 3.0), (0.0, 3.0), (-1.0, 3.0)])
def test_a_ratio_that_overflows_is_clipped_without_a_trace_in_the_gradient(
    advantage: float, dual: float | None
) -> None:
    log_ratio = torch.tensor([1000.0], requires_grad=True)
    result = clipped(log_ratio, torch.tensor([advantage]), 0.2, 0.2, dual)
    result.loss.sum().backward()
    bound = {1.0: -1.2, 0.0: 0.0, -1.0: 3.0}[advantage]
    assert result.loss.item() == pytest.approx(bound)
    assert log_ratio.grad is not None
    assert log_ratio.grad.item() == 0
    assert result.ratio.item() == result.approx_kl.item() == math.inf


def test_without_a_dual_clip_a_bad_tokens_overflow_is_infinite_and_not_nan() -> None:
    log_ratio = torch.tensor([1000.0], requires_grad=True)
    result = clipped(log_ratio, torch.tensor([-1.0]), 0.2, 0.2)
    result.loss.sum().backward()
    assert result.loss.item() == math.inf
    assert log_ratio.grad is not None
    assert log_ratio.grad.item() == math.inf


@pytest.mark.parametrize("place", ["log_ratio", "advantage"])
def test_what_is_not_a_number_stays_so(place: str) -> None:
    log_ratio = torch.tensor([math.nan if place == "log_ratio" else 5.0])
    advantages = torch.tensor([math.nan if place == "advantage" else 1.0])
    assert clipped(log_ratio, advantages, 0.2, 0.2, 3.0).loss.isnan().all()


@pytest.mark.parametrize("kind", RATIOS)
def test_first_minibatch_has_ratio_one_no_kl_and_nothing_clipped(kind: str) -> None:
    logp = torch.linspace(-20, 0, 100)
    log_ratio = RATIOS[kind](logp, logp.clone(), torch.tensor([0, 37, 37, 100]))
    result = clipped(log_ratio, torch.linspace(-3, 3, 100), 3e-4, 4e-4, 3.0)
    assert result.ratio.eq(1).all()
    assert result.approx_kl.eq(0).all()
    assert not result.clipped.any()
    assert torch.equal(result.loss, -torch.linspace(-3, 3, 100))


@given(batches(columns=2), st.floats(1.1, 5))
def test_a_dual_clip_never_raises_a_loss_and_only_touches_bad_tokens(
    batch: tuple[list[Tensor], Tensor], dual: float
) -> None:
    (log_ratio, advantages), _ = batch
    plain, bounded = clipped(log_ratio, advantages, 0.2, 0.3), clipped(log_ratio, advantages, 0.2, 0.3, dual)
    assert (bounded.loss <= plain.loss).all()
    good = advantages >= 0
    assert torch.equal(bounded.loss[good], plain.loss[good])
    assert (bounded.loss <= dual * advantages.abs() * (1 + 1e-12)).all()


def test_approximate_kl_is_that_of_the_old_policy_to_the_new() -> None:
    old, new = torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)
    result = clipped(new - old, torch.zeros(50), 0.2, 0.2)
    exact = (old.exp() * (old - new)).sum()
    torch.testing.assert_close((old.exp() * result.approx_kl).sum(), exact)
    assert (result.approx_kl >= 0).all()


def test_only_the_loss_carries_gradients() -> None:
    result = clipped(torch.zeros(2, requires_grad=True), torch.ones(2), 0.2, 0.2, 3.0)
    assert [column.requires_grad for column in result] == [True, False, False, False]


def test_the_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens() -> None:
    # Ratios 2 and 8, so 4 at both; then an empty sequence; then 3.
    old = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)
    logp = old + torch.tensor([2.0, 8.0, 3.0], dtype=torch.float64).log()
    offsets = torch.tensor([0, 2, 2, 3])
    assert sequence_log_ratio(logp, old, offsets).exp().tolist() == pytest.approx([4.0, 4.0, 3.0])
    assert token_log_ratio(logp, old, offsets).exp().tolist() == pytest.approx([2.0, 8.0, 3.0])


def test_the_gradient_of_a_sequences_ratio_reaches_all_its_tokens_alike_and_no_others() -> None:
    # s = 1 and A = (1, 2, 5) at tokens of sequences of 2 and 1: d loss / d logp = -(1 + 2) / 2 at either, and -5.
    logp = torch.zeros(3, requires_grad=True)
    offsets = torch.tensor([0, 2, 2, 3])
    log_ratio = sequence_log_ratio(logp, torch.zeros(3), offsets)
    clipped(log_ratio, torch.tensor([1.0, 2.0, 5.0]), 0.2, 0.2).loss.sum().backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == [-1.5, -1.5, -5.0]


@pytest.mark.parametrize("kind", RATIOS)
@given(batch=batches(columns=2), data=st.data())
def test_the_order_of_sequences_does_not_matter(
    kind: str, batch: tuple[list[Tensor], Tensor], data: st.DataObject
) -> None:
    (logp, old), offsets = batch
    order = data.draw(st.permutations(range(len(offsets) - 1)))
    lengths = offsets.diff()[torch.tensor(order, dtype=torch.int64)]
    moved = torch.cat([offsets[:1], lengths.cumsum(0)])
    one, other = ([rows(column, offsets)[row] for row in order] for column in (logp, old))
    whole = rows(RATIOS[kind](logp, old, offsets), offsets)
    torch.testing.assert_close(RATIOS[kind](join(one), join(other), moved), join([whole[row] for row in order]))
