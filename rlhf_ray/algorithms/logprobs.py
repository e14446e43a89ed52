"""Log-probabilities and entropies of tokens from logits or from hidden states.

Logits are divided by the temperature the tokens were sampled at, and the softmax is in float32 at least: in bf16 the
ratio to the sampler would be noise. With a large vocabulary the logits are the largest tensor of a run, so `chunked`
never has those of more than `chunk` tokens: neither in the forward pass nor kept for the backward pass.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def logprobs_and_entropy(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log p(target) [N] and entropy [N] in nats, of softmax(logits / temperature), float32 (float64 stays).

    logits [N, V], finite; targets [N] of an integer type.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logp = (logits / temperature).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, targets.long()[:, None])[:, 0], entropy


def chunked(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    temperature: float,
    chunk: int,
    calls: int = 1,
) -> tuple[Tensor, Tensor]:
    """`logprobs_and_entropy(head(hidden), ...)`, `head` applied to at most `chunk` rows at a time. Two [N].

    hidden [N, H], targets [N]; head maps [n, H] to [n, V]. Where gradients are wanted of more than one chunk, each
    chunk's logits are computed again in the backward pass, so head is called twice as often.

    `calls`: head is called at least so often, with no rows in the end. Under ZeRO-3 a call gathers the head's weight
    from all ranks, so ranks whose N differ must agree on a number (the largest ceil(N / chunk)), or they wait for each
    other forever. For the same reason head is called once when N = 0.

    The recomputation is not reentrant: a nested backward pass for each chunk would finish the head's gradient once a
    chunk, which ZeRO 2 and 3 refuse (a parameter's gradient is reduced when it is first complete); this way, autograd
    adds up the chunks, and a tied embedding, before anyone sees the gradient. head must be deterministic.
    """
    pieces = list(zip(hidden.split(chunk), targets.split(chunk), strict=True))
    pieces += [(hidden[:0], targets[:0])] * (calls - len(pieces))

    def measure(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return logprobs_and_entropy(head(rows), labels, temperature)

    if torch.is_grad_enabled() and len(pieces) > 1:
        measured = [checkpoint(measure, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    else:
        measured = [measure(*piece) for piece in pieces]
    logp, entropy = zip(*measured, strict=True)
    return torch.cat(logp), torch.cat(entropy)
