"""What an offline W&B run recorded, read back by W&B's own tool."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def records(folder: Path, pattern: str = "offline-run-*") -> list[dict[str, Any]]:
    """What the one W&B run of a run folder recorded, each `{"type": ..., <type>: {...}}`."""
    [file] = (folder / "wandb").glob(f"{pattern}/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    return [json.loads(line) for line in listing.stdout.splitlines()]


def of(kind: str, recorded: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record[kind] for record in recorded if record["type"] == kind]


def logged(recorded: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of metrics: W&B's own columns and tables left out."""
    rows = [
        {name: value for name, value in history["item"].items() if not name.startswith(("_", "samples."))}
        for history in of("history", recorded)
    ]
    return [row for row in rows if len(row) > 1]
