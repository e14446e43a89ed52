"""What `ps` shows of the processes that a test has started."""

import os
from pathlib import Path


def descendants() -> list[int]:
    """Processes that this one has started, theirs too; Ray's detach themselves from nothing but the terminal."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
    found = [os.getpid()]
    for number in found:
        found += [child for child, parent in parents.items() if parent == number]
    return found


def command_lines() -> list[str]:
    lines = []
    for number in descendants():
        try:
            lines.append(Path(f"/proc/{number}/cmdline").read_text())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return lines
