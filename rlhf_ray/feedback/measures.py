"""What a judge is worth: how it leans, whether it answers at all, and where labels are known, how often it is right.

Averages run over principles that were answered in both orders: over one order alone, a preference for the better
answer would look like one for its place.
"""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from rlhf_ray.algorithms.intervals import wilson
from rlhf_ray.feedback.judging import Judged

LITTLE = 0.5
"""Options that together have a smaller probability than this are not what the judge would say."""


def leanings(judged: Sequence[Judged]) -> dict[str, float]:
    """By name; what nothing was answered for is absent.

    position_bias: mean p((A)) - 0.5. flip_rate: share of comparisons whose preference changes with the order, one that
    is undecided in one order counting half. option_mass: mean exp(l_A) + exp(l_B); low_mass_share: how often it is
    below one half. spread: standard deviation of p over the principles of a pair, mean over pairs with several.
    """
    pairs = [pair for each in judged for pair in each.pairs]
    both = [answered for pair in pairs for answered in pair.answered()]
    if not both:
        return {}
    questions = [question for answered in both for question in answered]
    masses = [sum(map(math.exp, question.logprobs or ())) for question in questions]
    by_principle = [list(pair.by_principle().values()) for pair in pairs]
    spreads = [stdev(values) for values in by_principle if len(values) > 1]
    found = {
        "position_bias": fmean(question.prefers_a for question in questions) - 0.5,
        "flip_rate": fmean(_flips(one.prefers_a, other.prefers_a) for one, other in both),
        "option_mass": fmean(masses),
        "low_mass_share": fmean(mass < LITTLE for mass in masses),
    }
    return found | ({"spread": fmean(spreads)} if spreads else {})


def calibration(judged: Sequence[Judged]) -> dict[str, Any]:
    """The judge's p, before any clamp, against known labels: accuracy with its 95% interval, ECE, Brier, and a table.

    A pair without a p is counted and left out; where none has one there is no more than the counts.
    """
    import torch

    from rlhf_ray.algorithms import preference_loss

    known = [(pair.p, each.label) for each in judged for pair in each.pairs if pair.p is not None]
    counts = {"pairs": len(known), "unlabelled": sum(len(each.pairs) for each in judged) - len(known)}
    if not known:
        return counts
    p, labels = torch.tensor(known, dtype=torch.float64).T
    accuracy = preference_loss.accuracy(p, labels).item()
    bins = preference_loss.reliability(p, labels)
    rows = zip(bins.confidence.tolist(), bins.agreement.tolist(), bins.counts.tolist(), strict=True)
    return {
        **counts,
        "accuracy": accuracy,
        "accuracy_interval": wilson(accuracy * len(known), len(known)),
        "ece": preference_loss.expected_calibration_error(p, labels).item(),
        "brier": preference_loss.brier(p, labels).item(),
        "reliability": [
            {"confidence": confidence, "agreement": agreement, "pairs": int(count)}
            for confidence, agreement, count in rows
            if count
        ],
    }


def _flips(as_it_is: float, swapped: float) -> float:
    """Of p((A)) in both orders: the same sign of p - 0.5 means that the judge prefers a place, not an answer."""
    return 0.5 + 0.5 * _sign(as_it_is - 0.5) * _sign(swapped - 0.5)


def _sign(x: float) -> int:
    return (x > 0) - (x < 0)
