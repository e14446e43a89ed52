"""Receiving ends `shm` and `gloo`, registered with vLLM's weight-transfer factory beside its own `nccl` and `ipc`.

vLLM imports this module in each of its workers, through `worker_extension_cls`. Nothing else may import it: it needs
vLLM. Weights go in by vLLM's layerwise reload, because on CPU a loaded layer's weights live in a packed form that a
plain `load_weights` cannot write to. Whatever goes wrong on the way, the reload is brought to its end: vLLM keeps what
a layer had received so far and would mix it into the next publication.
"""

import mmap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlhf_ray.actors.weight_transfer.buckets import CHECKSUM_BYTES, Bucket, Parameter, checksum, pack
from rlhf_ray.actors.weight_transfer.groups import join
from rlhf_ray.errors import PublicationError


@dataclass
class ShmInit(WeightTransferInitInfo):
    parameters: list[tuple[str, str, list[int]]]
    bucket_bytes: int
    path: str


@dataclass
class ShmUpdate(WeightTransferUpdateInfo):
    checksums: list[bytes]
    """One for each bucket."""


@dataclass
class GlooInit(WeightTransferInitInfo):
    parameters: list[tuple[str, str, list[int]]]
    bucket_bytes: int
    address: str
    port: int
    rank_offset: int
    """Rank of this engine's first worker."""
    world_size: int
    deadline_s: float


@dataclass
class GlooUpdate(WeightTransferUpdateInfo):
    pass


class BucketReceiver(WeightTransferEngine):
    """What the two have in common: vLLM's life cycle of an update around buckets."""

    buckets: list[Bucket]

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Any) -> None:
        try:
            self.receive_buckets(update_info)
        except BaseException:
            with suppress(Exception):  # the first error is the one to tell
                self.finish_weight_update()
            raise

    def receive_buckets(self, update_info: Any) -> None:
        raise NotImplementedError

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_tied_head(self.model)

    def shutdown(self) -> None:
        self.buckets = []


class ShmReceiver(BucketReceiver):
    """Reads a mapping that the sender fills. All checksums are verified before anything is loaded."""

    init_info_cls = ShmInit
    update_info_cls = ShmUpdate

    def init_transfer_engine(self, init_info: ShmInit) -> None:
        self.buckets = _buckets(init_info)
        size = sum(bucket.nbytes for bucket in self.buckets)
        try:
            with Path(init_info.path).open("r+b") as file:
                self.memory = torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)
        except OSError as error:
            raise PublicationError(
                f"rollout engine cannot map the learner's shared memory {init_info.path}: {error}. Backend shm needs "
                "learner and engines on one machine; across machines set publication.backend: gloo"
            ) from None

    def receive_buckets(self, update_info: ShmUpdate) -> None:
        buffers = self.memory.split([bucket.nbytes for bucket in self.buckets])
        for bucket, buffer, sent in zip(self.buckets, buffers, update_info.checksums, strict=True):
            _verify(bucket, buffer, sent)
        for bucket, buffer in zip(self.buckets, buffers, strict=True):
            self.model.load_weights(bucket.views(buffer))


class GlooReceiver(BucketReceiver):
    """Receives broadcasts, each bucket followed by its checksum.

    After a damaged bucket the rest is received and thrown away, for sender and other engines wait for this one. The
    model is then part old, part new: the engine must not serve.
    """

    init_info_cls = GlooInit
    update_info_cls = GlooUpdate

    def init_transfer_engine(self, init_info: GlooInit) -> None:
        self.buckets = _buckets(init_info)
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        deadline = timedelta(seconds=init_info.deadline_s)
        self.group = join(init_info.address, init_info.port, rank, init_info.world_size, deadline)

    def receive_buckets(self, update_info: GlooUpdate) -> None:
        damage: PublicationError | None = None
        for bucket in self.buckets:
            # A new buffer each time: the reload holds on to views until the last weight of a layer has come.
            wire = torch.empty(bucket.nbytes + CHECKSUM_BYTES, dtype=torch.uint8)
            self.group.broadcast(wire, 0).wait()
            if damage:
                continue
            buffer, sent = wire[: bucket.nbytes], wire[bucket.nbytes :]
            try:
                _verify(bucket, buffer, sent.numpy().tobytes())
            except PublicationError as error:
                damage = error
                continue
            self.model.load_weights(bucket.views(buffer))
        if damage:
            raise damage

    def shutdown(self) -> None:
        super().shutdown()
        self.group = None


class WorkerExtension:
    """Mixed into vLLM's worker class. Importing it is what registers the receivers."""

    model_runner: Any

    def scale_logits(self, factor: float | None) -> None:
        """Multiplies the model's logits by `factor` until called with none.

        vLLM reports log-probabilities of prompt tokens without the sampling temperature; this puts it in.
        """
        model = self.model_runner.get_model()
        vars(model).pop("compute_logits", None)
        if factor is None:
            return
        compute: Callable[..., Tensor] = model.compute_logits

        def scaled(*args: Any, **kwargs: Any) -> Tensor:
            logits = compute(*args, **kwargs)
            return logits if logits is None else logits * factor  # none on tensor-parallel ranks that do not sample

        vars(model)["compute_logits"] = scaled

    def set_decode_beta(self, decode_beta: float) -> None:
        """Of a model that values steer (`steering.Steered`)."""
        self.model_runner.get_model().decode_beta = decode_beta


def _buckets(init_info: ShmInit | GlooInit) -> list[Bucket]:
    return pack([Parameter.from_wire(*wire) for wire in init_info.parameters], init_info.bucket_bytes)


def _verify(bucket: Bucket, buffer: Tensor, sent: bytes) -> None:
    received = checksum(buffer)
    if received != sent:
        raise PublicationError(
            f"{bucket} arrived damaged: checksum {received.hex()}, sent as {sent.hex()}. "
            "Nothing of it was loaded; publish again"
        )


def _repack_tied_head(model: torch.nn.Module) -> None:
    """On CPU a layer computes from a packed copy of its weight. A tied output head shares the embedding's weight but
    has its own copy, which the reload leaves as it was: without this, logits come from the old head, silently."""
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear") and module.weight.numel():
            module.quant_method.process_weights_after_loading(module)


for _name, _receiver in (("shm", ShmReceiver), ("gloo", GlooReceiver)):
    if _name not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(_name, _receiver)
