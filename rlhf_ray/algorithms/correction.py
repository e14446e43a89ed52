"""Importance weights between the sampler and the learner: two programs that hold the same parameters and disagree.

The inference engine that sampled a token and the learner that recomputes its log-probability before the update (the
proximal policy, to which the clipped surrogate compares) differ by kernels and rounding. Each token's surrogate is
multiplied by w = learner / sampler, a constant: w min(r A, clip(r) A), decoupled PPO (Hilton et al. 2022).

No gradient may flow through w. A weight too large for its type ends at the cap or is masked, while NaN stays NaN: a
broken log-probability must show in the loss and not vanish as a masked token.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_ray.algorithms.statistics import at_tokens, sequence_means, sequence_sums

LEVELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token": lambda difference, offsets: difference,
    "sequence": lambda difference, offsets: at_tokens(sequence_sums(difference, offsets), offsets),
    "geometric": lambda difference, offsets: at_tokens(sequence_means(difference, offsets), offsets),
}
"""Of how much text a weight is the ratio: differences [N] in nats and offsets [B + 1] to log weights [N]."""


class Correction(NamedTuple):
    """Both [N], constants to the loss."""

    weights: Tensor
    clipped: Tensor
    """bool: the weight is not the ratio itself but the cap, or zero."""


class Gap(NamedTuple):
    """|learner - sampler| over tokens, scalars in nats."""

    mean: Tensor
    p99: Tensor
    """The least value that 99% of the tokens do not exceed."""
    max: Tensor


@torch.no_grad()
def log_weights(learner: Tensor, sampler: Tensor, offsets: Tensor, level: str) -> Tensor:
    """log w, [N] nats, of log-probabilities [N] of the sampled tokens. offsets [B + 1].

    level "token": each token's own ratio; "sequence": the product of its sequence's, exact but of a variance that
    grows with the length; "geometric": their geometric mean.
    """
    return LEVELS[level](learner - sampler, offsets)


@torch.no_grad()
def truncate(log_weights: Tensor, cap: float) -> Correction:
    """min(w, cap), truncated importance sampling (Ionides 2008; TIS, Yao et al. 2025). log_weights [N]."""
    weights = log_weights.exp()
    return Correction(weights.clamp(max=cap), weights > cap)


@torch.no_grad()
def mask(log_weights: Tensor, low: float, high: float) -> Correction:
    """w where low <= w <= high, zero elsewhere: IcePop, or MIS with low = 0. log_weights [N]."""
    weights = log_weights.exp()
    outside = (weights < low) | (weights > high)
    return Correction(weights.masked_fill(outside, 0.0), outside)


def effective_sample_share(weights: Tensor) -> Tensor:
    """(sum w)^2 / (N sum w^2), a scalar: 1 for equal weights, 1 / N if one has them all (Kish 1965), 0 if all are 0.

    weights [N], finite, not negative.
    """
    if not weights.any():
        return weights.new_zeros(())
    # The share does not change with the scale, and the squares of small weights would be zero.
    scaled = weights / weights.max()
    return scaled.sum().square() / (len(weights) * scaled.square().sum())


def gap(learner: Tensor, sampler: Tensor) -> Gap:
    """How far two log-probabilities [N] of the same tokens are apart. Raises ValueError if there are no tokens."""
    if not len(learner):
        raise ValueError("there are no tokens to compare learner and sampler on")
    apart = (learner - sampler).abs().detach()
    # The value by rank: torch.quantile refuses more than 16 million.
    rank = -(-99 * len(apart) // 100)
    return Gap(apart.mean(), apart.kthvalue(rank).values, apart.max())
