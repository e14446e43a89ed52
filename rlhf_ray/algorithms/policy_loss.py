"""The clipped surrogate of PPO and of what grew out of it, one value a token.

Nothing is averaged here: the caller weighs each token by the lengths of the whole minibatch, so that neither ranks nor
micro-batches weigh in the gradient. The ratio is bounded before the exponential is taken: a clipped token has no
gradient at all however far the policies are apart, and never an infinity multiplied by zero.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_ray.algorithms.statistics import at_tokens, sequence_means


class PolicyLoss(NamedTuple):
    """All [N]. Only `loss` carries gradients."""

    loss: Tensor
    ratio: Tensor
    """pi / pi_old, unclipped; exactly one in the first minibatch of an update."""
    clipped: Tensor
    """bool: a clip is active, the dual one included, and the token has no gradient."""
    approx_kl: Tensor
    """ratio - 1 - log ratio, nats, never negative: of tokens' ratios, KL(pi_old || pi) unbiased (Schulman 2020)."""


def token_log_ratio(logp: Tensor, old_logp: Tensor, offsets: Tensor) -> Tensor:
    """log pi - log pi_old of each token, [N] nats. Arguments [N], offsets [B + 1]."""
    return logp - old_logp


def sequence_log_ratio(logp: Tensor, old_logp: Tensor, offsets: Tensor) -> Tensor:
    """The mean of the sequence's log ratios at each of its tokens, [N] nats: GSPO (Zheng et al. 2025, eq. 7).

    Arguments [N], offsets [B + 1]. A token's gradient reaches all tokens of its sequence.
    """
    return at_tokens(sequence_means(logp - old_logp, offsets), offsets)


RATIOS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "token": token_log_ratio,
    "sequence": sequence_log_ratio,
}


def clipped(log_ratio: Tensor, advantages: Tensor, low: float, high: float, dual: float | None = None) -> PolicyLoss:
    """-min(r A, clip(r, 1 - low, 1 + high) A), r = exp(log_ratio); at most -dual A where A < 0. Tensors [N].

    Schulman et al. 2017, "Proximal policy optimization algorithms", eq. 7, where low = high; Yu et al. 2025, "DAPO",
    eq. 10, where they differ; Ye et al. 2020, "Mastering complex control in MOBA games with deep reinforcement
    learning", for `dual`, the largest ratio that counts against a bad token. 0 < low < 1, high > 0, dual > 1.

    Without `dual`, a bad token whose ratio overflows has an infinite loss and gradient: loud, and not NaN.
    """
    # The minimum bounds r on one side only: for A > 0 by 1 + high from above, for A < 0 by 1 - low from below.
    bad = advantages < 0
    floor = torch.full_like(log_ratio, -math.inf).masked_fill(bad, math.log1p(-low))
    ceiling = torch.full_like(log_ratio, math.log1p(high)).masked_fill(
        bad, math.log(math.inf if dual is None else dual)
    )
    bounded = log_ratio.clamp(floor, ceiling)
    return PolicyLoss(
        loss=-advantages * bounded.exp(),
        ratio=log_ratio.detach().exp(),
        clipped=(advantages != 0) & (bounded.detach() != log_ratio.detach()),
        approx_kl=(log_ratio.expm1() - log_ratio).detach(),
    )
