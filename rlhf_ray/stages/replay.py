"""`rlhf-ray replay FOLDER`: the batch that broke an invariant once more, on one process, without Ray and DeepSpeed.

The kept policy reads the kept answers again. Where what it says now differs from what the run noted, the fault lies in
how the run computed or passed it on; where both agree, it lies in the numbers that the roles sent.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_ray.actors import experience, objective
from rlhf_ray.actors.evidence import CRITIC, POLICY, Evidence, read
from rlhf_ray.actors.objective import Rows
from rlhf_ray.actors.reference import form_of
from rlhf_ray.actors.scoring import packs_of
from rlhf_ray.algorithms.logprobs import TokenStatistics
from rlhf_ray.config.ppo import Coupled
from rlhf_ray.models import load
from rlhf_ray.models.device import torch_device
from rlhf_ray.models.heads import TokenLogprobs, Values

WORST = 5
"""Tokens that are shown."""


def replay(folder: Path) -> str:
    """What there is to see, as text. Raises DataError when `folder` is not what a run leaves."""
    evidence = read(folder)
    columns = _columns(evidence)
    batch = evidence.batch
    lines = [
        f"update {evidence.about['update']}: {evidence.about['error']}",
        f"{len(batch)} answers, {batch.trajectories.tokens} tokens, beta {evidence.about['kl_coefficient']:g}",
        "",
        *_table(["column", "finite", "mean", "smallest", "largest"], [_summary(*pair) for pair in columns.items()]),
        "",
        *_differences(evidence, columns),
        "",
        *_worst(evidence, columns),
    ]
    return "\n".join(lines)


def _columns(evidence: Evidence) -> dict[str, Tensor]:
    """Name -> [N] or [B]: what was noted, and what comes out now."""
    batch, config = evidence.batch, evidence.config
    policy, values = _read_again(evidence)
    noted = {f"noted {name.replace('_', ' ')}": column for name, column in evidence.experience.items()}
    columns = {
        "scores": batch.scores,
        **dict(zip(config.reward.details, batch.details.unbind(1), strict=True)),
        "sampler logprobs": torch.from_numpy(batch.trajectories.sampler_logprobs),
        "reference logprobs": torch.from_numpy(batch.reference.logprobs),
        **{name: column for name, column in noted.items() if name != "noted reference logprobs"},
        "policy logprobs": policy.logprobs,
        "entropy": policy.entropy,
    }
    if values is not None:
        columns["critic's values"] = values
    again = experience.build(batch, policy, values, config, float(evidence.about["kl_coefficient"]))
    rows = np.arange(len(batch))
    everything = Rows(batch, rows)
    tokens = objective.policy_tokens(policy, again, everything, config, float(evidence.about["kl_coefficient"]))
    return columns | {"advantages": again.advantages, "policy loss": tokens.total}


@torch.no_grad()
def _read_again(evidence: Evidence) -> tuple[TokenStatistics, Tensor | None]:
    """Of all N tokens."""
    config, batch = evidence.config, evidence.batch
    device = torch_device(config.device)
    model = load.causal_lm(str(evidence.folder / POLICY), config.device, config.trust_remote_code)
    policy = TokenLogprobs(model, config.rollout.temperature).eval()
    head = None
    if form_of(config.ppo.kl) == "hidden":  # the reference is the model that the run began with
        head = load.frozen_head(load.causal_lm(config.policy, config.device, config.trust_remote_code))
    critic = _critic(evidence) if (evidence.folder / CRITIC).exists() else None
    parts: list[tuple[Tensor, ...]] = []
    places = []
    for rows, packed in packs_of(batch.trajectories, config.learner.tokens_per_micro_batch, device):
        some = Rows(batch, np.array(rows))
        found = policy(packed, objective.reference_rows(some, config, head, device))
        parts.append((*(column for column in found if column is not None), *([critic(packed)] if critic else [])))
        places.append(some.places)
    order = torch.cat(places).argsort()
    columns = [torch.cat(column)[order].cpu() for column in zip(*parts, strict=True)]
    values = columns.pop() if critic else None
    return TokenStatistics(*columns), values


def _critic(evidence: Evidence) -> Values:
    from safetensors.torch import load_file

    config = evidence.config
    kind = load.classifier if config.reward.members else load.causal_lm
    critic = Values(kind(config.critic_body, config.device, config.trust_remote_code).base_model)
    critic.load_state_dict(load_file(evidence.folder / CRITIC))
    return critic.eval()


def _summary(name: str, column: Tensor) -> list[str]:
    finite = column[torch.isfinite(column)].double()
    shown = [f"{value:.4g}" for value in (finite.mean(), finite.min(), finite.max())] if len(finite) else ["-"] * 3
    return [name, f"{len(finite)} of {len(column)}", *shown]


def _differences(evidence: Evidence, columns: dict[str, Tensor]) -> Iterator[str]:
    """How far what the kept policy says is from what others said of the same tokens."""
    now = columns["policy logprobs"]
    pairs = {"the sampler": "sampler logprobs", "the reference": "reference logprobs"}
    if not isinstance(evidence.config.ppo.correction, Coupled):  # there the old ones are the sampler's
        pairs = {"the run's own before the update": "noted old logprobs", **pairs}
    for said, name in pairs.items():
        if name in columns:
            apart = (now - columns[name]).abs()
            yield f"policy now against {said}: mean {apart.mean():.3g}, largest {apart.max():.3g} nats"


def _worst(evidence: Evidence, columns: dict[str, Tensor]) -> Iterator[str]:
    """Tokens that are not finite somewhere, then those with the largest loss."""
    batch = evidence.batch
    of_tokens = {name: column for name, column in columns.items() if len(column) == batch.trajectories.tokens}
    broken = torch.stack([~torch.isfinite(column) for column in of_tokens.values()]).any(0)
    size = columns["policy loss"].abs().masked_fill(broken, torch.inf)
    tokenizer: Any = load.tokenizer(str(evidence.folder / POLICY), "policy", evidence.config.trust_remote_code)
    names = list(of_tokens)
    rows = []
    for place in size.nan_to_num(torch.inf).argsort(descending=True)[:WORST].tolist():
        row = int(np.searchsorted(batch.trajectories.responses.offsets, place, side="right")) - 1
        token = tokenizer.decode([int(batch.trajectories.responses.values[place])])
        at = place - int(batch.trajectories.responses.offsets[row])
        numbers = [f"{of_tokens[name][place].item():.4g}" for name in names]
        rows.append([str(batch.trajectories.sample_ids[row]), str(at), json.dumps(token), *numbers])
    yield "worst tokens"
    yield from _table(["sample", "place", "token", *names], rows)


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [header, *rows])
    return [f"  {line}".rstrip() for line in lines]
