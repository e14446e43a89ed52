"""Whether good answers can be told from bad ones without reading the question: a bag of words, and nothing else."""

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Pair = tuple[str, str]
"""(good, bad)"""


def unigrams(text: str) -> Counter[str]:
    """How often each word and each mark of punctuation occurs."""
    return Counter(re.findall(r"[\w']+|[^\w\s]", text.lower()))


def presence(text: str) -> Counter[str]:
    """Which of them occur at all."""
    return Counter(set(unigrams(text)))


def characters(text: str) -> Counter[str]:
    """Runs of two to four characters."""
    return Counter(text.lower()[at : at + n] for n in (2, 3, 4) for at in range(len(text) - n + 1))


def differences(pairs: Sequence[Pair], bag: Callable[[str], Counter[str]]) -> NDArray[np.float64]:
    """[P, V] counts of the good answer less those of the bad one."""
    bags = [(bag(good), bag(bad)) for good, bad in pairs]
    column = {word: at for at, word in enumerate(sorted({word for both in bags for one in both for word in one}))}
    x = np.zeros((len(pairs), len(column)))
    for row, (good, bad) in enumerate(bags):
        for sign, counts in ((1, good), (-1, bad)):
            for word, count in counts.items():
                x[row, column[word]] += sign * count
    return x


def gram(pairs: Sequence[Pair], bag: Callable[[str], Counter[str]] = unigrams) -> NDArray[np.float64]:
    """[P, P] inner products of the differences: all that a linear classifier sees of them."""
    x = differences(pairs, bag)
    return x @ x.T


def found_out(products: NDArray[np.float64], folds: int = 8, seeds: int = 5) -> float:
    """Accuracy of logistic regression (L2, weight 1) on held-out pairs, the mean over `seeds` splits into `folds`.

    `products` [P, P] are of `gram`. Without an intercept a pair and its mirror image are one, so that which of the two
    answers stands first is no matter, and of every pair the good one does here.
    """
    everything, right = np.arange(len(products)), []
    for seed in range(seeds):
        for held_out in np.array_split(np.random.default_rng(seed).permutation(everything), folds):
            seen = np.setdiff1d(everything, held_out)
            margins = products[np.ix_(held_out, seen)] @ _multipliers(products[np.ix_(seen, seen)])
            right += list(0.5 + 0.5 * np.sign(margins))
    return float(np.mean(right))


def _multipliers(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """a of the minimum, where the weights are the differences' sum weighted by a, and a = 1 - sigmoid(margin)."""
    a = np.zeros(len(products))
    for _ in range(30):  # Newton's method
        miss = 1 / (1 + np.exp(np.clip(products @ a, -500, 500)))
        step = np.linalg.solve(np.eye(len(a)) + (miss * (1 - miss))[:, None] * products, a - miss)
        a -= step
        if np.abs(step).max() < 1e-9:
            break
    return a
