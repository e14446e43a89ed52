"""The frozen policy: log-probabilities of what others sampled. Its weights never change, and it can prove so."""

import numpy as np
import torch

from rlhf_ray.actors.scoring import packs_of
from rlhf_ray.models import heads, load
from rlhf_ray.models.device import Device, torch_device
from rlhf_ray.records import Trajectories, token_places


class Reference:
    def __init__(
        self, path: str, temperature: float, tokens_per_pass: int, device: Device, trust_remote_code: bool
    ) -> None:
        self.device = torch_device(device)
        self.tokens_per_pass = tokens_per_pass
        self.model = heads.TokenLogprobs(load.causal_lm(path, device, trust_remote_code), temperature).eval()
        self.model.requires_grad_(False)

    def checksum(self) -> str:
        """Equal before and after a run, or the reference was not frozen."""
        return heads.checksum(self.model)

    @torch.inference_mode()
    def logprobs(self, trajectories: Trajectories) -> np.ndarray:
        """[N] log-probabilities of the response tokens at the sampling temperature, float32."""
        result = np.empty(trajectories.tokens, dtype=np.float32)
        for rows, packed in packs_of(trajectories, self.tokens_per_pass, self.device):
            logprobs, _ = self.model(packed)
            result[token_places(trajectories.responses.offsets, np.asarray(rows))] = logprobs.cpu().numpy()
        return result
