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
from rlhf_ray.models import heads, load
from rlhf_ray.models.device import Device, torch_device
from rlhf_ray.records import ReferenceColumns, Trajectories, token_places

Form = Literal["sampled", "top_k", "hidden"]
"""What is sent: the sampled token's log-probability; also those of the likeliest; also final hidden states."""


class Reference:
    def __init__(
        self, path: str, temperature: float, tokens_per_pass: int, form: Form, device: Device, trust_remote_code: bool
    ) -> None:
        self.device = torch_device(device)
        self.tokens_per_pass = tokens_per_pass
        self.form = form
        self.model = heads.TokenLogprobs(load.causal_lm(path, device, trust_remote_code), temperature).eval()
        self.model.requires_grad_(False)

    def checksum(self) -> str:
        """Equal before and after a run, or the reference was not frozen."""
        return heads.checksum(self.model)

    @torch.inference_mode()
    def score(self, trajectories: Trajectories) -> ReferenceColumns:
        """N tokens, at the sampling temperature."""
        found: list[ReferenceColumns] = []
        places: list[np.ndarray] = []
        for rows, packed in packs_of(trajectories, self.tokens_per_pass, self.device):
            at = token_places(trajectories.responses.offsets, np.asarray(rows))
            hidden = self.model.hidden(packed)
            logprobs = self.model.statistics(hidden, packed.targets).logprobs
            found.append(
                ReferenceColumns(
                    logprobs.cpu().numpy(),
                    self._top(hidden, trajectories.top_ids[at]),
                    to_numpy(hidden if self.form == "hidden" else hidden[:, :0]),
                )
            )
            places.append(at)
        return ReferenceColumns.concatenate(found).take(np.argsort(np.concatenate(places)))

    def _top(self, hidden: Tensor, ids: np.ndarray) -> np.ndarray:
        if self.form != "top_k":
            return np.empty((len(hidden), 0), np.float32)
        return self.model.logprobs_at(hidden, torch.from_numpy(ids.astype(np.int64)).to(self.device)).cpu().numpy()


def to_numpy(hidden: Tensor) -> np.ndarray:
    """NumPy knows no bf16: its bytes travel as uint16."""
    hidden = hidden.contiguous().cpu()
    return hidden.view(torch.uint16).numpy() if hidden.dtype == torch.bfloat16 else hidden.numpy()


def to_torch(hidden: np.ndarray) -> Tensor:
    """Back from `to_numpy`."""
    if hidden.dtype == np.uint16:
        return torch.from_numpy(hidden.copy()).view(torch.bfloat16)
    return torch.from_numpy(hidden.copy())
