import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from rlhf_ray.environments.random_walks import GOAL, distances, optimality, random_graph, reaches, walk


def graph(*edges: tuple[int, int], nodes: int = 4) -> np.ndarray:
    made = np.zeros((nodes, nodes), bool)
    for a, b in edges:
        made[a, b] = True
    return made


DETOUR = graph((3, 2), (2, 1), (1, 0), (3, 1), (1, 3))


def test_a_shortest_walk_is_optimal_a_detour_is_less_and_a_way_that_is_none_is_worth_nothing() -> None:
    assert distances(DETOUR).tolist() == [0, 1, 2, 2]
    assert optimality(DETOUR, 3, [1, 0]) == 1
    assert optimality(DETOUR, 3, [2, 1, 0]) == 2 / 3
    assert optimality(DETOUR, 3, [1, 3, 1, 0]) == 2 / 4
    assert optimality(DETOUR, 3, [0]) == 0  # no edge
    assert optimality(DETOUR, 3, [2, 1]) == 0  # not at the goal
    assert optimality(DETOUR, 3, []) == 0


def test_a_node_without_a_way_to_the_goal_is_infinitely_far() -> None:
    assert distances(graph((1, 0), (2, 3), (3, 2))).tolist() == [0, 1, np.inf, np.inf]


@given(some.integers(2, 8), some.floats(0, 1), some.integers(0, 10))
def test_distances_are_the_least_powers_of_the_graph_that_reach_the_goal(nodes: int, share: float, seed: int) -> None:
    edges = np.random.default_rng(seed).random((nodes, nodes)) < share
    powers = [np.linalg.matrix_power(edges.astype(object), steps) for steps in range(nodes)]
    expected = [
        next((steps for steps, ways in enumerate(powers) if ways[node, GOAL] > 0), np.inf) for node in range(nodes)
    ]
    assert distances(edges).tolist() == expected


@given(some.integers(0, 50))
def test_walks_follow_edges_and_end_at_the_goal_or_at_their_longest(seed: int) -> None:
    edges = random_graph(8, 0.3, seed)
    for start in range(1, 8):
        nodes = walk(edges, start, 6, np.random.default_rng(seed))
        assert len(nodes) <= 6
        assert GOAL not in nodes[:-1]
        assert reaches(edges, start, nodes) == (nodes[-1] == GOAL)
        assert nodes[-1] == GOAL or len(nodes) == 6
        assert all(edges[a, b] for a, b in zip([start, *nodes], nodes, strict=False))


@given(some.integers(0, 20))
def test_a_walk_of_full_skill_is_a_shortest_one(seed: int) -> None:
    edges = random_graph(8, 0.3, seed)
    for start in range(1, 8):
        assert optimality(edges, start, walk(edges, start, 8, np.random.default_rng(seed), skill=1.0)) == 1


def test_skill_is_the_share_of_steps_that_are_taken_towards_the_goal_and_not_to_any_neighbour() -> None:
    random = np.random.default_rng(0)
    for skill, expected in ((0.0, 1 / 2), (0.4, 0.4 + 0.6 / 2)):  # from 3, node 1 is nearer to the goal than node 2
        first = [walk(DETOUR, 3, 1, random, skill)[0] for _ in range(4000)]
        assert abs(first.count(1) / 4000 - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5


def test_graphs_depend_on_the_seed_alone_and_one_that_cannot_be_is_refused() -> None:
    assert np.array_equal(random_graph(10, 0.3, 1), random_graph(10, 0.3, 1))
    assert not np.array_equal(random_graph(10, 0.3, 1), random_graph(10, 0.3, 2))
    with pytest.raises(ValueError, match="leads all to the goal"):
        random_graph(5, 0.0, 0)
