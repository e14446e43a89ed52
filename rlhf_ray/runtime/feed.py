"""Live word from workers to the driver, and the one word back: stop.

Ray Train hands metrics over one at a time, at its own polling pace, to its controller and not to the driver. This
actor keeps what workers say until the driver has read it; nothing that was said is lost when a read is cut short.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from rlhf_ray.errors import RLHFError


@dataclass(frozen=True)
class Joined:
    """A worker is up."""

    rank: int
    actor: Any
    """Its handle, by which the driver can end it."""


@dataclass(frozen=True)
class At:
    """What the workers are about to do."""

    doing: str


@dataclass(frozen=True)
class Logged:
    """Metrics of one step."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Saved:
    """A checkpoint was written."""

    path: str
    report: dict[str, Any] = field(default_factory=dict)
    """What the run's summary says of the model besides its metrics."""


@dataclass(frozen=True)
class Failed:
    """A worker raised."""

    rank: int
    error: RLHFError | str
    """The error a person can act on, or the type and text of another."""


Word = Joined | At | Logged | Saved | Failed


class Feed:
    """An asynchronous Ray actor."""

    def __init__(self) -> None:
        self.words: list[Word] = []
        self.forgotten = 0
        self.stop = False
        self.news = asyncio.Event()

    async def tell(self, word: Word) -> bool:
        """Whether a stop was asked for."""
        self.words.append(word)
        self.news.set()
        return self.stop

    async def hear(self, after: int, timeout_s: float) -> list[Word]:
        """All words after the first `after`, waiting at most `timeout_s` for one. Words before are forgotten."""
        self.words = self.words[after - self.forgotten :]
        self.forgotten = after
        if not self.words:
            self.news.clear()
            try:
                await asyncio.wait_for(self.news.wait(), timeout_s)
            except TimeoutError:
                return []
        return list(self.words)

    async def ask_stop(self) -> None:
        """From now on `tell` answers that a stop was asked for."""
        self.stop = True
