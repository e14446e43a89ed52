"""A file of finished rows that a run can go on from: written in order, a row is there whole or not at all.

What must never happen: a row lost that was said to be written, or one written twice because a run was cut off.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rlhf_ray.errors import ConfigError, DataError, ResourceError


class Journal:
    """JSONL at `path`; use as a context. Rows that an earlier run left are in `rows`; half a last line is cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self.rows.append(json.loads(line))
            except ValueError:
                raise DataError(f"{path}:{number}: is not JSON; a run cannot go on from a damaged file") from None
        self._file = path.open("ab")
        self._file.truncate(len(whole))

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def check(self, marks: Mapping[str, Any]) -> None:
        """Raises ConfigError when an earlier run left rows with other `marks`: half a file each would be of neither."""
        for row in self.rows:
            for key, value in marks.items():
                if row.get(key) != value:
                    raise ConfigError(
                        f"{self.path}: an interrupted run wrote it with {key} {row.get(key)}, but now that is {value}; "
                        "restore what has changed since, or start under another name with name=..."
                    )

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """On disk when this returns. Raises ResourceError when the disk refuses."""
        added = [dict(row) for row in rows]
        try:
            self._file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in added).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ResourceError(f"{self.path}: cannot be written: {error.strerror or error}") from error
        self.rows += added
