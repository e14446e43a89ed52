"""KL(pi || pi_ref) of next-token distributions: over the whole vocabulary, or over a few tokens and a bucket of others.

Both are functions of the state alone, whichever token was sampled there: they have no sampling variance within a
position, and in the reward they cannot tell its tokens apart (docs/kl.md). The bucket is what makes the sum over a few
tokens a divergence: without it the value may be negative. Negative values beyond rounding are left to be seen, for they
mean that a distribution is not normalised. The reference must never carry a gradient.

The two references say what of another model is at hand, a row a token: its final hidden states and output head, from
which logits are computed again beside the policy's, or its log-probabilities of a few tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.algorithms.logprobs import log_softmax


def exact(logp: Tensor, reference: Tensor) -> Tensor:
    """sum_v pi(v) (log pi(v) - log pi_ref(v)), [n] nats. Both arguments [n, V], normalised, finite."""
    return (logp.exp() * (logp - reference)).sum(-1)


def top_k(logp: Tensor, ids: Tensor, reference: Tensor) -> Tensor:
    """sum_S pi log(pi / pi_ref) + pi_T log(pi_T / pi_ref_T), [n] nats: S the tokens `ids`, T all others in one bucket.

    logp [n, V], normalised; ids [n, k] of an integer type, distinct in each row; reference [n, k], the normalised
    log-probabilities of those ids. Never negative, nor above `exact` (log-sum inequality); what is lost is
    pi_T KL(pi(.|T) || pi_ref(.|T)). A bucket lighter than the rounding of one counts as that heavy in both models.
    """
    selected = logp.gather(-1, ids.long())
    return exact(_with_rest(selected), _with_rest(reference))


def _with_rest(selected: Tensor) -> Tensor:
    """[n, k + 1]: log-probabilities [n, k], and that of all other tokens together.

    The rest is computed alike for both models, from the selected ones, so that its rounding cancels where they agree.
    The bound keeps the logarithm and its slope finite where rounding leaves nothing, or less, for the rest.
    """
    total = selected.logsumexp(-1, keepdim=True).clamp(max=-torch.finfo(selected.dtype).eps)
    return torch.cat([selected, (-total.expm1()).log()], -1)


@dataclass(frozen=True)
class FullReference:
    """For `exact`, from H numbers a token: the logits of a frozen model are recomputed, a chunk at a time."""

    hidden: Tensor
    """[N, H], what the reference's head is applied to: after its final norm."""
    head: Callable[[Tensor], Tensor]
    """The reference's own, [n, H] to [n, V]."""

    @property
    def columns(self) -> tuple[Tensor, ...]:
        return (self.hidden,)

    def kl(self, logp: Tensor, temperature: float, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            reference = log_softmax(self.head(hidden), temperature)
        return exact(logp, reference)


@dataclass(frozen=True)
class TopKReference:
    """For `top_k`, from 2k numbers a token."""

    ids: Tensor
    """[N, k], those likeliest to the policy that sampled: both models are asked about the same ones."""
    logprobs: Tensor
    """[N, k], the reference's, normalised over the vocabulary at the sampling temperature, float32 at least."""

    @property
    def columns(self) -> tuple[Tensor, ...]:
        return (self.ids, self.logprobs)

    def kl(self, logp: Tensor, temperature: float, ids: Tensor, logprobs: Tensor) -> Tensor:
        return top_k(logp, ids, logprobs.detach())
