"""Answering as a decision process: what is seen, what is paid when, and that nats cost what the equation says."""

from itertools import product
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as some

from rlhf_ray.environments.random_walks import GOAL, optimality, random_graph
from rlhf_ray.environments.token_mdp import TokenMDP, walks

EOS = 2
# [2 tokens so far, V = 3] log-probabilities of the next token; by how many tokens there are.
REFERENCE = np.log([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6], [0.1, 0.1, 0.8]])


def mdp(**changes: Any) -> TokenMDP:
    """Two prompts, three tokens, the score ten times the number of zeros in an answer."""
    told: dict[str, Any] = {
        "prompts": [[0], [1, 0]],
        "score": lambda prompt, answer: 10.0 * list(answer).count(0),
        "ends": lambda prompt, answer: answer[-1] == EOS,
        "vocabulary": 3,
        "longest": 3,
        "window": 3,
        "reference": lambda prompt, answer: REFERENCE[len(answer)],
        "beta": 0.5,
    }
    return TokenMDP(**told | changes)


def played(env: TokenMDP, prompt: int, *tokens: int) -> list[tuple[Any, ...]]:
    env.reset(options={"prompt": prompt})
    return [env.step(np.int64(token)) for token in tokens]


# What an episode is


def test_gymnasium_finds_no_fault_with_it() -> None:
    check_env(mdp(), skip_render_check=True)
    check_env(walks(random_graph(6, 0.4, 0), longest=4, beta=0.1), skip_render_check=True)


def test_a_state_is_the_last_tokens_of_prompt_and_answer_with_padding_before_them() -> None:
    env = mdp()
    assert env.reset(options={"prompt": 0})[0].tolist() == [3, 3, 0]
    assert env.reset(options={"prompt": 1})[0].tolist() == [3, 1, 0]
    assert [state.tolist() for state, *_ in played(env, 1, 1, 0, EOS)] == [[1, 0, 1], [0, 1, 0], [1, 0, 2]]


def test_an_answer_ends_at_eos_and_is_cut_off_at_its_longest_even_so_never_both() -> None:
    assert [step[2:4] for step in played(mdp(), 0, 0, EOS)] == [(False, False), (True, False)]
    assert [step[2:4] for step in played(mdp(), 0, 0, 0, 0)] == [(False, False), (False, False), (False, True)]
    assert played(mdp(), 0, 0, 0, EOS)[-1][2:4] == (True, False)


def test_prompts_are_drawn_evenly_and_again_by_the_same_seed() -> None:
    env = mdp()
    drawn = [env.reset(seed=0 if n == 0 else None)[0].tolist() for n in range(400)]
    assert 150 < drawn.count([3, 3, 0]) < 250
    assert drawn == [env.reset(seed=0 if n == 0 else None)[0].tolist() for n in range(400)]


# What is paid


def test_the_score_is_paid_at_the_last_token_and_the_price_at_every_one() -> None:
    steps = played(mdp(), 0, 0, 1, EOS)
    price = [0.5 * np.log(0.5), 0.5 * np.log(0.2), 0.5 * np.log(0.8)]
    assert [step[1] for step in steps] == pytest.approx([price[0], price[1], price[2] + 10.0])
    assert [step[4] for step in steps[:2]] == [{}, {}]
    assert steps[2][4] == {"score": 10.0, "cross_entropy": pytest.approx(-np.log(0.5 * 0.2 * 0.8))}


def test_an_answer_that_is_cut_off_is_scored_as_it_stands() -> None:
    assert [step[1] for step in played(mdp(beta=0.0), 0, 0, 0, 0)] == [0.0, 0.0, 30.0]


