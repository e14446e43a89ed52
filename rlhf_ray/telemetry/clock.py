"""Where the wall time of an update goes, as its driver sees it.

The phases of an update plus `time/other` are its whole wall time: a second is in exactly one of them, so that a slow
phase cannot hide. Hence phases never nest.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PHASES = ("generate", "score", "learn", "publish", "checkpoint")


class PhaseClock:
    """Accumulates seconds by phase from its making, or from the last `finish`.

    >>> clock = PhaseClock()
    >>> with clock.phase("generate"):
    ...     pass
    >>> sorted(clock.finish())[:2]
    ['time/checkpoint', 'time/generate']
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._open: str | None = None
        self._restart()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the block's seconds to `name`, also when it raises. ValueError: unknown or nested."""
        if name not in PHASES:
            raise ValueError(f"no phase '{name}'; phases are {', '.join(PHASES)}")
        if self._open is not None:
            raise ValueError(f"phase '{name}' inside phase '{self._open}': a second belongs to one phase")
        self._open, began = name, self._now()
        try:
            yield
        finally:
            self._seconds[name] += self._now() - began
            self._open = None

    def finish(self) -> dict[str, float]:
        """`time/<phase>` for all phases, `time/other` (the rest) and `time/update` (their sum) in seconds; restarts."""
        if self._open is not None:
            raise ValueError(f"the update cannot finish inside phase '{self._open}'")
        seconds, total = self._seconds, self._now() - self._began
        self._restart()
        return {
            **{f"time/{name}": spent for name, spent in seconds.items()},
            "time/other": total - sum(seconds.values()),
            "time/update": total,
        }

    def _restart(self) -> None:
        self._began = self._now()
        self._seconds = dict.fromkeys(PHASES, 0.0)
