"""What a token's loss weighs in a minibatch, from the lengths of the minibatch's sequences alone.

A minibatch's loss is the sum over all its tokens of weight times loss. Since all ranks know all lengths, each applies
its sequences' weights without a word to the others, and no split into ranks and micro-batches changes the gradient.
That holds only for weights taken of the whole minibatch, never of a part of it; and where gradients are averaged over
ranks rather than summed, the caller multiplies by the number of ranks.

Lengths [B] count the policy's own tokens. A sequence that has none counts for nothing: its weight is zero, and the
others weigh as if it were not there. Weights [B] are float32, or float64 where the lengths are.
"""

from collections.abc import Callable

from torch import Tensor


def token_mean(lengths: Tensor) -> Tensor:
    """1 / sum of lengths: every token weighs the same, long answers more (PPO; DAPO, Yu et al. 2025, eq. 12)."""
    present = _present(lengths)
    return present / lengths.sum().clamp(min=1)


def sequence_mean(lengths: Tensor) -> Tensor:
    """1 / (B length): every sequence weighs the same, tokens of long ones less (GRPO, Shao et al. 2024, eq. 3)."""
    present = _present(lengths)
    return present / (present.sum() * lengths).clamp(min=1)


def constant(lengths: Tensor, longest: int) -> Tensor:
    """1 / (B longest), `longest` the tokens an answer may have: no length enters (Dr. GRPO, Liu et al. 2025)."""
    present = _present(lengths)
    return present / (present.sum() * longest).clamp(min=1)


def _present(lengths: Tensor) -> Tensor:
    """1 for sequences that have tokens, 0 for others, of the lengths' own type. [B]."""
    return (lengths > 0).to(lengths.dtype)


AGGREGATIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "token_mean": lambda lengths, longest: token_mean(lengths),
    "sequence_mean": lambda lengths, longest: sequence_mean(lengths),
    "constant": constant,
}
"""From lengths [B] and the longest that an answer may be, in tokens, to weights [B]."""
