import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import batches, grouped_returns, join, masked_batches, offsets_of, rows
from torch import Tensor

from rlhf_ray.algorithms.advantages import gae, group, leave_one_out, rewards_to_go

Share = st.floats(0, 1)


def test_advantages_match_numbers_worked_by_hand() -> None:
    # gamma = lambda = 1/2. First sequence: V_2 = 0 after the end, so
    #   delta = (1 + 2/2 - 4, 3 + 0 - 2) = (-2, 1);  A = (-2 + 1/4, 1).  Second: delta = A = 5 - 1.
    rewards, values = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([4.0, 2.0, 1.0])
    advantages, returns = gae(rewards, values, torch.tensor([0, 2, 3]), 0.5, 0.5)
    assert advantages.tolist() == [-1.75, 1.0, 4.0]
    assert returns.tolist() == [2.25, 3.0, 5.0]


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


def test_a_turn_of_the_users_neither_discounts_nor_bootstraps_and_its_reward_is_the_last_answers() -> None:
    # The policy's tokens are at 1, 2 and 4. The reward 8 at place 0 has no token of the policy's before it; 4 at place
    # 3 is earned by place 2, and 2 at place 5 by place 4. So r = (0, 4, 2), V = (2, 4, 6), and with gamma = lambda =
    # 1/2: delta = (0 + 4/2 - 2, 4 + 6/2 - 4, 2 - 6) = (0, 3, -4);  A = (0 + 2/4, 3 - 4/4, -4) = (0.5, 2, -4).
    mask = torch.tensor([False, True, True, False, True, False])
    rewards = torch.tensor([8.0, 0.0, 0.0, 4.0, 0.0, 2.0])
    values = torch.tensor([9.0, 2.0, 4.0, 9.0, 6.0, 9.0])
    advantages, returns = gae(rewards, values, torch.tensor([0, 6]), 0.5, 0.5, mask)
    assert advantages.tolist() == [0.0, 0.5, 2.0, 0.0, -4.0, 0.0]
    assert returns.tolist() == [0.0, 2.5, 6.0, 0.0, 2.0, 0.0]


def test_a_reward_before_the_policys_first_token_is_not_the_previous_sequences() -> None:
    mask = torch.tensor([True, False, True, False])
    _, returns = gae(torch.tensor([1.0, 8.0, 2.0, 4.0]), torch.zeros(4), torch.tensor([0, 1, 4]), 1.0, 1.0, mask)
    assert returns.tolist() == [1.0, 0.0, 6.0, 0.0]


@given(masked_batches(columns=2), Share, Share)
def test_values_at_other_peoples_tokens_change_nothing_even_if_they_are_not_numbers(
    batch: tuple[list[Tensor], Tensor, Tensor], gamma: float, lam: float
) -> None:
    (rewards, values), offsets, mask = batch
    broken = values.masked_fill(~mask, math.nan)
    for one, other in zip(
        gae(rewards, values, offsets, gamma, lam, mask), gae(rewards, broken, offsets, gamma, lam, mask), strict=True
    ):
        assert torch.equal(one, other)
        assert not one[~mask].any()


@given(batches(columns=2), Share, Share)
def test_a_mask_of_all_tokens_is_no_mask(batch: tuple[list[Tensor], Tensor], gamma: float, lam: float) -> None:
    (rewards, values), offsets = batch
    whole = torch.ones(len(rewards), dtype=torch.bool)
    assert torch.equal(
        gae(rewards, values, offsets, gamma, lam)[0], gae(rewards, values, offsets, gamma, lam, whole)[0]
    )


def test_a_long_sequence_in_float32_keeps_its_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 20_000, generator=generator)
    offsets = torch.tensor([0, 3, 20_000])
    single, _ = gae(rewards, values, offsets, 1.0, 0.999)
    double, _ = gae(rewards.double(), values.double(), offsets, 1.0, 0.999)
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-4)


def test_rewards_to_go_match_numbers_worked_by_hand() -> None:
    # gamma = 1/2: 4, then 2 + 4/2, then 1 + 4/2.
    rewards, offsets = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 3, 4])
    assert rewards_to_go(rewards, offsets, 0.5).tolist() == [3.0, 4.0, 4.0, 8.0]
    # Without the second token its reward is the first's, which then stands one step before the third.
    mask = torch.tensor([True, False, True, True])
    assert rewards_to_go(rewards, offsets, 0.5, mask).tolist() == [5.0, 0.0, 4.0, 8.0]


