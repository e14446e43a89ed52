"""The frozen policy: what it says of tokens that others sampled. Its weights never change, and it can prove so.

Whatever form the KL takes, the reference never ships logits: V floats a token. It sends one log-probability a token,
and for a KL over the whole vocabulary either its log-probabilities at the sampler's likeliest tokens or its final
hidden states, from which a learner that holds the same output head computes the logits again.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rlhf_ray.actors.scoring import packs_of
from rlhf_ray.config.ppo import KLConfig
from rlhf_ray.models import heads, load
from rlhf_ray.models.device import Device, torch_devices
from rlhf_ray.models.heads import TokenLogprobs
from rlhf_ray.models.packed import Packed
from rlhf_ray.records import ReferenceColumns, Trajectories, token_places

Form = Literal["sampled", "top_k", "hidden"]
"""What is sent: the sampled token's log-probability; also those of the likeliest; also final hidden states."""


def form_of(kl: KLConfig) -> Form:
    if kl.estimator.name != "full":
        return "sampled"
    return "top_k" if kl.estimator.top_k else "hidden"


class Reference:
    def __init__(
        self, path: str, temperature: float, tokens_per_pass: int, form: Form, device: Device, trust_remote_code: bool
    ) -> None:
        devices = torch_devices(device)
        self.device = devices[0]
        self.tokens_per_pass = tokens_per_pass
        self.form = form
        self.model = TokenLogprobs(load.causal_lm(path, device, trust_remote_code, devices), temperature).eval()
        self.model.requires_grad_(False)

    def checksum(self) -> str:
        """Equal before and after a run, or the reference was not frozen."""
        return heads.checksum(self.model)

    def score(self, trajectories: Trajectories) -> ReferenceColumns:
        """N tokens, at the sampling temperature."""
        found: list[ReferenceColumns] = []
        places: list[np.ndarray] = []
        for rows, packed in packs_of(trajectories, self.tokens_per_pass, self.device):
            at = token_places(trajectories.responses.offsets, np.asarray(rows))
            logprobs, top, hidden = says(self.model, packed, trajectories.top_ids[at], self.form)
            found.append(ReferenceColumns(logprobs.cpu().numpy(), top.cpu().numpy(), to_numpy(hidden)))
            places.append(at)
        return ReferenceColumns.concatenate(found).take(np.argsort(np.concatenate(places)))


@torch.no_grad()
def says(model: TokenLogprobs, packed: Packed, top_ids: np.ndarray, form: Form) -> tuple[Tensor, Tensor, Tensor]:
    """[R] log-probabilities, [R, k] those of `top_ids` and [R, H] hidden states; width 0 where not of this form."""
    hidden = model.hidden(packed)
    logprobs = model.statistics(hidden, packed.targets).logprobs
    ids = torch.from_numpy(top_ids.astype(np.int64)).to(hidden.device)
    top = model.logprobs_at(hidden, ids) if form == "top_k" else logprobs.new_empty(len(logprobs), 0)
    return logprobs, top, hidden if form == "hidden" else hidden[:, :0]


def to_numpy(hidden: Tensor) -> np.ndarray:
    """NumPy knows no bf16: its bytes travel as uint16."""
    hidden = hidden.contiguous().cpu()
    return hidden.view(torch.uint16).numpy() if hidden.dtype == torch.bfloat16 else hidden.numpy()


def to_torch(hidden: np.ndarray) -> Tensor:
    """Back from `to_numpy`."""
    if hidden.dtype == np.uint16:
        return torch.from_numpy(hidden.copy()).view(torch.bfloat16)
    return torch.from_numpy(hidden.copy())
