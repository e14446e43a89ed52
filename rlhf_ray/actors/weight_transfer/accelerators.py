"""Sending ends for GPUs: vLLM's own `nccl` and `ipc` trainer engines, driven with our control plane.

Not proven: written against vLLM 0.32's source, never run on a GPU. No checksums here; the canary is the check. Calls to
engines have deadlines, the NCCL rendezvous and broadcasts have those of vLLM and NCCL.
"""

import socket
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.actors.weight_transfer.buckets import Parameter
from rlhf_ray.actors.weight_transfer.engines import Engines
from rlhf_ray.actors.weight_transfer.senders import Sender, own_address
from rlhf_ray.errors import PublicationError


class VLLMSender(Sender):
    def __init__(self, backend: str, engines: Engines, parameters: Sequence[Parameter], rank: int) -> None:
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

        super().__init__(engines, sum(parameter.nbytes for parameter in parameters))
        self.source = _source(parameters)
        self.trainer = WeightTransferTrainerFactory.trainer_init(
            _init_info(backend, engines, rank), client=engines, source=self.source
        )

    def transmit(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        self.engines.version = version
        self.source.weights = weights
        self.trainer.send_weights()


def _init_info(backend: str, engines: Engines, rank: int) -> Any:
    if backend == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        world_size = 1 + sum(engines.ranks)
        return NCCLTrainerInitInfo(own_address(), _free_port(), world_size, rank=rank)
    if backend == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        return IPCTrainerInitInfo(packed=True, rank=rank)
    raise PublicationError(f"no way to publish weights is called '{backend}'; known: shm, gloo, nccl, ipc")


def _source(parameters: Sequence[Parameter]) -> Any:
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Source(WeightSource):
        """What is to be sent next, as vLLM wants to read it."""

        weights: Iterator[tuple[str, Tensor]] = iter(())

        def metadata(self) -> list[Any]:
            return [ParamMeta(parameter.name, parameter.dtype, parameter.shape) for parameter in parameters]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            dtypes: list[torch.dtype] = [parameter.dtype for parameter in parameters]
            for (name, tensor), dtype in zip(self.weights, dtypes, strict=True):
                yield name, tensor.detach().to(dtype)

    return Source()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
