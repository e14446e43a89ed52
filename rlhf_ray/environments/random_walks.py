"""Random walks on a graph as token sequences: offline data full of detours, whose best walks are known exactly.

A token is the node gone to. Whoever imitates the walks walks at random; a value of nodes, put together from parts of
different walks, finds ways that nobody went. The optimum is computed from the graph and never from walks.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Edges = NDArray[np.bool_]
"""[N, N]; edges[a, b]: one step leads from node a to node b."""
GOAL = 0
TRIES = 10_000


def random_graph(nodes: int, share: float, seed: int) -> Edges:
    """[nodes, nodes] in which each edge between two nodes is there with probability `share`, and all reach the goal.

    Raises ValueError when no graph of so few edges was found whose nodes all do.
    """
    random = np.random.default_rng(seed)
    for _ in range(TRIES):
        edges = (random.random((nodes, nodes)) < share) & ~np.eye(nodes, dtype=bool)
        if np.isfinite(distances(edges)).all():
            return edges
    raise ValueError(f"none of {TRIES} graphs of {nodes} nodes with a share of {share} edges leads all to the goal")


def distances(edges: Edges) -> NDArray[np.float64]:
    """[N] fewest steps from each node to the goal, inf where there is no way.

    d(a) = 1 + min over b after a of d(b), iterated until nothing changes: value iteration at a price of 1 a step.
    """
    found = np.full(len(edges), np.inf)
    found[GOAL] = 0
    while True:
        better = 1 + np.where(edges, found, np.inf).min(1)
        better[GOAL] = 0
        if np.array_equal(better, found):
            return found
        found = better


def walk(edges: Edges, start: int, longest: int, random: np.random.Generator, skill: float = 0.0) -> list[int]:
    """Nodes gone to from `start`, up to the goal or `longest` steps.

    Each is any neighbour of the one before or, with probability `skill`, any of those that are nearest to the goal.
    """
    left = distances(edges)
    nodes: list[int] = []
    at = start
    while at != GOAL and len(nodes) < longest:
        neighbours = np.flatnonzero(edges[at])
        if random.random() < skill:
            neighbours = neighbours[left[neighbours] == left[neighbours].min()]
        at = int(random.choice(neighbours))
        nodes.append(at)
    return nodes


def reaches(edges: Edges, start: int, nodes: Sequence[int]) -> bool:
    """Whether `nodes` are a way along edges from `start` that ends at the goal."""
    places = [start, *nodes]
    return places[-1] == GOAL and all(edges[a, b] for a, b in pairwise(places))


def optimality(edges: Edges, start: int, nodes: Sequence[int]) -> float:
    """Fewest steps by steps taken, 1 for a shortest walk, 0 for one that does not reach the goal. `start` is not it."""
    return float(distances(edges)[start] / len(nodes)) if reaches(edges, start, nodes) else 0.0
