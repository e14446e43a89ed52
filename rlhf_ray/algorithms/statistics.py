"""Whitening, and sums over ragged sequences.

All numbers are over real tokens, for there are no others here. Variances are without Bessel's correction.
"""

import torch
from torch import Tensor

EPS = 1e-8


def whiten(x: Tensor, keep_mean: bool = False) -> Tensor:
    """x scaled to unit variance, and to zero mean unless `keep_mean`. [N] to [N].

    (x - mean) / sqrt(variance + 1e-8), variance the mean of squared deviations (no Bessel's correction). The epsilon
    stands inside the root, so constant x gives zeros.
    """
    mean = x.mean()
    white = (x - mean) * torch.rsqrt(x.var(correction=0) + EPS)
    return white + mean if keep_mean else white


def sequence_sums(x: Tensor, offsets: Tensor) -> Tensor:
    """Sum over each sequence's tokens, [B]; zero for a sequence without tokens. x [N], offsets [B + 1].

    >>> sequence_sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 2, 3]))
    tensor([3., 0., 4.])
    """
    lengths = offsets.diff()
    sequence = torch.repeat_interleave(lengths, output_size=len(x))
    return x.new_zeros(len(lengths)).index_add(0, sequence, x)


def sequence_means(x: Tensor, offsets: Tensor) -> Tensor:
    """Mean over each sequence's tokens, [B]; NaN for a sequence without tokens, which has none."""
    return sequence_sums(x, offsets) / offsets.diff()


def at_tokens(x: Tensor, offsets: Tensor) -> Tensor:
    """Each sequence's value at every of its tokens, [N]. x [B], offsets [B + 1].

    >>> at_tokens(torch.tensor([5.0, 6.0, 7.0]), torch.tensor([0, 2, 2, 3]))
    tensor([5., 5., 7.])
    """
    return x.repeat_interleave(offsets.diff())
