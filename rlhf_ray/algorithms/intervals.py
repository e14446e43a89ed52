"""How sure a count can be: an interval around a share, and a test of two sets of answers to the same items.

Shares near 0 or 1 and few items are the usual case here. The textbook interval p ± z sqrt(p (1 - p) / n) has no width
at p = 1 and leaves [0, 1] near it; Wilson's has neither fault. No number is made of nothing: no items, no interval.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple


class McNemar(NamedTuple):
    """Which items changed between two systems, and how likely so lopsided a change is by chance."""

    better: int
    """Items on which `after` is better."""
    worse: int
    """Items on which `after` is worse."""
    p: float
    """Two-sided, exact; 1 where nothing changed."""


def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """(low, high) of a share of `n` trials, both in [0, 1]; z = 1.96 for 95%.

    (p + z²/2n ± z sqrt(p (1 - p) / n + z²/4n²)) / (1 + z²/n), p = successes / n. Wilson 1927, "Probable inference, the
    law of succession, and statistical inference". `successes` may be halves, for ties. Raises ValueError for n < 1 and
    for successes outside [0, n].
    """
    if n < 1:
        raise ValueError(f"an interval needs at least one trial, n is {n}")
    if not 0 <= successes <= n:
        raise ValueError(f"successes are {successes}, expected a number from 0 to n = {n}")
    p = successes / n
    centre = p + z * z / (2 * n)
    reach = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)


def mcnemar(before: Sequence[float], after: Sequence[float]) -> McNemar:
    """Exact test of whether `after` [N] is as often right as `before` [N] on the same items (McNemar 1947).

    Values are 1 for right, 0 for wrong, 1/2 for a tie. Items with equal values say nothing and drop out; of the other
    m the `better` ones are binomial(m, 1/2) if nothing changed, and p = min(1, 2 P(X <= min(better, worse))). A step
    to or from a tie counts as a whole one, as in a sign test. Raises ValueError for unequal lengths.
    """
    if len(before) != len(after):
        raise ValueError(f"the same items are needed twice: before has {len(before)}, after has {len(after)}")
    better = sum(new > old for old, new in zip(before, after, strict=True))
    worse = sum(new < old for old, new in zip(before, after, strict=True))
    changed = better + worse
    tail = sum(math.comb(changed, k) for k in range(min(better, worse) + 1))
    # Whole numbers to the end: a quotient of them is exact where 2.0 ** changed would overflow.
    return McNemar(better, worse, min(1.0, 2 * tail / 2**changed))


def mean_and_se(values: Sequence[float]) -> tuple[float, float]:
    """Mean of `values` [N] and its standard error sd / sqrt(N), sd with Bessel's correction; NaN for a single value.

    Raises ValueError for none.
    """
    n = len(values)
    if n < 1:
        raise ValueError("a mean needs at least one value")
    mean = math.fsum(values) / n
    if n == 1:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
