"""A checkpoint is there whole or not at all: written aside, renamed, and only then are older ones deleted."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.errors import ResourceError
from rlhf_ray.runtime.digests import content_digest

UNFINISHED, STATE, FILES = ".unfinished", "state.json", "files"


def write(
    folder: Path,
    name: str,
    save: Callable[[Path], dict[str, Any] | None],
    state: dict[str, Any],
    keep: int,
    needed_bytes: int,
) -> Path:
    """`folder/name` with what `save` puts there, and state.json: `state`, what `save` returns, a digest of each file.

    Keeps the `keep` newest.

    Raises ResourceError, before anything is written, when the disk has less than `needed_bytes` free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ResourceError(
            f"checkpoint '{folder / name}' needs {needed_bytes / 2**20:.1f} MiB, and the disk has "
            f"{free / 2**20:.1f} MiB free. Free some, or choose another output_dir; the last checkpoint is untouched"
        )
    aside = folder / (name + UNFINISHED)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        told = save(aside) or {}
        (aside / STATE).write_text(json.dumps({**state, **told, FILES: _digests(aside)}, indent=1))
        _sync(aside)
    except OSError as error:
        what = f"checkpoint '{folder / name}'"
        raise ResourceError(f"{what} cannot be written: {error}; the last checkpoint is untouched") from error
    final = folder / name
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    for old in written(folder)[:-keep]:
        shutil.rmtree(old)
    return final


@dataclass(frozen=True)
class Checkpoint:
    """One that a run can go on from."""

    place: Path
    state: dict[str, Any]


def newest(folder: Path, needs: str, tell: Callable[[str], None]) -> Checkpoint | None:
    """The last checkpoint whose state has `needs` and whose files are what was written; none if there is none.

    `tell` is given a sentence for each that is damaged: an older one is gone on from, and not in silence.
    """
    for place in reversed(written(folder)):
        try:
            state = json.loads((place / STATE).read_text())
            damaged = _damaged(place, state.get(FILES, {}))
        except (OSError, ValueError) as error:
            damaged, state = f"{STATE} cannot be read: {error}", {}
        if damaged:
            tell(f"checkpoint '{place}' is damaged ({damaged}); going on from the one before it, if there is one")
        elif needs in state:
            return Checkpoint(place, state)
    return None


def _damaged(place: Path, files: dict[str, str]) -> str | None:
    for name, digest in files.items():
        if not (place / name).is_file():
            return f"{name} is missing"
        if content_digest(place / name) != digest:
            return f"{name} is not what was written"
    return None


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): content_digest(path) for path in files}


def written(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [place for place in folder.glob(f"*/{STATE}") if not place.parent.name.endswith(UNFINISHED)]
    return [place.parent for place in sorted(found, key=lambda place: place.stat().st_mtime_ns)]


def _sync(folder: Path) -> None:
    """What a rename makes visible must be on disk before it."""
    for place in [*(p for p in folder.rglob("*") if p.is_file()), folder]:
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
