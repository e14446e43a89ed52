"""The most memory that this process and all it started held at the same time."""

import threading
from types import TracebackType

import psutil


class PeakMemory:
    """A context; `peak_bytes` is the largest sum of resident sizes seen, half a second apart.

    Pages that processes share count once for each, so the figure is an upper bound.
    """

    EVERY_S = 0.5

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="peak-memory")

    def __enter__(self) -> "PeakMemory":
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self.EVERY_S):
            self._look()

    def _look(self) -> None:
        own = psutil.Process()
        total = 0
        for process in [own, *own.children(recursive=True)]:
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        self.peak_bytes = max(self.peak_bytes, total)
