"""The one decision of where tensors live. Ray shows each actor its own GPUs, so all that an actor sees are its own."""

from typing import Literal

import torch

from rlhf_ray.errors import ResourceError

Device = Literal["cpu", "gpu"]


def torch_device(device: Device) -> torch.device:
    """The first of this process. Raises ResourceError when a GPU is asked for and it sees none."""
    return torch_devices(device)[0]


def torch_devices(device: Device) -> list[torch.device]:
    """All of this process: its GPUs, or the CPU. Raises ResourceError when a GPU is asked for and it sees none."""
    if device == "cpu":
        return [torch.device("cpu")]
    if not torch.cuda.is_available():
        raise ResourceError(
            "device is gpu, but this process sees no GPU: give the role gpus in `roles`, or set device: cpu"
        )
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def collective_backend(device: Device) -> str:
    """torch.distributed's backend for tensors of this device."""
    return "gloo" if device == "cpu" else "nccl"
