"""How weights lie on the wire: parameters packed into buckets of bytes, one after the other, in the sender's order.

Both sides compute the same buckets from the same list of parameters, so only the list travels, once. A bucket is
loaded only after its checksum was verified; a damaged one must never reach the model.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from rlhf_ray.errors import PublicationError

BUCKET_BYTES = 64 << 20
CHECKSUM_BYTES = 8
ALIGNMENT = 64
"""Parameters start at multiples of this, so that bytes can be viewed as any dtype."""


@dataclass(frozen=True)
class Parameter:
    """Name, dtype on the wire and full shape, as Hugging Face names them."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def to_wire(self) -> tuple[str, str, list[int]]:
        return self.name, str(self.dtype).removeprefix("torch."), list(self.shape)

    @classmethod
    def from_wire(cls, name: str, dtype: str, shape: Sequence[int]) -> "Parameter":
        return cls(name, getattr(torch, dtype), tuple(shape))


@dataclass(frozen=True)
class Bucket:
    """Consecutive parameters in one buffer of `nbytes`."""

    number: int
    """Counts from 1, for people."""
    parameters: tuple[Parameter, ...]
    offsets: tuple[int, ...]
    """Where each parameter starts in the bucket, in bytes."""
    nbytes: int

    def __str__(self) -> str:
        return f"bucket {self.number} ({self.parameters[0].name} to {self.parameters[-1].name}, {self.nbytes} bytes)"

    def views(self, buffer: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of each parameter; tensors share memory with `buffer` (uint8, [nbytes])."""
        for parameter, offset in zip(self.parameters, self.offsets, strict=True):
            flat = buffer[offset : offset + parameter.nbytes]
            yield parameter.name, flat.view(parameter.dtype).view(parameter.shape)

    def fill(self, buffer: Tensor, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Copies the next weights into `buffer`. Raises PublicationError when they are not the ones announced."""
        for name, view in self.views(buffer):
            sent, tensor = next(weights, (None, None))
            if sent is None or tensor is None:
                raise PublicationError(f"the learner's weights end before '{name}', which it announced to the engines")
            if sent != name or tensor.shape != view.shape:
                raise PublicationError(
                    f"the learner announced '{name}' {tuple(view.shape)} to the engines but sends '{sent}' "
                    f"{tuple(tensor.shape)}; weights must come in the order and shapes announced"
                )
            view.copy_(tensor.detach())


def pack(parameters: Iterable[Parameter], bucket_bytes: int) -> list[Bucket]:
    """Buckets of at most `bucket_bytes`, or of one parameter where that alone is larger."""
    buckets: list[Bucket] = []
    members: list[Parameter] = []
    offsets: list[int] = []
    end = 0

    def close() -> None:
        buckets.append(Bucket(len(buckets) + 1, tuple(members), tuple(offsets), end))

    for parameter in parameters:
        size = -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT
        if members and end + size > bucket_bytes:
            close()
            members, offsets, end = [], [], 0
        members.append(parameter)
        offsets.append(end)
        end += size
    if members:
        close()
    return buckets


def checksum(buffer: Tensor) -> bytes:
    """xxh3_64 of a contiguous uint8 tensor on the CPU, CHECKSUM_BYTES long."""
    return xxhash.xxh3_64_digest(memoryview(buffer.numpy()))


def exhaust(weights: Iterator[tuple[str, Any]]) -> None:
    """Ends a stream that should be at its end. Raises PublicationError for a weight that was not announced."""
    for name, _ in weights:
        raise PublicationError(f"the learner sends '{name}', which it did not announce to the engines")
