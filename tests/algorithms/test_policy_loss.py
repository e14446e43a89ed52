import math

import pytest
import torch
from hypothesis import given
from ragged import batches
from torch import Tensor

from rlhf_ray.algorithms.policy_loss import clipped


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "is_clipped", "gradient"),
    [
        (1.5, 1.0, -1.2, True, 0.0),  # has moved far enough towards a good token
        (1.5, -1.0, 1.5, False, 1.5),  # a bad token grew likelier: pull it back with full force
        (0.5, 1.0, -0.5, False, -0.5),  # a good token grew rarer
        (0.5, -1.0, 0.8, True, 0.0),  # has moved far enough away from a bad token
        (1.1, 2.0, -2.2, False, -2.2),  # inside the interval
        (0.9, -2.0, 1.8, False, 1.8),
        (1.0, 3.0, -3.0, False, -3.0),  # both terms equal: the whole gradient, not half
        (1.5, 0.0, 0.0, False, 0.0),
    ],
)
def test_loss_and_gradient_on_each_side_of_the_clip(
    ratio: float, advantage: float, loss: float, is_clipped: bool, gradient: float
) -> None:
    logp = torch.tensor([math.log(ratio) - 2.0], dtype=torch.float64, requires_grad=True)
    result = clipped(logp, torch.tensor([-2.0], dtype=torch.float64), torch.tensor([advantage]), 0.2)
    result.loss.sum().backward()
    assert result.loss.item() == pytest.approx(loss)
    assert result.ratio.item() == pytest.approx(ratio)
    assert result.clipped.item() is is_clipped
    assert logp.grad is not None
    assert logp.grad.item() == pytest.approx(gradient)


def test_first_minibatch_has_ratio_one_no_kl_and_nothing_clipped() -> None:
    logp = torch.linspace(-20, 0, 100)
    result = clipped(logp, logp.clone(), torch.linspace(-3, 3, 100), 0.2)
    assert result.ratio.eq(1).all()
    assert result.approx_kl.eq(0).all()
    assert not result.clipped.any()
    assert torch.equal(result.loss, -torch.linspace(-3, 3, 100))


@given(batches(columns=3))
def test_every_column_equals_a_loop_over_tokens(batch: tuple[list[Tensor], Tensor]) -> None:
    (logp, old, advantages), _ = batch
    result = clipped(logp, old, advantages, 0.3)
    for token, (new, before, advantage) in enumerate(zip(logp, old, advantages, strict=True)):
        ratio = math.exp(new.item() - before.item())
        free, bound = ratio * advantage.item(), min(max(ratio, 0.7), 1.3) * advantage.item()
        assert result.loss[token].item() == pytest.approx(-min(free, bound))
        assert result.clipped[token].item() is (bound < free)
        assert result.ratio[token].item() == pytest.approx(ratio)
        assert result.approx_kl[token].item() == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-12)


def test_approximate_kl_is_that_of_the_old_policy_to_the_new() -> None:
    old, new = torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)
    result = clipped(new, old, torch.zeros(50), 0.2)
    exact = (old.exp() * (old - new)).sum()
    torch.testing.assert_close((old.exp() * result.approx_kl).sum(), exact)
    assert (result.approx_kl >= 0).all()


def test_only_the_loss_carries_gradients() -> None:
    result = clipped(torch.zeros(2, requires_grad=True), torch.zeros(2), torch.ones(2), 0.2)
    assert [column.requires_grad for column in result] == [True, False, False, False]


def test_splitting_a_batch_changes_no_gradient() -> None:
    logp, old, advantages = torch.randn(3, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, parts = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    (clipped(whole, old, advantages, 0.2).loss.sum() / 10).backward()
    for part in (slice(0, 3), slice(3, 10)):
        (clipped(parts[part], old[part], advantages[part], 0.2).loss.sum() / 10).backward()
    assert whole.grad is not None
    assert parts.grad is not None
    assert torch.equal(whole.grad, parts.grad)
