"""The order in which samples are drawn, a pure function of (seed, position).

The whole state is one integer, so a resumed run draws exactly what the uninterrupted one would have drawn.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.errors import DataError

Indices = NDArray[np.int64]

SHUFFLES_KEPT = 4
"""Epochs whose order is held: what is under way may lie on both sides of a border."""


class SampleOrder:
    """Endless epochs over `size` samples, each epoch its own shuffle; every index exactly once an epoch."""

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError(f"an order needs at least one sample, got size {size}")
        self.size = size
        self.seed = seed
        self.position = 0
        """Samples taken so far, over all epochs."""
        self._shuffled: dict[int, Indices] = {}

    def take(self, n: int) -> Indices:
        """The next `n` indices [n], across epoch borders where need be."""
        if n < 0:
            raise ValueError(f"cannot take {n} samples")
        parts = [np.empty(0, np.int64)]
        while n > 0:
            epoch, start = divmod(self.position, self.size)
            part = self._shuffle(epoch)[start : start + n]
            parts.append(part)
            self.position += len(part)
            n -= len(part)
        return np.concatenate(parts)

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"size": self.size, "seed": self.seed, "position": self.position}

    def restore(self, state: dict[str, int]) -> None:
        """Goes on from `state`. Raises DataError if it was taken over other data or with another seed."""
        for name in ("size", "seed"):
            if state[name] != getattr(self, name):
                raise DataError(
                    f"the checkpoint's sample order has {name} {state[name]}, this run has {getattr(self, name)}; "
                    f"resume with the same data and seed, or start a new run"
                )
        self.position = state["position"]

    def at(self, position: int) -> int:
        """The index that is drawn `position`-th, whatever has been taken."""
        epoch, place = divmod(position, self.size)
        return int(self._shuffle(epoch)[place])

    def _shuffle(self, epoch: int) -> Indices:
        if epoch not in self._shuffled:
            while len(self._shuffled) >= SHUFFLES_KEPT:
                del self._shuffled[min(self._shuffled)]
            self._shuffled[epoch] = self._draw(epoch)
        return self._shuffled[epoch]

    def _draw(self, epoch: int) -> Indices:
        return np.random.default_rng([self.seed, epoch]).permutation(self.size)


class MixedOrder(SampleOrder):
    """Epochs of as many samples as there are, of which every source has its share, whatever its size.

    A source is gone through without replacement, each pass its own shuffle, and goes on in the next epoch where it
    stopped: one with fewer samples than its share is gone through again, one with more is not left out in part.
    """

    def __init__(self, sources: NDArray[np.str_], weights: Mapping[str, float], seed: int) -> None:
        """`sources` [size] name each sample's. Raises DataError for one that would be given no sample."""
        super().__init__(len(sources), seed)
        self.places = {name: np.flatnonzero(sources == name) for name in weights}
        self.counts = dict(zip(weights, proportional(self.size, list(weights.values())), strict=True))
        """Samples of each source in an epoch."""
        for name, count in self.counts.items():
            if count == 0 or len(self.places[name]) == 0:
                raise DataError(
                    f"data.sources.{name}: {count} of the {self.size} rows of an epoch are to be its own, and it has "
                    f"{len(self.places[name])} to train on; raise its weight or leave it out"
                )

    def _draw(self, epoch: int) -> Indices:
        drawn = [self._of_source(number, name, epoch) for number, name in enumerate(self.counts)]
        # Spawn keys set these streams apart from each other and from all others of the same seed.
        return self._random(4, epoch).permutation(np.concatenate(drawn))

    def _of_source(self, number: int, name: str, epoch: int) -> Indices:
        places, count = self.places[name], self.counts[name]
        first = epoch * count
        passes = range(first // len(places), (first + count - 1) // len(places) + 1)
        drawn = np.concatenate([self._random(3, number, one).permutation(places) for one in passes])
        start = first - passes.start * len(places)
        return drawn[start : start + count]

    def _random(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))


def proportional(total: int, weights: list[float]) -> list[int]:
    """`total` in proportion to `weights`, whole: each rounded down, what is left to the largest remainders.

    >>> proportional(10, [1, 1, 2])
    [3, 2, 5]
    """
    exact = np.array(weights, np.float64) / sum(weights) * total
    counts = np.floor(exact).astype(np.int64)
    last = np.argsort(counts - exact, kind="stable")[: total - counts.sum()]
    counts[last] += 1
    return counts.tolist()


def held_out_by_source(sources: NDArray[np.str_], share: float, seed: int) -> tuple[Indices, Indices]:
    """As `held_out_split`, of every source by itself: however small, it is measured. `sources` [size] by name."""
    train, held = [], []
    for name in np.unique(sources):
        places = np.flatnonzero(sources == name)
        learn, kept = held_out_split(len(places), share, seed)
        train.append(places[learn])
        held.append(places[kept])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(held))


def held_out_split(size: int, share: float, seed: int) -> tuple[Indices, Indices]:
    """Ascending (train, held out) indices, disjoint, together all of `range(size)`.

    At least one is held out if `share` > 0 and `size` > 1, and at least one is left to train on if `size` > 0.
    """
    wanted = max(1, round(size * share)) if share > 0 else 0
    held = min(wanted, max(size - 1, 0))
    # A spawn key sets this stream apart from those of the epochs: [seed] and [seed, 0] are the same entropy to numpy.
    shuffled = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,))).permutation(size)
    return np.sort(shuffled[held:]), np.sort(shuffled[:held])
