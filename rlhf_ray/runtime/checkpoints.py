"""A checkpoint is there whole or not at all: written aside, renamed, and only then are older ones deleted."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_ray.errors import ResourceError

UNFINISHED = ".unfinished"


def write(
    folder: Path, name: str, save: Callable[[Path], None], state: dict[str, Any], keep: int, needed_bytes: int
) -> Path:
    """`folder/name` with what `save` puts there and `state` as state.json. Keeps the `keep` newest.

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
        save(aside)
        (aside / "state.json").write_text(json.dumps(state, indent=1))
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


def written(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [place for place in folder.glob("*/state.json") if not place.parent.name.endswith(UNFINISHED)]
    return [place.parent for place in sorted(found, key=lambda place: place.stat().st_mtime_ns)]


def _sync(folder: Path) -> None:
    """What a rename makes visible must be on disk before it."""
    for place in [*(p for p in folder.rglob("*") if p.is_file()), folder]:
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
