"""Ragged batches for property tests: random lengths, empty sequences included unless refused."""

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor


@st.composite
def batches(draw: st.DrawFn, columns: int, shortest: int = 0) -> tuple[list[Tensor], Tensor]:
    """`columns` tensors [N] of float64 normals, and offsets [B + 1]."""
    lengths = draw(st.lists(st.integers(shortest, 7), max_size=6))
    return list(normals(draw, columns, sum(lengths))), offsets_of(lengths)


@st.composite
def masked_batches(draw: st.DrawFn, columns: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """The same, and a mask [N]: long sequences too, with nothing, all, or any part of them the policy's."""
    lengths = draw(st.lists(st.integers(0, 20), max_size=4))
    own = st.sampled_from([0.0, 0.5, 0.9, 1.0])
    shares = torch.tensor([draw(own) for _ in lengths], dtype=torch.float64).repeat_interleave(
        torch.tensor(lengths).long()
    )
    (coin,) = uniforms(draw, 1, sum(lengths))
    return list(normals(draw, columns, sum(lengths))), offsets_of(lengths), coin < shares


@st.composite
def grouped_returns(draw: st.DrawFn, smallest: int = 1) -> tuple[Tensor, Tensor]:
    """Returns [B] of float64 normals and groups [B]: any ids, members in any order, at least `smallest` of each."""
    ids = draw(st.lists(st.integers(-(2**40), 2**40), max_size=4, unique=True))
    groups = draw(st.permutations([name for name in ids for _ in range(draw(st.integers(smallest, 5)))]))
    (returns,) = normals(draw, 1, len(groups))
    return returns, torch.tensor(groups, dtype=torch.int64)


def normals(draw: st.DrawFn, columns: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randn(columns, size, generator=generator, dtype=torch.float64)


def uniforms(draw: st.DrawFn, columns: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.rand(columns, size, generator=generator, dtype=torch.float64)


def offsets_of(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def rows(flat: Tensor, offsets: Tensor) -> list[Tensor]:
    """One tensor a sequence."""
    return list(flat.split(offsets.diff().tolist()))


def join(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.float64), *parts])
