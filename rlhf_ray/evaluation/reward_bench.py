"""Accuracy on pairs in RewardBench's format (Lambert et al. 2024, arXiv 2403.13787), by whatever scores answers.

A pair is right when its chosen answer scores higher, and a tie counts half: a scorer that says nothing is at one half
and not at zero. Scores are compared within a pair only, so their unit makes no difference. A score that cannot be had
is an error, and no pair is left out of a share.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.data.rows import BenchmarkPair, PreferencePair
from rlhf_ray.errors import RewardError
from rlhf_ray.evaluation.accuracy import Outcome, by_category
from rlhf_ray.records import Trajectories

Scorer = Callable[[Sequence[PreferencePair]], NDArray]
"""[P, 2] scores of P pairs' chosen and rejected answers."""


def evaluate(pairs: Sequence[BenchmarkPair], score: Scorer) -> Outcome:
    """By subset. Raises RewardError when there is not a finite score for both answers of every pair."""
    scores = np.asarray(score([each.pair for each in pairs]), np.float64)
    if scores.shape != (len(pairs), 2):
        raise RewardError(f"expected scores of shape ({len(pairs)}, 2), one for each answer, got {scores.shape}")
    if not np.isfinite(scores).all():
        row = int(np.flatnonzero(~np.isfinite(scores).all(1))[0])
        raise RewardError(f"pair {row} of {len(pairs)} (subset '{pairs[row].subset}') scores {scores[row].tolist()}")
    right = 0.5 + 0.5 * np.sign(scores[:, 0] - scores[:, 1])
    return by_category(right, [each.subset for each in pairs])


class ScoresAnswers(Protocol):
    """Such as a reward model of `actors.reward`."""

    def scores(self, trajectories: Trajectories) -> np.ndarray:
        """[B]"""
        ...


def by_reward(reward: ScoresAnswers) -> Scorer:
    """The scorer that a source of rewards is."""

    def score(pairs: Sequence[PreferencePair]) -> NDArray:
        prompts = [pair.prompt for pair in pairs for _ in range(2)]
        answers = [answer for pair in pairs for answer in (pair.chosen, pair.rejected)]
        return reward.scores(Trajectories.given(prompts, answers)).reshape(-1, 2)

    return score
