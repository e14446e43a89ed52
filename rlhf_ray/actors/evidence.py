"""The batch that broke an invariant, as files that one process can look at again: `rlhf-ray replay FOLDER`.

batch.safetensors       what the roles sent and what the learner made of it, all columns
policy/                 the policy as it was then, a Hugging Face folder
critic.safetensors      the critic as it was then, where there is one
config.yaml             the run's
about.json              what was broken, in which update, under which beta
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
import yaml

from rlhf_ray.actors.experience import Batch, Experience
from rlhf_ray.config.load import dump, load
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.errors import DataError
from rlhf_ray.records import ReferenceColumns, Trajectories
from rlhf_ray.telemetry.secrets import redact_values

BATCH, ABOUT, CONFIG, POLICY, CRITIC = "batch.safetensors", "about.json", "config.yaml", "policy", "critic.safetensors"
COLUMNS = ("old_logprobs", "reference_logprobs", "advantages", "weights", "values", "returns")
"""Of the experience, all [N]."""


@dataclass(frozen=True)
class Evidence:
    """Read back."""

    config: PPOConfig
    about: dict[str, Any]
    batch: Batch
    experience: dict[str, torch.Tensor]
    """Columns [N]; empty where none were made."""
    folder: Path


def write(
    folder: Path, config: PPOConfig, batch: Batch, experience: Experience | None, about: Mapping[str, Any]
) -> None:
    """Everything but the weights."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    columns = _flat("trajectories", batch.trajectories) | _flat("reference", batch.reference)
    columns["scores"], columns["details"] = batch.scores.numpy(), batch.details.numpy()
    for name in COLUMNS:
        column = getattr(experience, name, None)
        if column is not None:
            columns[f"experience.{name}"] = column.numpy()
    save_file({name: np.ascontiguousarray(column) for name, column in columns.items()}, folder / BATCH)
    # For people to pass on: what is secret in the run's own files is secret here.
    told = yaml.safe_dump(redact_values(yaml.safe_load(dump(config))), sort_keys=False)
    (folder / CONFIG).write_text(told, encoding="utf-8")
    (folder / ABOUT).write_text(json.dumps(redact_values(dict(about)), indent=1), encoding="utf-8")


def write_critic(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Weights by name, whole and in host memory."""
    from safetensors.torch import save_file

    save_file(weights, folder / CRITIC)


def read(folder: Path) -> Evidence:
    """Raises DataError when `folder` is not what `write` leaves."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    missing = [name for name in (BATCH, CONFIG, ABOUT, POLICY) if not (folder / name).exists()]
    if missing:
        raise DataError(
            f"'{folder}' has no {', '.join(missing)}; expected a folder that a run leaves at "
            "runs/NAME/evidence/update_NUMBER when it breaks an invariant"
        )
    try:
        columns = load_file(folder / BATCH)
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (SafetensorError, ValueError) as error:
        raise DataError(f"'{folder}' is damaged: {error}") from None
    batch = Batch(
        _deep(Trajectories, "trajectories", columns),
        _deep(ReferenceColumns, "reference", columns),
        torch.from_numpy(columns["scores"]),
        torch.from_numpy(columns["details"]),
    )
    experience = {
        name: torch.from_numpy(columns[f"experience.{name}"]) for name in COLUMNS if f"experience.{name}" in columns
    }
    return Evidence(load(PPOConfig, folder / CONFIG), about, batch, experience, folder)


def _flat(name: str, record: Any) -> dict[str, np.ndarray]:
    """Dotted name -> array of everything in a record."""
    if isinstance(record, np.ndarray):
        return {name: record}
    return {
        key: column
        for field in fields(record)
        for key, column in _flat(f"{name}.{field.name}", getattr(record, field.name)).items()
    }


def _deep(kind: Any, name: str, columns: Mapping[str, np.ndarray]) -> Any:
    """Back from `_flat`."""
    hints = get_type_hints(kind)
    parts = {
        field.name: _deep(hints[field.name], f"{name}.{field.name}", columns)
        if is_dataclass(hints[field.name])
        else columns[f"{name}.{field.name}"]
        for field in fields(kind)
    }
    return kind(**parts)
