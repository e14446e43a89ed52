"""What tests of supervised stages share: rows as a file, and the settings of a small run."""

import json
from pathlib import Path
from typing import Any


def written(rows: list[dict[str, Any]], file: Path) -> str:
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def settings(
    model: str,
    data: str,
    folder: Path,
    max_tokens: int = 32,
    sequences_per_step: int = 12,
    learning_rate: float = 1e-2,
    **changes: Any,
) -> dict[str, Any]:
    return {
        "name": "run",
        "output_dir": str(folder / "runs"),
        "model": model,
        "data": {"path": data, "max_tokens": max_tokens},
        "telemetry": {"wandb": "off"},
        "training": {
            "epochs": 4,
            "sequences_per_step": sequences_per_step,
            "tokens_per_micro_batch": 128,
            "held_out_share": 0.2,
            "optimizer": {"learning_rate": learning_rate},
        },
        **changes,
    }
