"""Implicit Q-learning: each term against loops over tokens, and all of them together on problems whose answer is known.

Problems are data sets of trajectories of (state, action, reward); states and actions are numbers, and the next state of
a trajectory's last action does not exist.
"""

import math
import random
from collections.abc import Callable
from itertools import chain

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import batches, join, offsets_of, rows
from torch import Tensor

from rlhf_ray.algorithms.q_learning import (
    awac_loss,
    conservative_loss,
    decode_scores,
    expectile_loss,
    polyak,
    td_loss,
    td_target,
)

Batch = tuple[list[Tensor], Tensor]
Share = st.floats(0, 1)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Each term, by hand and by loops


def test_the_last_tokens_reward_reaches_the_tokens_before_it_through_the_next_states_value() -> None:
    # Two answers, of three tokens and of one; rewards stand at their last tokens.
    target = td_target(doubles(0, 0, 8, 5), doubles(1, 2, 4, 16), torch.tensor([0, 3, 4]), 0.5)
    assert target.tolist() == [0.5 * 2, 0.5 * 4, 8, 5]  # neither the 16 of the next answer nor anything after it


def test_a_reward_on_the_way_counts_where_it_stands() -> None:
    assert td_target(doubles(3, 1), doubles(7, 2), torch.tensor([0, 2]), 0.5).tolist() == [3 + 1, 1]


def test_terms_match_numbers_worked_by_hand() -> None:
    assert td_loss(doubles(1, 4, 5, 4).view(2, 2), doubles(3, 3)).tolist() == [4 + 4, 1 + 1]
    assert expectile_loss(doubles(1, 3), doubles(3, 1), 0.75).tolist() == [0.75 * 4, 0.25 * 4]
    q = doubles(0, math.log(3), 2, 2).view(2, 2)
    assert conservative_loss(q, torch.tensor([1, 0])).tolist() == pytest.approx([math.log(4 / 3), math.log(2)])
    # Weights exp(2 (1 - 1)) and exp(2 (2 - 1)).
    assert awac_loss(doubles(-3, -3), doubles(1, 1), doubles(1, 2), 2.0).tolist() == pytest.approx([3, 3 * math.e**2])
    assert polyak(doubles(1, 0), doubles(3, 4), 0.25).tolist() == [1.5, 1]


def test_decoding_adds_the_advantage_by_the_smaller_of_two_heads_to_the_log_probabilities() -> None:
    logits, target_q = doubles(0, 0), torch.stack([doubles(3, 5), doubles(4, 1)])
    scores = decode_scores(logits, target_q, doubles(1)[0], 0.5)
    assert scores.tolist() == pytest.approx([0.5 * 2 - math.log(2), -math.log(2)])
    assert decode_scores(logits[None], target_q[:, None], doubles(1), 0.5).tolist() == [scores.tolist()]
    assert torch.equal(decode_scores(logits, target_q, doubles(1)[0], 0), logits.log_softmax(-1))


