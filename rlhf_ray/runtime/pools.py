"""Several workers of one role, and which of them gets the next piece of work."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class LeastLoaded:
    """Picks the worker with the least work under way. Pure: it holds numbers, no handles.

    Ties go to the lowest number, so the same requests in the same order go to the same workers.
    """

    workers: int
    load: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.load = self.load or [0.0] * self.workers

    def assign(self, work: float) -> int:
        """The worker that takes `work` (in tokens, say); its load grows by it."""
        worker = min(range(self.workers), key=self.load.__getitem__)
        self.load[worker] += work
        return worker

    def release(self, worker: int, work: float) -> None:
        """`work` that was assigned to `worker` is done."""
        self.load[worker] -= work


def shares(work: Iterable[float], workers: int) -> list[list[int]]:
    """[workers] numbers of the pieces of `work` that each gets, in order."""
    router = LeastLoaded(workers)
    found: list[list[int]] = [[] for _ in range(workers)]
    for piece, amount in enumerate(work):
        found[router.assign(float(amount))].append(piece)
    return found
