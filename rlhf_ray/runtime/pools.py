"""Several workers of one role, and which of them gets the next piece of work. Pure: numbers, no handles."""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class LeastLoaded:
    """Picks the worker with the least work under way.

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


class Router:
    """Workers that come and go, each with room for so much: what none has room for has to wait.

    The next piece goes to the worker that is the least full, in proportion to its room; ties to the lowest number. A
    worker without work takes a piece of any size. A choice costs the logarithm of the number of workers.
    """

    def __init__(self) -> None:
        self._room: dict[int, float] = {}
        self._load: dict[int, float] = {}
        self._fullness: list[tuple[float, int]] = []
        """A heap of (load / room, worker); entries that are no longer true are thrown away when they come up."""

    def add(self, worker: int, room: float) -> None:
        self._room[worker], self._load[worker] = room, 0.0
        self._note(worker)

    def remove(self, worker: int) -> None:
        del self._room[worker], self._load[worker]

    def place(self, work: float) -> int | None:
        """The worker that takes `work`, whose load grows by it; none while all are full."""
        while self._fullness and not self._is_true(*self._fullness[0]):
            heapq.heappop(self._fullness)
        if not self._fullness:
            return None
        worker = self._fullness[0][1]
        if self._load[worker] and self._load[worker] + work > self._room[worker]:
            return None
        self._load[worker] += work
        self._note(worker)
        return worker

    def release(self, worker: int, work: float) -> None:
        """`work` that was placed there is done."""
        self._load[worker] -= work
        if self._load[worker] < 1e-6:  # what is left of rounding
            self._load[worker] = 0.0
        self._note(worker)

    def _note(self, worker: int) -> None:
        if len(self._fullness) > 8 * len(self._room) + 64:
            self._fullness = [(self._load[one] / room, one) for one, room in self._room.items() if one != worker]
            heapq.heapify(self._fullness)
        heapq.heappush(self._fullness, (self._load[worker] / self._room[worker], worker))

    def _is_true(self, fullness: float, worker: int) -> bool:
        return worker in self._room and self._load[worker] / self._room[worker] == fullness