@given(batches(columns=5, shortest=1), Share, Share, st.floats(-2, 2))
def test_every_term_is_the_loop_of_its_formula(batch: Batch, gamma: float, tau: float, beta: float) -> None:
    (rewards, values, logprobs, first, second), offsets = batch
    q, target_q = torch.stack([first, second]), torch.minimum(first, second) / 2
    target = td_target(rewards, values, offsets, gamma)
    columns = [column.tolist() for column in (rewards, values, logprobs, first, second, target_q)]
    expected = oracle.q_learning(*columns, offsets.tolist(), gamma, tau, beta)
    found = (
        target,
        td_loss(q, target),
        expectile_loss(values, target_q, tau),
        awac_loss(logprobs, values, target_q, beta),
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tolist() == pytest.approx(theirs, rel=1e-10, abs=1e-10)


@given(st.lists(st.lists(st.floats(-20, 20), min_size=3, max_size=3), min_size=1, max_size=4))
def test_the_conservative_term_is_the_cross_entropy_of_the_datas_actions(table: list[list[float]]) -> None:
    for action in range(3):
        found = conservative_loss(torch.tensor(table, dtype=torch.float64), torch.full([len(table)], action))
        expected = [math.log(sum(math.exp(q - row[action]) for q in row)) for row in table]
        assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(batches(columns=2, shortest=1), Share, st.randoms(use_true_random=False))
def test_an_answers_targets_are_the_same_whatever_lies_before_and_behind_it(
    batch: Batch, gamma: float, shuffle: random.Random
) -> None:
    (rewards, values), offsets = batch
    whole = rows(td_target(rewards, values, offsets, gamma), offsets)
    order = list(range(len(whole)))
    shuffle.shuffle(order)
    r, v = ([column[row] for row in order] for column in (rows(rewards, offsets), rows(values, offsets)))
    lengths = [len(one) for one in r]
    permuted = td_target(join(r), join(v), offsets_of(lengths), gamma)
    assert torch.equal(permuted, join([whole[row] for row in order]))
    alone = [td_target(one, state, offsets_of([len(one)]), gamma) for one, state in zip(r, v, strict=True)]
    assert torch.equal(join(alone), permuted)


def test_no_answers_have_no_targets() -> None:
    assert td_target(torch.zeros(0), torch.zeros(0), torch.tensor([0]), 0.5).shape == (0,)


# Gradients

Q = doubles(0.3, -1.0, 2.0, 0.5)
V = doubles(0.5, 0.2, -0.4, 0.1)
ACTIONS = torch.tensor([1, 0])
TERMS: dict[str, Callable[[Tensor], Tensor]] = {
    "td": lambda q: td_loss(q.view(2, 2), V[:2]),
    "expectile": lambda v: expectile_loss(v, V, 0.7),
    "conservative": lambda q: conservative_loss(q.view(2, 2), ACTIONS),
    "awac": lambda logprobs: awac_loss(logprobs, V, V.flip(0), 1.5),
}


@pytest.mark.parametrize("name", TERMS)
def test_gradients_are_finite_differences(name: str) -> None:
    term, x, step = TERMS[name], Q.clone().requires_grad_(), 1e-6
    term(x).sum().backward()
    moves = step * torch.eye(4, dtype=torch.float64)
    slopes = [(term(Q + move).sum() - term(Q - move).sum()).item() / (2 * step) for move in moves]
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx(slopes, rel=1e-6, abs=1e-8)


def test_no_gradient_reaches_a_target() -> None:
    values, target_q, logprobs = (V.clone().requires_grad_() for _ in range(3))
    assert not td_target(V, values, torch.tensor([0, 4]), 0.9).requires_grad
    assert not polyak(V, values, 0.5).requires_grad
    td_loss(torch.stack([logprobs, logprobs]), target_q).sum().backward()
    expectile_loss(values, target_q, 0.7).sum().backward()
    assert target_q.grad is None
    of_expectile = values.grad
    awac_loss(logprobs, values, target_q, 1.0).sum().backward()
    assert target_q.grad is None
    assert values.grad is of_expectile  # the weight is a constant to V as well


# What targets move towards


def test_a_target_in_full_precision_moves_by_steps_that_bf16_would_lose() -> None:
    online = torch.ones(1, dtype=torch.bfloat16) * 2
    target = torch.ones(1)
    for _ in range(10):
        target = polyak(target, online, 0.001)
    assert target.dtype == torch.float32
    assert target.item() == pytest.approx(2 - 0.999**10)


@given(Share, st.integers(1, 5))
def test_a_target_is_the_geometric_mean_of_ages_of_what_it_followed(alpha: float, times: int) -> None:
    target, weights = doubles(8), [doubles(float(number)) for number in range(times)]
    for online in weights:
        target = polyak(target, online, alpha)
    shares = [alpha * (1 - alpha) ** (times - 1 - number) for number in range(times)]
    expected = 8 * (1 - alpha) ** times + sum(
        share * online.item() for share, online in zip(shares, weights, strict=True)
    )
    assert target.item() == pytest.approx(expected, abs=1e-12)


# Expectiles


@pytest.mark.parametrize("tau", [0.5, 0.7, 0.9, 0.999])
def test_the_least_expectile_loss_lies_at_the_root_of_its_first_order_condition(tau: float) -> None:
    q, weights = doubles(-1, 0, 2, 3), doubles(0.4, 0.3, 0.2, 0.1)
    root = oracle.expectile(q.tolist(), weights.tolist(), tau)
    values = torch.full([4], root, dtype=torch.float64, requires_grad=True)
    (weights * expectile_loss(values, q, tau)).sum().backward()
    assert values.grad is not None
    assert values.grad.sum().item() == pytest.approx(0, abs=1e-12)


def test_the_expectile_is_the_mean_at_one_half_and_the_largest_as_tau_nears_one() -> None:
    q, weights = [-1.0, 0.0, 2.0, 3.0], [0.4, 0.3, 0.2, 0.1]
    assert oracle.expectile(q, weights, 0.5) == pytest.approx(-0.4 + 0.4 + 0.3)
    expectiles = [oracle.expectile(q, weights, tau) for tau in (0.5, 0.7, 0.9, 0.99, 0.9999)]
    assert expectiles == sorted(expectiles)
    assert expectiles[-1] == pytest.approx(3, abs=0.01)


# Small decision problems, learnt in a table

Trajectory = list[tuple[int, int, float]]
BANDIT: list[Trajectory] = [[(0, 0, 1.0)]] * 3 + [[(0, 1, 4.0)]]
"""One state; the best of three arms is in no trajectory."""
# Right (0) earns 1 at each of three places, left (1) ends with 0.5; the reward of staying to the end comes last.
CHAIN: list[Trajectory] = [
    [(0, 1, 0.5)],
    [(0, 0, 0.0), (1, 1, 0.5)],
    [(0, 0, 0.0), (1, 0, 0.0), (2, 1, 0.5)],
    [(0, 0, 0.0), (1, 0, 0.0), (2, 0, 2.0)],
]
# Nodes 0 to 3, goal 3; an action is the node gone to, a step costs 1. Nobody goes 0, 1, 3: that has to be stitched.
WALK: list[Trajectory] = [
    [(0, 2, -1.0), (2, 1, -1.0), (1, 3, -1.0)],
    [(0, 1, -1.0), (1, 2, -1.0), (2, 0, -1.0), (0, 2, -1.0), (2, 1, -1.0), (1, 3, -1.0)],
    [(0, 1, -1.0), (1, 0, -1.0), (0, 2, -1.0), (2, 1, -1.0), (1, 3, -1.0)],
]
PROBLEMS = {"bandit": BANDIT, "chain": CHAIN, "walk": WALK}


def learnt(data: list[Trajectory], gamma: float, tau: float, steps: int = 800) -> tuple[Tensor, Tensor]:
    """V [4] and Q [4, 4] of a table trained on the losses alone, with target heads; unvisited entries stay zero."""
    state, action, reward = (torch.tensor(column) for column in zip(*chain(*data), strict=True))
    offsets = offsets_of([len(one) for one in data])
    q = torch.zeros(2, 4, 4, dtype=torch.float64, requires_grad=True)
    v = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    target_q = torch.zeros(2, 4, 4, dtype=torch.float64)
    # A step that suits every entry alike, however often the data visit it.
    taken = torch.zeros(4, 4).index_put((state, action), torch.ones(len(state)), accumulate=True)
    for _ in range(steps):
        target = td_target(reward.double(), v[state], offsets, gamma)
        loss = td_loss(q[:, state, action], target) + expectile_loss(v[state], target_q[:, state, action].amin(0), tau)
        of_q, of_v = torch.autograd.grad(loss.sum(), (q, v))
        with torch.no_grad():
            q -= 0.25 * of_q / taken.clamp(min=1)
            v -= 0.5 * of_v / taken.sum(1).clamp(min=1)
        target_q = polyak(target_q, q, 0.5)
    return v.detach(), q.detach()[0]


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("tau", [0.5, 0.9])
def test_a_table_learns_the_expectile_value_of_the_data(name: str, tau: float) -> None:
    data, gamma = PROBLEMS[name], 0.9
    v, q = learnt(data, gamma, tau)
    expected_v, expected_q = oracle.expectile_values(data, gamma, tau)
    for state, value in expected_v.items():
        assert v[state].item() == pytest.approx(value, abs=1e-6)
    for (state, action), value in expected_q.items():
        assert q[state, action].item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("name", PROBLEMS)
def test_at_tau_one_half_values_are_the_behaviour_policys(name: str) -> None:
    exact, _ = oracle.behaviour_values(PROBLEMS[name], 0.9)
    found, _ = oracle.expectile_values(PROBLEMS[name], 0.9, 0.5)
    assert found == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "best"),
    [
        ("bandit", {0: 4.0}),
        ("chain", {0: 0.9**2 * 2, 1: 0.9 * 2, 2: 2.0}),
        ("walk", {0: -1 - 0.9, 1: -1.0, 2: -1 - 0.9}),  # 0, 1, 3 is in no trajectory
    ],
)
def test_as_tau_nears_one_values_become_those_of_the_best_actions_in_the_data(
    name: str, best: dict[int, float]
) -> None:
    optimal, _ = oracle.optimal_values(PROBLEMS[name], 0.9)
    assert optimal == pytest.approx(best)
    gaps = []
    for tau in (0.5, 0.9, 0.99, 0.9999):
        values, _ = oracle.expectile_values(PROBLEMS[name], 0.9, tau)
        gaps.append(max(optimal[state] - values[state] for state in optimal))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] == pytest.approx(0, abs=2e-3)
    v, q = learnt(PROBLEMS[name], 0.9, 0.99)
    assert max(abs(v[state].item() - value) for state, value in best.items()) < 0.15
    if name == "walk":
        assert q[0, 1] > q[0, 2]  # whence decoding takes the way that nobody went


def test_q_learning_by_a_maximum_over_all_actions_would_value_what_the_data_never_did() -> None:
    # The bandit's third arm: untrained, its entry is 0 and would be the best where all others lose.
    losing = [[(0, 0, -1.0)], [(0, 1, -2.0)]]
    v, q = learnt(losing, 0.9, 0.99)
    assert q[0, 2] == 0
    assert v[0].item() == pytest.approx(-1, abs=0.02)


def test_the_conservative_term_pushes_unseen_actions_below_seen_ones() -> None:
    q = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    seen = torch.tensor([1])
    for _ in range(2000):
        q_seen = q[:, seen].view(1, 1).expand(2, 1)
        loss = td_loss(q_seen, doubles(-1)) + 0.1 * conservative_loss(q, seen)
        (slope,) = torch.autograd.grad(loss.sum(), q)
        with torch.no_grad():
            q -= 0.2 * slope
    assert q[0, 0] < q[0, 1] and q[0, 2] < q[0, 1]
