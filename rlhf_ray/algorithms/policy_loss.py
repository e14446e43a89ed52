"""PPO's clipped surrogate, one value a token.

Nothing is averaged here: the caller sums and divides by the global number of tokens, so that neither ranks nor
micro-batches weigh in the gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class PolicyLoss(NamedTuple):
    """All [N]. Only `loss` carries gradients."""

    loss: Tensor
    ratio: Tensor
    """pi / pi_old; exactly one in the first minibatch of an update."""
    clipped: Tensor
    """bool: the clipped term is the active one, and the token has no gradient."""
    approx_kl: Tensor
    """KL(pi_old || pi) in nats, unbiased and never negative: ratio - 1 - log ratio (Schulman 2020)."""


def clipped(logp: Tensor, old_logp: Tensor, advantages: Tensor, clip: float) -> PolicyLoss:
    """-min(r A, clip(r, 1 - clip, 1 + clip) A), r = exp(logp - old_logp). Arguments [N].

    Schulman et al. 2017, "Proximal policy optimization algorithms", eq. 7.
    """
    log_ratio = logp - old_logp
    ratio = log_ratio.exp()
    free = ratio * advantages
    bound = ratio.clamp(1 - clip, 1 + clip) * advantages
    return PolicyLoss(
        loss=-torch.minimum(free, bound),
        ratio=ratio.detach(),
        clipped=(bound < free).detach(),
        approx_kl=(log_ratio.expm1() - log_ratio).detach(),
    )
