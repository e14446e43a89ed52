"""How large a model is, found without loading it: the weights' own headers, else config.json, else the name.

Nothing is downloaded. A size that was read off a name says so, and one that cannot be known stays unknown.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import log, prod
from pathlib import Path
from typing import Any, Literal

from rlhf_ray.errors import ModelError

_LARGEST_HEADER_BYTES = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class ModelSize:
    """What a dry run needs to know of a model."""

    parameters: int | None = None
    """None: unknown."""
    source: Literal["weights", "config.json", "name", "unknown"] = "unknown"
    """Where `parameters` was read; from a name it is an estimate."""
    head: int = 0
    """Parameters of an output head with its own weights, which a critic does without."""
    kv_values_per_token: int | None = None
    """Numbers the KV cache holds for each token: 2 * layers * KV heads * head dimension."""


@dataclass(frozen=True)
class ModelShape:
    """What the work of a model's passes depends on."""

    parameters: int
    body: int
    """Parameters in matrix products, but for the output head: an embedding is only looked up."""
    head: int
    """Of a language model's output head, tied to the embedding or not; a critic and a reward model do without."""
    layers: int
    heads: int
    """Of queries."""
    kv_heads: int
    head_dimension: int
    source: Literal["config.json", "name"] = "config.json"
    """From a name it is the shape of the Llama 3 nearest in size, its embedding taken for part of the body."""


_LLAMAS = (
    (1_240_000_000, (16, 32, 8, 64)),
    (3_210_000_000, (28, 24, 8, 128)),
    (8_030_000_000, (32, 32, 8, 128)),
    (70_600_000_000, (80, 64, 8, 128)),
    (406_000_000_000, (126, 128, 8, 128)),
)
"""Parameters; layers, heads, KV heads and head dimension, as published."""


def model_size(name: str) -> ModelSize:
    """Size of a local folder or of a hub name in the local cache. Raises ModelError when a file in it is damaged."""
    folder = _folder(name)
    config = _config(folder / "config.json") if folder else {}
    weights = _shapes(folder) if folder else {}
    kv_values = _kv_values_per_token(config)
    if weights:
        head = prod(weights.get("lm_head.weight", [0]))
        return ModelSize(sum(prod(shape) for shape in weights.values()), "weights", head, kv_values)
    counted = _count(config)
    if counted:
        return ModelSize(counted[0], "config.json", counted[1], kv_values)
    named = _read_off(name)
    return ModelSize(named, "name" if named else "unknown", 0, kv_values)


def model_shape(name: str) -> ModelShape | None:
    """Of a local folder or hub name as for `model_size`, else of its name; None: the size is unknown."""
    size, folder = model_size(name), _folder(name)
    parameters = size.parameters
    if parameters is None:
        return None
    config = _config(folder / "config.json") if folder else {}
    if not _count(config):
        # By ratio: sizes lie orders of magnitude apart.
        nearest = min(_LLAMAS, key=lambda known: abs(log(known[0] / parameters)))
        return ModelShape(parameters, parameters, 0, *nearest[1], source="name")
    embedding, heads = config["vocab_size"] * config["hidden_size"], config["num_attention_heads"]
    return ModelShape(
        parameters,
        body=parameters - size.head - embedding,
        head=0 if _is_classifier(config) else embedding,
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dimension=_head_dimension(config),
    )


def weight_shapes(name: str) -> dict[str, list[int]]:
    """Name -> shape of every weight, from the files' headers alone; nothing where no file is at hand."""
    folder = _folder(name)
    return _shapes(folder) if folder else {}


def adapter_parameters(name: str, rank: int, targets: Sequence[str]) -> int | None:
    """Of adapters on linear layers whose names end in `targets`, or on all of them; None: shapes are not at hand."""
    linear = {key.removesuffix(".weight"): shape for key, shape in weight_shapes(name).items() if len(shape) == 2}
    chosen = [
        shape
        for key, shape in linear.items()
        if not any(part in key for part in ("embed", "lm_head", "score", "wte", "wpe"))
        and (targets == "all-linear" or any(f".{key}".endswith(f".{target}") for target in targets))
    ]
    return rank * sum(map(sum, chosen)) if chosen else None


def q_head_parameters(name: str) -> tuple[int, int] | None:
    """Of V, Q1 and Q2 on it, and of Q1 and Q2 alone, see `models/q_heads.py`; None: no config.json is at hand."""
    folder = _folder(name)
    config = _config(folder / "config.json") if folder else {}
    hidden, vocabulary = config.get("hidden_size"), config.get("vocab_size")
    if not isinstance(hidden, int) or not isinstance(vocabulary, int):
        return None
    inner = (hidden + 1) * 2 * hidden
    both = 2 * (inner + (2 * hidden + 1) * vocabulary)
    return both + inner + 2 * hidden + 1, both


def _folder(name: str) -> Path | None:
    if Path(name).is_dir():
        return Path(name)
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"models--{name.replace('/', '--')}"
    try:
        revision = (hub / "refs" / "main").read_text().strip()
    except OSError:
        return None
    return hub / "snapshots" / revision


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path}: is not a model's config.json: {error}; save or download the model again") from None


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Name -> shape of every tensor in the folder's safetensors files, from their headers alone."""
    return {name: shape for path in sorted(folder.glob("*.safetensors")) for name, shape in _header(path).items()}


def _header(path: Path) -> dict[str, list[int]]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= _LARGEST_HEADER_BYTES else b""
    try:
        return {name: entry["shape"] for name, entry in json.loads(text).items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError):
        raise ModelError(f"{path}: is not a safetensors file (a Git LFS pointer?); download the model again") from None


def _count(config: dict[str, Any]) -> tuple[int, int] | None:
    """Parameters of a Llama-like dense model, and those of its untied head; None if `config` is not of one."""
    keys = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "vocab_size")
    if not all(isinstance(config.get(key), int) for key in keys) or any("expert" in key for key in config):
        return None
    hidden, layers, intermediate, heads, vocabulary = (config[key] for key in keys)
    queries = heads * _head_dimension(config)
    keys_and_values = 2 * (config.get("num_key_value_heads") or heads) * _head_dimension(config)
    layer = hidden * (2 * queries + keys_and_values) + 3 * hidden * intermediate + 2 * hidden
    if config.get("attention_bias") or config.get("model_type") == "qwen2":
        layer += queries + keys_and_values
    body = vocabulary * hidden + layers * layer + hidden
    if _is_classifier(config):
        return body + hidden * max(1, len(config.get("id2label", {}))), 0
    head = 0 if config.get("tie_word_embeddings") else vocabulary * hidden
    return body + head, head


def _is_classifier(config: dict[str, Any]) -> bool:
    return any("SequenceClassification" in name for name in config.get("architectures") or [])


def _kv_values_per_token(config: dict[str, Any]) -> int | None:
    layers, heads = config.get("num_hidden_layers"), config.get("num_attention_heads")
    if not layers or not heads or not config.get("hidden_size"):
        return None
    return 2 * layers * (config.get("num_key_value_heads") or heads) * _head_dimension(config)


def _head_dimension(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _read_off(name: str) -> int | None:
    """8_000_000_000 for `Llama-3.1-8B-Instruct`; the last such mark counts."""
    marks = re.findall(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", name.lower())
    if not marks:
        return None
    number, unit = marks[-1]
    return round(float(number) * {"b": 1e9, "m": 1e6}[unit])
