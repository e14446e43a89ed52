"""Log-probabilities, entropies and vocabulary KL of tokens from logits or from hidden states.

Logits are divided by the temperature the tokens were sampled at, and the softmax is in float32 at least: in bf16 the
ratio to the sampler would be noise. With a large vocabulary the logits are the largest tensor of a run, so `chunked`
never has those of more than `chunk` tokens: neither in the forward pass nor kept for the backward pass.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class TokenStatistics(NamedTuple):
    """All [N], in nats, float32 at least."""

    logprobs: Tensor
    entropy: Tensor
    kl: Tensor | None = None
    """KL(pi || pi_ref) of the next-token distributions; none without a reference."""


class Reference(Protocol):
    """What is at hand of the reference model; see `vocabulary_kl`."""

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """Each [N, ...], a row a token."""

    def kl(self, logp: Tensor, temperature: float, *columns: Tensor) -> Tensor:
        """[n] nats, from the policy's logp [n, V] at this temperature and n rows of `columns`."""


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature), [..., V], float32 (float64 stays)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits / temperature).log_softmax(-1)


def logprobs_and_entropy(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log p(target) [N] and entropy [N] in nats, of softmax(logits / temperature), float32 (float64 stays).

    logits [N, V], finite; targets [N] of an integer type.
    """
    return _target_and_entropy(log_softmax(logits, temperature), targets)


def chunked(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    temperature: float,
    chunk: int,
    calls: int = 1,
    reference: Reference | None = None,
) -> TokenStatistics:
    """`logprobs_and_entropy(head(hidden), ...)` and the KL to `reference`, at most `chunk` rows of logits at a time.

    hidden [N, H], targets [N]; head maps [n, H] to [n, V]; `calls` as in `in_chunks`, of which head and a reference's
    head are called by the same number. Raises ValueError when the arguments' rows are not of the same tokens.
    """
    columns = (hidden, targets, *(reference.columns if reference else ()))
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"columns of {[len(column) for column in columns]} tokens; each must have a row a token")

    def measure(rows: Tensor, labels: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        logp = log_softmax(head(rows), temperature)
        measured = _target_and_entropy(logp, labels)
        return (*measured, reference.kl(logp, temperature, *others)) if reference else measured

    return TokenStatistics(*in_chunks(measure, columns, chunk, calls))


def in_chunks(
    measure: Callable[..., tuple[Tensor, ...]], columns: tuple[Tensor, ...], chunk: int, calls: int
) -> tuple[Tensor, ...]:
    """measure(*columns), each [N, ...], computed of at most `chunk` rows at a time. Columns [N, ...] of equal N.

    Where gradients are wanted of more than one chunk, each is computed again in the backward pass, so measure is called
    twice as often, and what it computes on the way is never kept of more than one.

    `calls`: measure is called at least so often, with no rows in the end. Under ZeRO-3 a call gathers a head's weight
    from all ranks, so ranks whose N differ must agree on a number (the largest ceil(N / chunk)), or they wait for each
    other forever. For the same reason measure is called once when N = 0.

    The recomputation is not reentrant: a nested backward pass for each chunk would finish the head's gradient once a
    chunk, which ZeRO 2 and 3 refuse (a parameter's gradient is reduced when it is first complete); this way, autograd
    adds up the chunks, and a tied embedding, before anyone sees the gradient. measure must be deterministic.
    """
    pieces = list(zip(*(column.split(chunk) for column in columns), strict=True))
    pieces += [tuple(column[:0] for column in columns)] * (calls - len(pieces))
    if torch.is_grad_enabled() and len(pieces) > 1:
        measured = [checkpoint(measure, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    else:
        measured = [measure(*piece) for piece in pieces]
    return tuple(torch.cat(parts) for parts in zip(*measured, strict=True))


def _target_and_entropy(logp: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return logp.gather(-1, targets.long()[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
