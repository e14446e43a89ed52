import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import batches
from torch import Tensor

from rlhf_ray.algorithms.value_loss import clipped


@pytest.mark.parametrize(
    ("value", "target", "loss", "is_clipped", "gradient"),
    [
        # Old value 0, clip 0.2.
        (0.1, 1.0, 0.405, False, -0.9),  # inside: plain squared error
        (0.5, 1.0, 0.32, True, 0.0),  # moved towards the return by more than the clip: (0.2 - 1)^2 / 2
        (-0.5, 1.0, 1.125, False, -1.5),  # moved away: the plain error is the greater
        (0.5, 0.0, 0.125, False, 0.5),  # overshot: pulled back
    ],
)
def test_loss_and_gradient_inside_and_outside_the_clip(
    value: float, target: float, loss: float, is_clipped: bool, gradient: float
) -> None:
    values = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    result = clipped(values, torch.zeros(1, dtype=torch.float64), torch.tensor([target], dtype=torch.float64), 0.2)
    result.loss.sum().backward()
    assert result.loss.item() == pytest.approx(loss)
    assert result.clipped.item() is is_clipped
    assert values.grad is not None
    assert values.grad.item() == pytest.approx(gradient)


@given(batches(columns=3))
def test_every_column_equals_a_loop_over_tokens(batch: tuple[list[Tensor], Tensor]) -> None:
    (values, old, returns), _ = batch
    result = clipped(values, old, returns, 0.4)
    for token, (value, before, target) in enumerate(zip(values.tolist(), old.tolist(), returns.tolist(), strict=True)):
        bound = min(max(value, before - 0.4), before + 0.4)
        assert result.loss[token].item() == pytest.approx(max((value - target) ** 2, (bound - target) ** 2) / 2)
        assert result.clipped[token].item() is ((bound - target) ** 2 > (value - target) ** 2)


@given(st.integers(0, 2**31))
def test_rounding_never_counts_as_clipping(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    old, returns = torch.randn(2, 100, generator=generator)
    values = old + 0.19 * (2 * torch.rand(100, generator=generator) - 1)
    assert not clipped(values, old, returns, 0.2).clipped.any()


def test_only_the_loss_carries_gradients() -> None:
    result = clipped(torch.zeros(2, requires_grad=True), torch.zeros(2), torch.ones(2), 0.2)
    assert [column.requires_grad for column in result] == [True, False]
