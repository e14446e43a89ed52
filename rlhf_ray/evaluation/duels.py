"""How often a judge prefers one system's answers to another's, each pair being judged in both orders.

A win needs both orders: a judge that always answers "(A)" finds ties only, and no winner.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.algorithms.intervals import wilson


class Duels(NamedTuple):
    """What came of D pairs of answers."""

    wins: int
    ties: int
    """The two orders disagree, or one of them is undecided."""
    losses: int
    win_rate: float
    """(wins + ties / 2) / D."""
    low: float
    """Wilson's 95% interval of the win rate."""
    high: float
    position_bias: float
    """Mean probability of "(A)" above one half."""
    flips: float
    """Share of pairs in which the position decided: both orders prefer the same letter."""


def duels(p: NDArray[np.float64]) -> Duels:
    """From p [D, 2], the probability that ours is the better answer: ours as "(A)", then as "(B)".

    Raises ValueError for no pairs and for a p outside [0, 1].
    """
    if p.ndim != 2 or p.shape[1] != 2 or not len(p):
        raise ValueError(f"expected probabilities of shape (pairs, 2), one for each order, got {p.shape}")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("a probability is not a number from 0 to 1")
    lean = np.sign(p - 0.5)
    wins, losses = int((lean > 0).all(1).sum()), int((lean < 0).all(1).sum())
    ties = len(p) - wins - losses
    score = wins + ties / 2
    bias = float((p[:, 0] - p[:, 1]).mean()) / 2
    flips = float((lean[:, 0] * lean[:, 1] < 0).mean())
    return Duels(wins, ties, losses, score / len(p), *wilson(score, len(p)), bias, flips)