def test_group_advantages_match_numbers_worked_by_hand() -> None:
    # Group 7: 0, 1, 2, 5, mean 2, squared deviations 4 + 1 + 0 + 9 = 14, sample variance 14 / 3. Group -1: 1 and 3,
    # mean 2, sample variance 2 (the population's would be 1).
    returns = torch.tensor([0.0, 1.0, 1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
    groups = torch.tensor([7, -1, 7, 7, -1, 7])
    centred = [-2.0, -1.0, -1.0, 0.0, 1.0, 3.0]
    sd = [math.sqrt(14 / 3) if name == 7 else math.sqrt(2) for name in groups.tolist()]
    assert group(returns, groups, scale=False).tolist() == centred
    scaled = [value / (deviation + 1e-6) for value, deviation in zip(centred, sd, strict=True)]
    assert group(returns, groups, scale=True).tolist() == pytest.approx(scaled, rel=1e-12)


def test_leave_one_out_matches_numbers_worked_by_hand() -> None:
    # Group 7: 0, 1, 2, 5; the others' means are 8/3, 7/3, 6/3 and 3/3. Group -1: 1 against 3.
    advantages = leave_one_out(
        torch.tensor([0.0, 1.0, 1.0, 2.0, 3.0, 5.0], dtype=torch.float64), torch.tensor([7, -1, 7, 7, -1, 7])
    )
    assert advantages.tolist() == pytest.approx([-8 / 3, -2.0, -4 / 3, 0.0, 2.0, 4.0])


@pytest.mark.parametrize("value", [0.1, -1e6 - 0.3, 1e-30])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_answers_that_all_score_alike_have_advantages_of_exactly_zero(size: int, value: float) -> None:
    # In float32 the mean of three times 0.1 is not 0.1, and the deviation, as small, would make it 0.007.
    returns = torch.cat([torch.full((size,), value), torch.tensor([1.0, 2.0])])
    groups = torch.tensor([3] * size + [4, 4])
    for scale in (True, False):
        assert group(returns, groups, scale)[:size].eq(0).all()
    if size > 1:
        assert leave_one_out(returns, groups)[:size].eq(0).all()


def test_a_group_of_one_is_refused_by_leave_one_out_and_named() -> None:
    with pytest.raises(ValueError, match=r"groups \[-4, 12\] have a single member"):
        leave_one_out(torch.zeros(4), torch.tensor([12, 5, -4, 5]))


@given(grouped_returns(smallest=2), st.floats(-10, 10), st.floats(0.1, 10))
def test_shifting_a_groups_returns_changes_nothing_and_scaling_them_only_what_is_not_scaled(
    batch: tuple[Tensor, Tensor], shift: float, factor: float
) -> None:
    # Eighths: what spreads at all spreads by enough for the epsilon to be small beside it.
    returns, groups = (8 * batch[0]).round() / 8, batch[1]
    moved = factor * (returns + shift * (groups % 5))
    for estimate in (leave_one_out, lambda *given: group(*given, scale=False)):
        torch.testing.assert_close(estimate(moved, groups), factor * estimate(returns, groups))
    torch.testing.assert_close(group(moved, groups, True), group(returns, groups, True), rtol=1e-3, atol=1e-6)


@given(grouped_returns(smallest=2), st.randoms(use_true_random=False))
def test_the_order_of_answers_and_the_names_of_groups_do_not_matter(
    batch: tuple[Tensor, Tensor], shuffle: random.Random
) -> None:
    returns, groups = batch
    order = list(range(len(groups)))
    shuffle.shuffle(order)
    for estimate in (leave_one_out, lambda *given: group(*given, scale=True)):
        torch.testing.assert_close(estimate(returns[order], 3 - groups[order]), estimate(returns, groups)[order])


@given(grouped_returns(smallest=2))
def test_advantages_of_a_group_sum_to_zero_and_leave_one_out_is_the_larger_by_n_over_n_minus_one(
    batch: tuple[Tensor, Tensor],
) -> None:
    returns, groups = batch
    for name in groups.unique():
        members = groups == name
        size = int(members.sum())
        centred, left = group(returns, groups, False)[members], leave_one_out(returns, groups)[members]
        assert centred.sum().item() == pytest.approx(0, abs=1e-12)
        torch.testing.assert_close(left, centred * size / (size - 1))


def test_no_answers_give_no_advantages() -> None:
    nobody, nothing = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    assert group(nothing, nobody, True).shape == leave_one_out(nothing, nobody).shape == (0,)


def test_advantages_within_a_group_are_constants_to_the_losses() -> None:
    returns, groups = torch.tensor([1.0, 2.0], requires_grad=True), torch.zeros(2, dtype=torch.int64)
    assert not group(returns, groups, True).requires_grad
    assert not leave_one_out(returns, groups).requires_grad


def test_what_is_made_on_the_way_stands_on_the_device_of_the_arguments() -> None:
    # The device by default has no memory here: a tensor left to it could not meet those given.
    rewards, offsets = torch.ones(3), torch.tensor([0, 2, 3])
    with torch.device("meta"):
        advantages, _ = gae(rewards, rewards, offsets, 1.0, 1.0, rewards > 0)
    assert advantages.tolist() == [1.0, 0.0, 0.0]
