"""Shares of right answers by category, with the interval that so few items leave."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.algorithms.intervals import wilson


class Accuracy(NamedTuple):
    """A share of items with Wilson's 95% interval."""

    right: float
    """Items that are right; a tie is half."""
    items: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Outcome:
    """How often something is right, and where."""

    right: NDArray[np.float64]
    """[N] 1, 0, or between them for a tie, in the order of the items."""
    categories: dict[str, Accuracy]
    micro: Accuracy
    """Of all items, each alike."""
    macro: float
    """Mean over categories, each alike however small."""

    def summary(self) -> dict[str, Any]:
        """For summary.json."""
        return {
            "micro": self.micro._asdict(),
            "macro": self.macro,
            "categories": {name: accuracy._asdict() for name, accuracy in self.categories.items()},
        }


def by_category(right: NDArray[np.float64], categories: Sequence[str]) -> Outcome:
    """From `right` [N] in [0, 1] and the category of each. Raises ValueError for no items."""
    names = np.array(categories)
    found = {str(name): _accuracy(right[names == name]) for name in np.unique(names)}
    return Outcome(right, found, _accuracy(right), float(np.mean([each.accuracy for each in found.values()])))


def _accuracy(right: NDArray[np.float64]) -> Accuracy:
    total = float(right.sum())
    low, high = wilson(total, len(right))
    return Accuracy(total, len(right), total / len(right), low, high)
