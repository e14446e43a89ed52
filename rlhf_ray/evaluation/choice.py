"""Which of an item's answers a model chooses, by what engines measured: pure rules, and how often each is right.

All rules see the same measurements, and three that look at no model stand beside them in every result: random, longer,
shorter. A rule that beats one half only by preferring long answers is thus seen for what it is. What must never happen:
an item left out because its measurement is missing, or a tie decided by the order in which answers stand.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.algorithms.intervals import McNemar, mcnemar
from rlhf_ray.evaluation.accuracy import Outcome, by_category
from rlhf_ray.evaluation.items import Item

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """What is known of one item's n choices; None is what nobody measured, and the rules that need it are left out.

    Log-probabilities are in nats, one array [T] for each choice, over the tokens of the answer, its end included if the
    model has one.
    """

    logprobs: Sequence[Floats] | None = None
    """Of each choice as the answer to the prompt."""
    neutral: Sequence[Floats] | None = None
    """Of each choice as the answer to a prompt that says nothing."""
    reference: Sequence[Floats] | None = None
    """As `logprobs`, by the reference model."""
    letters: Floats | None = None
    """[n, n] of the options "(A)", "(B)", and so on; row o is for the order `orders(n)[o]`."""
    rewards: Floats | None = None
    """[n] of a reward model."""


def orders(n: int) -> list[tuple[int, ...]]:
    """The n orders in which n choices are shown, each of them standing once in every place.

    >>> orders(2)
    [(0, 1), (1, 0)]
    """
    return [tuple((first + place) % n for place in range(n)) for first in range(n)]


def _sums(logprobs: Sequence[Floats]) -> Floats:
    return np.array([each.sum() for each in logprobs])


def _sum(item: Item, measured: Measured) -> Floats | None:
    return None if measured.logprobs is None else _sums(measured.logprobs)


def _token_mean(item: Item, measured: Measured) -> Floats | None:
    return None if measured.logprobs is None else np.array([each.mean() for each in measured.logprobs])


def _byte_mean(item: Item, measured: Measured) -> Floats | None:
    """Unlike a mean over tokens it is comparable between tokenizers."""
    if measured.logprobs is None:
        return None
    return _sums(measured.logprobs) / [len(choice.encode()) for choice in item.choices]


def _pmi(item: Item, measured: Measured) -> Floats | None:
    """log p(answer | prompt) - log p(answer | neutral prompt): what the prompt adds (Holtzman et al. 2021, eq. 2)."""
    if measured.logprobs is None or measured.neutral is None:
        return None
    return _sums(measured.logprobs) - _sums(measured.neutral)


def _implicit(item: Item, measured: Measured) -> Floats | None:
    """log pi - log pi_ref, DPO's reward (Rafailov et al. 2023, eq. 5) over beta, which changes no choice."""
    if measured.logprobs is None or measured.reference is None:
        return None
    return _sums(measured.logprobs) - _sums(measured.reference)


def _letters(item: Item, measured: Measured) -> Floats | None:
    """Mean over all orders of the probability of the letter that stands before each choice."""
    if measured.letters is None:
        return None
    by_place = _options(measured.letters)
    by_choice = np.empty_like(by_place)
    for row, order in enumerate(orders(len(item.choices))):
        by_choice[row, list(order)] = by_place[row]
    return by_choice.mean(0)


def _options(letters: Floats) -> Floats:
    """[n, n] probabilities of the options among themselves."""
    shifted = np.exp(letters - letters.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


RULES: dict[str, Callable[[Item, Measured], Floats | None]] = {
    "random": lambda item, measured: np.zeros(len(item.choices)),  # a tie of all: the expectation, not a draw
    "longer": lambda item, measured: np.array([float(len(choice)) for choice in item.choices]),
    "shorter": lambda item, measured: np.array([-float(len(choice)) for choice in item.choices]),
    "sum": _sum,
    "token_mean": _token_mean,
    "byte_mean": _byte_mean,
    "pmi": _pmi,
    "implicit": _implicit,
    "letters": _letters,
    "reward": lambda item, measured: measured.rewards,
}
"""Rule -> scores [n] of an item's choices, the highest of which is chosen; None where nobody measured what it needs."""


def credit(item: Item, scores: Floats) -> float:
    """Share of right ones among the choices with the highest score: 1, 0, or 1/2 for a tie of right and wrong."""
    chosen = np.flatnonzero(scores == scores.max())
    return sum(int(choice) in item.correct for choice in chosen) / len(chosen)


@dataclass(frozen=True)
class Results:
    """What a model chose, by every rule for which there are measurements."""

    items: Sequence[Item]
    rules: dict[str, Outcome]
    position_bias: float | None
    """Mean probability of "(A)" above 1/n; 0 for no lean, none where letters were not measured."""

    def summary(self) -> dict[str, Any]:
        """For summary.json."""
        return {
            "items": len(self.items),
            "position_bias": self.position_bias,
            "rules": {rule: outcome.summary() for rule, outcome in self.rules.items()},
        }

    def rows(self) -> list[dict[str, Any]]:
        """One an item: `id`, `category`, and what each rule earns on it."""
        return [
            {"id": item.id, "category": item.category}
            | {rule: float(outcome.right[place]) for rule, outcome in self.rules.items()}
            for place, item in enumerate(self.items)
        ]


def evaluate(items: Sequence[Item], measured: Sequence[Measured]) -> Results:
    """By all rules whose measurements are there.

    Raises ValueError, which names the item, for a measurement that others have and it has not, for one that is not of
    as many choices as it has, and for one that is not finite.
    """
    earned: dict[str, list[float]] = {}
    for place, (item, known) in enumerate(zip(items, measured, strict=True)):
        scores = {rule: score for rule, of in RULES.items() if (score := of(item, known)) is not None}
        if place and set(scores) != set(earned):
            missing = ", ".join(sorted(set(scores) ^ set(earned)))
            raise ValueError(f"item '{item.id}': the items before it are measured otherwise, which decides {missing}")
        for rule, score in scores.items():
            if score.shape != (len(item.choices),) or not np.isfinite(score).all():
                raise ValueError(
                    f"item '{item.id}' has {len(item.choices)} choices, and {rule} scores {score.tolist()}"
                )
            earned.setdefault(rule, []).append(credit(item, score))
    categories = [item.category for item in items]
    lean = [
        float((_options(each.letters)[:, 0] - 1 / len(each.letters)).mean())
        for each in measured
        if each.letters is not None
    ]
    return Results(
        items,
        {rule: by_category(np.array(right), categories) for rule, right in earned.items()},
        float(np.mean(lean)) if lean else None,
    )


def compare(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> dict[str, McNemar]:
    """Rule -> McNemar's test, of two systems' `Results.rows()` on the same items, by the rules that both have.

    Raises ValueError when the items are not the same, in whichever order.
    """
    old, new = ({row["id"]: row for row in rows} for rows in (before, after))
    if set(old) != set(new):
        differing = sorted(set(old) ^ set(new))
        raise ValueError(f"the two results are of different items: {len(differing)} differ, such as '{differing[0]}'")
    rules = [rule for rule in RULES if all(rule in row for row in (*old.values(), *new.values()))]
    return {rule: mcnemar([old[key][rule] for key in old], [new[key][rule] for key in old]) for rule in rules}
