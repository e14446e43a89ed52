"""Files that touch a marker when somebody unpickles or imports them, under the names that loaders look for."""

import json
import pickle
from pathlib import Path
from typing import Any

PICKLES = (
    "pytorch_model.bin",
    "adapter_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "model.pt",
    "consolidated.00.pth",
    "tokenizer.pkl",
    "vocab.pkl",
)


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")


def plant(folder: Path, marker: Path) -> Path:
    """Into a model folder: pickles, modules that its configuration names, an adapter whose weights are a pickle."""
    for name in PICKLES:
        (folder / name).write_bytes(pickle.dumps(Bomb(marker)))
    (folder / "bomb.py").write_text(f"open({str(marker)!r}, 'w')\nclass Bomb: pass\n")
    names = {
        "config.json": ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification"),
        "tokenizer_config.json": ("AutoTokenizer",),
        "generation_config.json": (),
    }
    for name, kinds in names.items():
        file = folder / name
        if file.exists():
            code = {kind: ["bomb.Bomb", "bomb.Bomb"] if kind == "AutoTokenizer" else "bomb.Bomb" for kind in kinds}
            file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": code}))
    return folder
