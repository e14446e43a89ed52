"""Sending ends, in the learner. `shm` and `gloo` need no vLLM; the GPU ones are vLLM's own (`accelerators.py`).

A publication that fails leaves the engines refusing to serve until the next good one, never serving a mixture. After an
error a gloo sender is spent, since the group may be out of step: make another.
"""

import mmap
import os
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.actors.weight_transfer import groups
from rlhf_ray.actors.weight_transfer.buckets import (
    BUCKET_BYTES,
    CHECKSUM_BYTES,
    Bucket,
    Parameter,
    checksum,
    exhaust,
    pack,
)
from rlhf_ray.actors.weight_transfer.engines import CallAll, Engines, call_all
from rlhf_ray.errors import PublicationError, ResourceError

SHARED_MEMORY = Path("/dev/shm")

Weights = Iterable[tuple[str, Tensor]]


def choose_backend(device: str, same_node: bool, shared_gpu: bool) -> str:
    """What `publication.backend: auto` means."""
    if device == "cpu":
        return "shm" if same_node else "gloo"
    return "ipc" if shared_gpu else "nccl"


def make_sender(
    backend: str,
    engines: Sequence[Any],
    metadata: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
    deadline_s: float,
    *,
    rank: int = 0,
    bucket_bytes: int = BUCKET_BYTES,
    call: CallAll = call_all,
) -> "Sender":
    """Connects the learner with `engines` (Ray actor handles of RolloutEngine) for weights in the order of `metadata`.

    Only rank 0 of a learner needs a sender, while its other ranks iterate the same collective source. The exception is
    `ipc` with more than one rank, where each rank has the weights on its own GPU: every rank then makes a sender with
    its `rank`, and sends. `deadline_s` holds for each call to the engines and for each broadcast.

    Raises ModelError when an engine's model has other names or shapes, ResourceError when /dev/shm is too small,
    DeadlineError when an engine does not answer.
    """
    parameters = [Parameter(name, dtype, tuple(shape)) for name, dtype, shape in metadata]
    reached = Engines(engines, deadline_s, call)
    if rank == 0:
        reached.check(parameters)
    if backend == "shm":
        return ShmSender(reached, parameters, bucket_bytes)
    if backend == "gloo":
        return GlooSender(reached, parameters, bucket_bytes)
    from rlhf_ray.actors.weight_transfer.accelerators import VLLMSender

    return VLLMSender(backend, reached, parameters, rank)


class Sender(ABC):
    """One way by which weights reach all engines."""

    def __init__(self, engines: Engines, nbytes: int) -> None:
        self.engines = engines
        self.nbytes = nbytes

    def send(self, tensors: Weights, version: int) -> dict[str, float]:
        """Publishes all weights as `version`; returns `bytes` (to each engine) and `seconds`.

        Converts to the announced dtypes. Raises PublicationError when weights arrive damaged or are not those
        announced, DeadlineError when an engine does not answer.
        """
        start = time.perf_counter()
        self.transmit(iter(tensors), version)
        return {"bytes": float(self.nbytes), "seconds": time.perf_counter() - start}

    @abstractmethod
    def transmit(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None: ...


class BucketSender(Sender):
    def __init__(self, engines: Engines, parameters: Sequence[Parameter], bucket_bytes: int) -> None:
        self.buckets = pack(parameters, bucket_bytes)
        super().__init__(engines, sum(bucket.nbytes for bucket in self.buckets))
        self.announcement: dict[str, Any] = {
            "parameters": [parameter.to_wire() for parameter in parameters],
            "bucket_bytes": bucket_bytes,
        }


class ShmSender(BucketSender):
    """One mapping in /dev/shm that all engines read. Its name is gone once all have it, so a crash leaves no file."""

    def __init__(self, engines: Engines, parameters: Sequence[Parameter], bucket_bytes: int) -> None:
        super().__init__(engines, parameters, bucket_bytes)
        path = SHARED_MEMORY / f"rlhf-ray-{uuid.uuid4().hex}"
        try:
            self.memory = _map(path, self.nbytes)
            engines.init_weight_transfer_engine({**self.announcement, "path": str(path)})
        finally:
            path.unlink(missing_ok=True)

    def transmit(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        checksums = []
        for bucket, buffer in zip(self.buckets, self._buffers(), strict=True):
            bucket.fill(buffer, weights)
            checksums.append(checksum(buffer))
        exhaust(weights)
        self.engines.start_weight_update()
        self.engines.update_weights({"checksums": checksums})
        self.engines.finish_weight_update(version)

    def _buffers(self) -> tuple[Tensor, ...]:
        return self.memory.split([bucket.nbytes for bucket in self.buckets])


class GlooSender(BucketSender):
    """Broadcasts bucket after bucket, each followed by its checksum; any number of machines."""

    def __init__(self, engines: Engines, parameters: Sequence[Parameter], bucket_bytes: int) -> None:
        super().__init__(engines, parameters, bucket_bytes)
        deadline = timedelta(seconds=engines.deadline_s)
        address, world_size = own_address(), 1 + sum(engines.ranks)
        store = groups.rendezvous(address, world_size, deadline)
        meeting = {
            "address": address,
            "port": store.port,
            "rank_offset": 1,
            "world_size": world_size,
            "deadline_s": engines.deadline_s,
        }
        with ThreadPoolExecutor(1) as threads:
            entering = threads.submit(engines.init_weight_transfer_engine, {**self.announcement, **meeting})
            self.group = groups.enter(store, 0, world_size, deadline)
            entering.result()

    def transmit(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        self.engines.start_weight_update()
        threads = ThreadPoolExecutor(1)
        receiving = threads.submit(self.engines.update_weights, {})
        try:
            for bucket in self.buckets:
                self._broadcast(bucket, weights)
            exhaust(weights)
            receiving.result()
        except RuntimeError as error:
            if receiving.done():
                receiving.result()  # an engine's own account of what went wrong comes first
            reason = str(error).strip().splitlines()[0]
            raise PublicationError(
                f"weights version {version} could not be broadcast to all engines: {reason}"
            ) from None
        finally:
            threads.shutdown(wait=False)  # an engine that never answers must not hold the learner
        self.engines.finish_weight_update(version)

    def _broadcast(self, bucket: Bucket, weights: Iterator[tuple[str, Tensor]]) -> None:
        wire = torch.empty(bucket.nbytes + CHECKSUM_BYTES, dtype=torch.uint8)
        bucket.fill(wire[: bucket.nbytes], weights)
        digest = checksum(wire[: bucket.nbytes])
        wire[bucket.nbytes :] = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        self.group.broadcast(wire, 0).wait()


def own_address() -> str:
    """This machine's address as other machines of the cluster know it."""
    import ray

    return ray.util.get_node_ip_address()


def _map(path: Path, size: int) -> Tensor:
    """A new shared mapping as uint8 [size]. Its pages are reserved now: writing to one that cannot be had would kill
    the process."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)
        return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
    except OSError as error:
        raise ResourceError(
            f"{path.parent} has no room for {size} bytes of weights: {error.strerror}. Enlarge it (Docker: --shm-size) "
            "or set publication.backend: gloo"
        ) from None
    finally:
        os.close(descriptor)
