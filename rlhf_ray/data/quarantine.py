"""Bad rows are set aside with file, line and reason, and counted; above a configured share the run refuses to start.

No row is dropped without an entry here. One `Quarantine` belongs to one data set: its counts are the numerator of the
share that `check` judges. Of several data sets each is judged by itself, or a large one would hide a small bad one.
"""

import json
from collections import Counter
from pathlib import Path

from rlhf_ray.errors import DataError

EXCERPT_CHARACTERS = 200


class BadRow(DataError):
    """One row cannot be used. The text is `kind: detail`; rows are counted by kind."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")


class Quarantine:
    """Counts bad rows and writes each to `path` as it is found; with no path it only counts."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        """Bad rows by kind of reason, the part before the first ": "."""
        self.first: list[str] = []
        """The first three faults as `file:line: reason`."""
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("", encoding="utf-8")  # faults of an earlier start are not this one's

    def another(self) -> "Quarantine":
        """For a further data set: the same file, counts of its own."""
        other = Quarantine()
        other.path = self.path
        return other

    @property
    def total(self) -> int:
        """Bad rows so far."""
        return self.counts.total()

    def add(self, file: str, line: int, reason: str, row_excerpt: str = "") -> None:
        """Sets one row aside. `line` is a line number from 1, or the row's number in formats that have no lines."""
        self.counts[reason.partition(": ")[0]] += 1
        if len(self.first) < 3:
            self.first.append(f"{file}:{line}: {reason}")
        if self.path is None:
            return
        entry = {"file": file, "line": line, "reason": reason, "excerpt": row_excerpt[:EXCERPT_CHARACTERS]}
        try:
            with self.path.open("a", encoding="utf-8") as out:
                out.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise DataError(f"{self.path}: the quarantine of bad rows cannot be written: {error}") from None

    def check(self, total_rows: int, max_bad_share: float, source: str = "the data set") -> None:
        """Raises DataError when no row of `total_rows` is usable, or the bad share is larger than `max_bad_share`."""
        if total_rows == 0:
            raise DataError(f"{source}: empty data set, it has no rows; check data.path and data.split")
        if self.total >= total_rows:
            raise DataError(f"{source}: all rows bad: none of {total_rows} can be used\n{self._report(total_rows)}")
        if self.total > max_bad_share * total_rows:
            raise DataError(
                f"{source}: {self.total} of {total_rows} rows ({self.total / total_rows:.2%}) cannot be used, more "
                f"than data.max_bad_share = {max_bad_share:.2%}\n{self._report(total_rows)}\n"
                f"mend the rows or, if the run can do without them, raise data.max_bad_share"
            )

    def _report(self, total_rows: int) -> str:
        by_kind = [f"  {kind}: {n} ({n / total_rows:.2%})" for kind, n in self.counts.most_common()]
        everything = f"all of them: {self.path}" if self.path else "all of them: no quarantine file was asked for"
        return "\n".join([*by_kind, "first faults:", *(f"  {fault}" for fault in self.first), everything])
