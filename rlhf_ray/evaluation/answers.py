"""What sampled answers are like as texts: whether they repeat themselves, how long they are, whether they end.

A policy that has found one phrase its reward likes shows it here before anybody reads an answer. Bai et al. 2022
(Constitutional AI) found one 5-gram in 46.9% of the responses of a policy trained on hard AI labels.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_ray.algorithms.intervals import mean_and_se

DISTINCT_BUDGET = 1000
"""n-grams that are looked at: more text always repeats itself more, so only equal amounts compare."""


class Commonest(NamedTuple):
    """The n-gram that most responses have."""

    ngram: str
    share: float
    """Of the responses, however often each has it."""


def words(text: str) -> list[str]:
    """In lower case, without punctuation.

    >>> words("I'm sorry, I can't.")
    ["i'm", 'sorry', 'i', "can't"]
    """
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def commonest_ngram(texts: Sequence[str], n: int = 5) -> Commonest:
    """The maximum over n-grams of words of the share of responses that contain it; none is longer than its response.

    Of equally common ones it is the first in the alphabet. Raises ValueError for no responses.
    """
    if not texts:
        raise ValueError("there are no responses to look at")
    counts = Counter(ngram for text in texts for ngram in set(_ngrams(text, n)))
    if not counts:
        return Commonest("", 0.0)
    ngram, count = min(counts.items(), key=lambda found: (-found[1], found[0]))
    return Commonest(" ".join(ngram), count / len(texts))


def distinct(texts: Sequence[str], n: int, budget: int = DISTINCT_BUDGET) -> float | None:
    """Share of different ones among the first `budget` n-grams of words (Li et al. 2016); None if there are fewer."""
    seen = [ngram for text in texts for ngram in _ngrams(text, n)][:budget]
    return len(set(seen)) / budget if len(seen) == budget else None


def describe(
    texts: Sequence[str],
    lengths: Sequence[int],
    ended: Sequence[bool],
    rewards: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, Any]:
    """All of it, for summary.json. texts [R], lengths [R] in tokens, ended [R]: by an EOS, not by the token limit.

    `rewards` are [R] by name. Raises ValueError for unequal numbers and for no responses.
    """
    for name, column in {"lengths": lengths, "ended": ended, **(rewards or {})}.items():
        if len(column) != len(texts):
            raise ValueError(f"there are {len(texts)} responses, but {len(column)} values of {name}")
    ngram, share = commonest_ngram(texts)
    eos = sum(map(bool, ended)) / len(texts)
    return {
        "responses": len(texts),
        "tokens": _mean(lengths),
        "eos_rate": eos,
        "truncation_rate": 1 - eos,
        "commonest_5gram": {"text": ngram, "share": share},
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "rewards": {name: _mean(values) for name, values in (rewards or {}).items()},
    }


def _mean(values: Sequence[float]) -> dict[str, float]:
    mean, se = mean_and_se(values)
    return {"mean": mean, "se": se}


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    found = words(text)
    return [tuple(found[start : start + n]) for start in range(len(found) - n + 1)]
