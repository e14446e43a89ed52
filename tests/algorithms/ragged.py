"""Ragged batches for property tests: random lengths, empty sequences included unless refused."""

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor


@st.composite
def batches(draw: st.DrawFn, columns: int, shortest: int = 0) -> tuple[list[Tensor], Tensor]:
    """`columns` tensors [N] of float64 normals, and offsets [B + 1]."""
    lengths = draw(st.lists(st.integers(shortest, 7), max_size=6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    drawn = torch.randn(columns, sum(lengths), generator=generator, dtype=torch.float64)
    return list(drawn), offsets_of(lengths)


def offsets_of(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def rows(flat: Tensor, offsets: Tensor) -> list[Tensor]:
    """One tensor a sequence."""
    return list(flat.split(offsets.diff().tolist()))


def join(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.float64), *parts])
