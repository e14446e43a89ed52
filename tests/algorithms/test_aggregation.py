import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import batches, rows
from torch import Tensor

from rlhf_ray.algorithms.aggregation import AGGREGATIONS, constant, sequence_mean, token_mean
from rlhf_ray.algorithms.policy_loss import RATIOS, clipped
from rlhf_ray.algorithms.statistics import at_tokens

FEATURES, VOCABULARY, LONGEST = 4, 6, 10


def test_weights_match_numbers_worked_by_hand() -> None:
    lengths = torch.tensor([1, 4, 3])
    assert token_mean(lengths).tolist() == pytest.approx([1 / 8] * 3)
    assert sequence_mean(lengths).tolist() == pytest.approx([1 / 3, 1 / 12, 1 / 9])
    assert constant(lengths, 5).tolist() == pytest.approx([1 / 15] * 3)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_a_sequence_without_tokens_weighs_nothing_and_changes_no_other_weight(name: str) -> None:
    without = AGGREGATIONS[name](torch.tensor([2, 5]), LONGEST)
    weights = AGGREGATIONS[name](torch.tensor([0, 2, 0, 5]), LONGEST)
    assert weights.tolist() == [0.0, without[0], 0.0, without[1]]


@pytest.mark.parametrize("name", AGGREGATIONS)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_a_minibatch_without_tokens_has_weights_of_zero(name: str, lengths: list[int]) -> None:
    assert AGGREGATIONS[name](torch.tensor(lengths, dtype=torch.int64), LONGEST).tolist() == [0.0] * len(lengths)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_weights_have_the_lengths_precision(name: str) -> None:
    assert AGGREGATIONS[name](torch.tensor([3, 7]), LONGEST).dtype == torch.float32
    assert AGGREGATIONS[name](torch.tensor([3.0, 7.0], dtype=torch.float64), LONGEST).dtype == torch.float64


@given(st.lists(st.integers(0, 10), min_size=1, max_size=8).filter(any))
def test_the_two_means_are_means_of_any_constant(lengths: list[int]) -> None:
    for aggregate in (token_mean, sequence_mean):
        assert (aggregate(torch.tensor(lengths)) * torch.tensor(lengths)).sum().item() == pytest.approx(1)


class Minibatch:
    """Sequences of a softmax policy that is linear in its features, and the gradient of the loss of some of them."""

    def __init__(self, noise: list[Tensor], offsets: Tensor) -> None:
        *features, choice, advantages, drift = noise
        self.offsets = offsets
        self.features = torch.stack(features, dim=1)
        self.tokens = (choice.abs() * 100).long() % VOCABULARY
        self.advantages = advantages
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(VOCABULARY, FEATURES, generator=generator, dtype=torch.float64)
        self.old = self.logprobs(self.weight, self.features, self.tokens) + 0.3 * drift

    @staticmethod
    def logprobs(weight: Tensor, features: Tensor, tokens: Tensor) -> Tensor:
        return (features @ weight.T).log_softmax(-1).gather(1, tokens[:, None])[:, 0]

    def gradient(self, part: list[int], weights: Tensor, ratio: str) -> Tensor:
        """Of the parameters, [V, H], from the sequences `part` alone; weights [B] of all."""
        columns = (self.features, self.tokens, self.old, self.advantages)
        features, tokens, old, advantages = (
            torch.cat([column[:0], *(rows(column, self.offsets)[row] for row in part)]) for column in columns
        )
        lengths = self.offsets.diff()[part]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        weight = self.weight.clone().requires_grad_()
        log_ratio = RATIOS[ratio](self.logprobs(weight, features, tokens), old, offsets)
        loss = clipped(log_ratio, advantages, 0.2, 0.28, 3.0).loss
        (at_tokens(weights[part], offsets) * loss).sum().backward()
        assert weight.grad is not None
        return weight.grad


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", AGGREGATIONS)
@given(batch=batches(columns=FEATURES + 3), data=st.data())
def test_no_split_into_ranks_and_micro_batches_changes_the_gradient(
    name: str, ratio: str, batch: tuple[list[Tensor], Tensor], data: st.DataObject
) -> None:
    minibatch = Minibatch(*batch)
    lengths = minibatch.offsets.diff()
    weights = AGGREGATIONS[name](lengths.double(), LONGEST)
    whole = minibatch.gradient(list(range(len(lengths))), weights, ratio)
    # Which pass of which rank takes a sequence, in any order; some take none.
    order = data.draw(st.permutations(range(len(lengths))))
    passes = [data.draw(st.integers(0, 3)) for _ in order]
    parts = [[row for row, taken in zip(order, passes, strict=True) if taken == number] for number in range(4)]
    split = torch.stack([minibatch.gradient(part, weights, ratio) for part in parts]).sum(0)
    assert (split - whole).norm() <= 1e-6 * whole.norm()


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_a_single_token_weighs_one_where_an_answer_may_have_no_more(name: str) -> None:
    assert AGGREGATIONS[name](torch.tensor([1]), 1).tolist() == [1.0]
