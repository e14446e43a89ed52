"""The one decision of where tensors live. Ray shows each actor its own GPUs, so an actor's first is its own."""

from typing import Literal

import torch

from rlhf_ray.errors import ResourceError

Device = Literal["cpu", "gpu"]


def torch_device(device: Device) -> torch.device:
    """Raises ResourceError when a GPU is asked for and this process sees none."""
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ResourceError(
            "device is gpu, but this process sees no GPU: give the role gpus in `roles`, or set device: cpu"
        )
    return torch.device("cuda", 0)


def collective_backend(device: Device) -> str:
    """torch.distributed's backend for tensors of this device."""
    return "gloo" if device == "cpu" else "nccl"
