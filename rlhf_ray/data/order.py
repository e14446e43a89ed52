"""The order in which samples are drawn, a pure function of (seed, position).

The whole state is one integer, so a resumed run draws exactly what the uninterrupted one would have drawn.
"""

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.errors import DataError

Indices = NDArray[np.int64]


class SampleOrder:
    """Endless epochs over `size` samples, each epoch its own shuffle; every index exactly once an epoch."""

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError(f"an order needs at least one sample, got size {size}")
        self.size = size
        self.seed = seed
        self.position = 0
        """Samples taken so far, over all epochs."""
        self._epoch = -1
        self._shuffled: Indices = np.empty(0, np.int64)

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

    def _shuffle(self, epoch: int) -> Indices:
        if epoch != self._epoch:
            self._epoch = epoch
            self._shuffled = np.random.default_rng([self.seed, epoch]).permutation(self.size)
        return self._shuffled


def held_out_split(size: int, share: float, seed: int) -> tuple[Indices, Indices]:
    """Ascending (train, held out) indices, disjoint, together all of `range(size)`.

    At least one is held out if `share` > 0 and `size` > 1, and at least one is left to train on if `size` > 0.
    """
    wanted = max(1, round(size * share)) if share > 0 else 0
    held = min(wanted, max(size - 1, 0))
    # A spawn key sets this stream apart from those of the epochs: [seed] and [seed, 0] are the same entropy to numpy.
    shuffled = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,))).permutation(size)
    return np.sort(shuffled[held:]), np.sort(shuffled[:held])
