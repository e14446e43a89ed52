"""Ctrl-C and SIGTERM (`ray job stop`, a preempted machine) become one exception, raised where a run can end cleanly.

A signal only sets a flag; waits look at it. Nothing is cut off in the middle of a Ray call.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rlhf_ray.errors import StopRequested


class Interrupt:
    """The process's one flag."""

    received: int | None = None

    @classmethod
    def check(cls) -> None:
        """Raises StopRequested when a signal has come."""
        if cls.received is not None:
            raise StopRequested(f"stopped by {signal.Signals(cls.received).name}")

    @classmethod
    @contextmanager
    def deferred(cls) -> Iterator[None]:
        """Within it, work that must finish (saving, letting actors go) is not stopped by the same signal again."""
        received, cls.received = cls.received, None
        try:
            yield
        finally:
            cls.received = received or cls.received


@contextmanager
def stoppable() -> Iterator[None]:
    """Within it, SIGINT and SIGTERM set the flag; a second SIGINT ends the process in Python's own way."""

    def note(number: int, frame: FrameType | None) -> None:
        if Interrupt.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        Interrupt.received = number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        Interrupt.received = None
        for number, handler in before.items():
            signal.signal(number, handler)