@given(some.lists(some.integers(0, 2), min_size=3, max_size=3), some.floats(0, 2))
def test_the_return_is_the_score_less_beta_times_the_sum_of_prices(tokens: list[int], beta: float) -> None:
    env = mdp(beta=beta)
    env.reset(options={"prompt": 0})
    total, done = 0.0, False
    for token in tokens:
        if not done:
            _, reward, terminated, truncated, info = env.step(np.int64(token))
            total, done = total + reward, terminated or truncated
    answer = tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens
    price = -sum(REFERENCE[place][token] for place, token in enumerate(answer))
    assert total == pytest.approx(10 * answer.count(0) - beta * price)
    assert info["cross_entropy"] == pytest.approx(price)


def test_return_and_entropy_bonus_are_the_kl_regularised_return_of_a_policy() -> None:
    """Over all answers of a policy, each by its probability: the identity that the environment rests on."""
    policy = np.array([[0.6, 0.3, 0.1], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]])
    env, beta = mdp(), 0.5
    returns = regularised = 0.0
    for answer in {tuple(a[: a.index(EOS) + 1] if EOS in a else a) for a in product(range(3), repeat=3)}:
        steps = played(env, 0, *answer)
        chance = np.prod([policy[place][token] for place, token in enumerate(answer)])
        entropy = -sum((policy[place] * np.log(policy[place])).sum() for place in range(len(answer)))
        kl = sum((policy[p] * (np.log(policy[p]) - REFERENCE[p])).sum() for p in range(len(answer)))
        returns += chance * (sum(step[1] for step in steps) + beta * entropy)
        regularised += chance * (10.0 * answer.count(0) - beta * kl)
    assert returns == pytest.approx(regularised)


def test_a_price_without_a_reference_is_refused() -> None:
    with pytest.raises(ValueError, match=r"beta is 0\.5, but there is no reference"):
        mdp(reference=None)
    assert played(mdp(reference=None, beta=0.0), 0, 0, EOS)[-1][1] == 10.0


# Walks


def line() -> np.ndarray:
    """3 -> 2 -> 1 -> 0, and 3 -> 1."""
    edges = np.zeros((4, 4), bool)
    for a, b in ((3, 2), (2, 1), (1, 0), (3, 1)):
        edges[a, b] = True
    return edges


def test_a_walk_is_paid_its_optimality_at_the_goal_and_nothing_where_there_is_no_edge() -> None:
    env = walks(line(), longest=3)
    assert env.reset(options={"prompt": 2})[0].tolist() == [4, 4, 4, 3]
    assert [step[1:4] for step in played(env, 2, 2, 1, 0)] == [
        (0.0, False, False),
        (0.0, False, False),
        (2 / 3, True, False),
    ]
    assert [step[1:4] for step in played(env, 2, 1, 2)] == [(0.0, False, False), (0.0, True, False)]
    assert [step[1:4] for step in played(env, 0, 3)] == [(0.0, True, False)]
    assert played(walks(line(), longest=2), 2, 2, 1)[-1][1:4] == (0.0, False, True)


def test_every_step_of_a_walk_costs_what_a_step_costs_that_nobody_prefers() -> None:
    steps = played(walks(line(), longest=3, beta=0.1), 2, 1, 0)
    assert [step[1] for step in steps] == pytest.approx([-0.1 * np.log(4), 1 - 0.1 * np.log(4)])


@given(some.integers(0, 20), some.lists(some.integers(0, 7), min_size=6, max_size=6), some.integers(1, 7))
def test_walks_end_where_nothing_can_come_any_more_and_their_return_is_their_optimality(
    seed: int, nodes: list[int], start: int
) -> None:
    edges = random_graph(8, 0.4, seed)
    env = walks(edges, longest=6)
    env.reset(options={"prompt": start - 1})
    total, done = 0.0, False
    for node in nodes:
        _, reward, terminated, truncated, _ = env.step(np.int64(node))
        total, done = total + reward, terminated or truncated
        if done:
            break
    assert done
    assert total == optimality(edges, start, env.answer)
    whole = nodes[: nodes.index(GOAL) + 1] if GOAL in nodes else nodes
    assert total == optimality(edges, start, whole)  # nothing was lost by ending early
