import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import batches, join, offsets_of, rows
from torch import Tensor

from rlhf_ray.algorithms.advantages import gae

Share = st.floats(0, 1)


def by_definition(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = sum_l (gamma lambda)^l delta_{t + l} for one sequence, term by term."""
    length = len(rewards)
    following = [*values[1:].tolist(), 0.0]
    deltas = [rewards[t].item() + gamma * following[t] - values[t].item() for t in range(length)]
    return torch.tensor(
        [sum((gamma * lam) ** (later - t) * deltas[later] for later in range(t, length)) for t in range(length)],
        dtype=torch.float64,
    )


def test_advantages_match_numbers_worked_by_hand() -> None:
    # gamma = lambda = 1/2. First sequence: V_2 = 0 after the end, so
    #   delta = (1 + 2/2 - 4, 3 + 0 - 2) = (-2, 1);  A = (-2 + 1/4, 1).  Second: delta = A = 5 - 1.
    rewards, values = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([4.0, 2.0, 1.0])
    advantages, returns = gae(rewards, values, torch.tensor([0, 2, 3]), 0.5, 0.5)
    assert advantages.tolist() == [-1.75, 1.0, 4.0]
    assert returns.tolist() == [2.25, 3.0, 5.0]


@given(batches(columns=2), Share, Share)
def test_advantages_equal_their_definition(batch: tuple[list[Tensor], Tensor], gamma: float, lam: float) -> None:
    (rewards, values), offsets = batch
    advantages, returns = gae(rewards, values, offsets, gamma, lam)
    pairs = zip(rows(rewards, offsets), rows(values, offsets), strict=True)
    torch.testing.assert_close(advantages, join([by_definition(r, v, gamma, lam) for r, v in pairs]))
    torch.testing.assert_close(returns, advantages + values)


@given(batches(columns=2), Share, Share, st.randoms(use_true_random=False))
def test_the_order_of_sequences_permutes_the_result_and_splitting_changes_nothing(
    batch: tuple[list[Tensor], Tensor], gamma: float, lam: float, shuffle: random.Random
) -> None:
    (rewards, values), offsets = batch
    whole = rows(gae(rewards, values, offsets, gamma, lam)[0], offsets)
    r, v = rows(rewards, offsets), rows(values, offsets)
    order = list(range(len(whole)))
    shuffle.shuffle(order)
    lengths = offsets_of([len(whole[row]) for row in order])
    permuted, _ = gae(join([r[row] for row in order]), join([v[row] for row in order]), lengths, gamma, lam)
    assert torch.equal(permuted, join([whole[row] for row in order]))
    alone = [gae(r[row], v[row], offsets_of([len(r[row])]), gamma, lam)[0] for row in order]
    assert torch.equal(join(alone), permuted)


def test_with_gamma_and_lambda_one_returns_are_the_rewards_to_go_whatever_the_values() -> None:
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0])
    _, returns = gae(rewards, torch.tensor([9.0, -3.0, 5.0, 7.0]), torch.tensor([0, 3, 4]), 1.0, 1.0)
    assert returns.tolist() == [7.0, 6.0, 4.0, 8.0]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_tokens_give_no_advantages(lengths: list[int]) -> None:
    advantages, returns = gae(torch.zeros(0), torch.zeros(0), offsets_of(lengths), 1.0, 0.95)
    assert advantages.shape == returns.shape == (0,)


def test_advantages_and_returns_are_constants_to_the_losses() -> None:
    values = torch.ones(3, requires_grad=True)
    advantages, returns = gae(torch.ones(3), values, torch.tensor([0, 3]), 1.0, 0.95)
    assert not advantages.requires_grad
    assert not returns.requires_grad
