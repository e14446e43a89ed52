"""Rows of different lengths into micro-batches and ranks, counted in tokens.

Every index comes out exactly once and the result depends on nothing but the arguments, so ranks that call these
functions with the same lengths agree without talking.
"""

from collections.abc import Sequence

import numpy as np


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Bins of row indices, each of at most `budget` tokens, by first fit of the longest row first.

    At most 11/9 of the fewest possible bins, plus 6/9 (Dosa 2007). `lengths` [S] in tokens.
    Raises ValueError naming the row that is longer than `budget`.

    >>> micro_batches([3, 5, 2, 4], 7)
    [[1, 2], [3, 0]]
    """
    bins: list[list[int]] = []
    free = np.zeros(len(lengths), np.int64)
    for row in _longest_first(lengths):
        if lengths[row] > budget:
            raise ValueError(f"row {row} has {lengths[row]} tokens, more than the micro-batch budget of {budget}")
        fits = np.flatnonzero(free[: len(bins)] >= lengths[row])
        place = int(fits[0]) if len(fits) else len(bins)
        if place == len(bins):
            bins.append([])
            free[place] = budget
        bins[place].append(row)
        free[place] -= lengths[row]
    return bins


def balanced(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Exactly `parts` lists of row indices of similar token sums: the longest row first, to the lightest list.

    The heaviest list has at most 4/3 of the least possible weight (Graham 1969). Lists are empty where rows are few.

    >>> balanced([5, 4, 3, 3], 2)
    [[0, 3], [1, 2]]
    """
    if parts < 1:
        raise ValueError(f"cannot partition into {parts} parts")
    lists: list[list[int]] = [[] for _ in range(parts)]
    weights = np.zeros(parts, np.int64)
    for row in _longest_first(lengths):
        lightest = int(np.argmin(weights))
        lists[lightest].append(row)
        weights[lightest] += lengths[row]
    return lists


def _longest_first(lengths: Sequence[int]) -> list[int]:
    """Row indices, longest first, ties in their own order."""
    return sorted(range(len(lengths)), key=lambda row: -int(lengths[row]))
