"""What a file or a folder holds, as one number: how a pipeline knows whether something has to be made again.

A digest follows content and names alone, never times or places: what is made again and comes out the same is the same.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from rlhf_ray.telemetry.run_folder import write_atomically

PIECE_BYTES = 1 << 22


class Digests:
    """Digests of files, remembered in `memory` for as long as a file's size and time of change stay the same."""

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._known: dict[str, list[Any]] = json.loads(memory.read_text()) if memory.exists() else {}

    def of(self, path: Path) -> str:
        """In hexadecimal. Of a folder: of its files and their names, hidden ones left out."""
        if path.is_file():
            return self._file(path)
        total = xxhash.xxh3_128()
        for file in _files(path):
            total.update(f"{file.relative_to(path).as_posix()}\0{self._file(file)}\n".encode())
        return total.hexdigest()

    def keep(self) -> None:
        """Writes what is known to `memory`."""
        write_atomically(self._memory, json.dumps(self._known))

    def _file(self, path: Path) -> str:
        stat = path.stat()
        mark = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        known = self._known.get(str(path.resolve()))
        if known and known[:3] == mark:
            return known[3]
        digest = content_digest(path)
        self._known[str(path.resolve())] = [*mark, digest]
        return digest


def content_digest(path: Path) -> str:
    """Of one file, read anew."""
    content = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            content.update(piece)
    return content.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files(path)
        else:
            yield path
