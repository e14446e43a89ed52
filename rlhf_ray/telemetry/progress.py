"""What a person watching sees: a bar in a terminal, else one line an update. All of it goes to stderr."""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TextIO

from rlhf_ray.telemetry.secrets import redact


class Progress(ABC):
    """Use as a context manager, or `close` it."""

    @abstractmethod
    def advance(self, done: int = 1, **shown: Any) -> None:
        """So many updates more are done; `shown` are a few values worth seeing, such as `score=1.2`."""

    @abstractmethod
    def close(self) -> None:
        """Safe to call twice."""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def say(text: str) -> None:
    """One line for the person, secrets masked."""
    print(redact(text), file=sys.stderr, flush=True)


def console() -> Any:
    """A rich console on stderr. A log has no width, and rich's assumption would cut lines there."""
    from rich.console import Console

    found = Console(stderr=True)
    return found if found.is_terminal else Console(stderr=True, width=160)


def progress(total: int, what: str, done: int = 0) -> Progress:
    """For `total` updates of which `done` are done already."""
    if sys.stderr.isatty():
        return Bar(total, what, done)
    return Lines(total, what, done)


class Bar(Progress):
    def __init__(self, total: int, what: str, done: int = 0) -> None:
        from rich import progress as rich

        self._bar = rich.Progress(
            rich.TextColumn("{task.description}"),
            rich.BarColumn(bar_width=30),
            rich.MofNCompleteColumn(),
            rich.TimeElapsedColumn(),
            rich.TextColumn("eta"),
            rich.TimeRemainingColumn(),
            rich.TextColumn("{task.fields[shown]}", markup=False),
            console=console(),
        )
        self._bar.start()
        self._task = self._bar.add_task(what, total=total, completed=done, shown="")

    def advance(self, done: int = 1, **shown: Any) -> None:
        self._bar.update(self._task, advance=done, shown=_values(shown))

    def close(self) -> None:
        self._bar.stop()


class Lines(Progress):
    """For logs: `14:03:12  ppo 3/40  score 1.25  kl 0.8  eta 2:31`."""

    def __init__(
        self,
        total: int,
        what: str,
        done: int = 0,
        now: Callable[[], float] = time.monotonic,
        out: TextIO | None = None,
    ) -> None:
        self._total, self._what, self._done = total, what, done
        self._now, self._out = now, out
        self._began, self._skipped = now(), done

    def advance(self, done: int = 1, **shown: Any) -> None:
        self._done += done
        each_s = (self._now() - self._began) / (self._done - self._skipped)
        eta = _duration(each_s * max(0, self._total - self._done))
        parts = [time.strftime("%H:%M:%S"), f"{self._what} {self._done}/{self._total}", _values(shown), f"eta {eta}"]
        print("  ".join(part for part in parts if part), file=self._out or sys.stderr, flush=True)

    def close(self) -> None:
        pass


def _values(shown: dict[str, Any]) -> str:
    return "  ".join(f"{name} {_value(value)}" for name, value in shown.items())


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    """`2:05` or `1:02:05`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
