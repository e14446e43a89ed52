import math

import pytest
import torch
from hypothesis import given
from ragged import batches, rows
from torch import Tensor

from rlhf_ray.algorithms.statistics import at_tokens, sequence_means, sequence_sums, whiten


def test_whitening_divides_by_the_deviation_without_bessels_correction() -> None:
    # Mean 3, squared deviations 4, 0, 4: variance 8/3 (with Bessel's correction it would be 4).
    expected = [-2 / math.sqrt(8 / 3), 0.0, 2 / math.sqrt(8 / 3)]
    x = torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64)
    assert whiten(x).tolist() == pytest.approx(expected, abs=1e-8)
    assert whiten(x, keep_mean=True).tolist() == pytest.approx([3 + value for value in expected], abs=1e-8)


@pytest.mark.parametrize("x", [torch.full((5,), 7.0), torch.tensor([7.0])])
def test_constant_input_is_whitened_to_zeros(x: Tensor) -> None:
    assert whiten(x).eq(0).all()
    assert whiten(x, keep_mean=True).eq(7).all()


def test_the_epsilon_stands_inside_the_root() -> None:
    # Variance 1e-8 as large as the epsilon: 1e-4 / sqrt(2e-8), not 1e-4 / (1e-4 + 1e-8).
    x = torch.tensor([-1e-4, 1e-4], dtype=torch.float64)
    assert whiten(x)[1].item() == pytest.approx(1 / math.sqrt(2))


@given(batches(columns=1))
def test_sums_equal_a_loop_over_sequences_of_which_some_are_empty(batch: tuple[list[Tensor], Tensor]) -> None:
    (x,), offsets = batch
    expected = torch.tensor([sum(row.tolist()) for row in rows(x, offsets)], dtype=torch.float64)
    torch.testing.assert_close(sequence_sums(x, offsets), expected)


def test_means_divide_by_each_length_and_an_empty_sequence_has_none() -> None:
    means = sequence_means(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 2, 3])).tolist()
    assert means[0] == 1.5
    assert math.isnan(means[1])
    assert means[2] == 4.0


def test_gradients_flow_back_to_the_tokens_of_each_sequence() -> None:
    x = torch.ones(3, requires_grad=True)
    (sequence_sums(x, torch.tensor([0, 2, 3])) * torch.tensor([5.0, 7.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [5.0, 5.0, 7.0]


def test_a_sequences_value_stands_at_each_of_its_tokens_and_takes_the_gradient_of_all() -> None:
    x = torch.tensor([5.0, 6.0, 7.0], requires_grad=True)
    spread = at_tokens(x, torch.tensor([0, 2, 2, 3]))
    assert spread.tolist() == [5.0, 5.0, 7.0]
    (spread * torch.tensor([1.0, 2.0, 4.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [3.0, 0.0, 4.0]
