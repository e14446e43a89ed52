"""The critic's clipped squared error, one value a token. The caller sums and divides by the global number of tokens."""

from typing import NamedTuple

import torch
from torch import Tensor


class ValueLoss(NamedTuple):
    """Both [N]. Only `loss` carries gradients."""

    loss: Tensor
    clipped: Tensor
    """bool: the clipped term is the active one, and the token has no gradient."""


def clipped(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> ValueLoss:
    """max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2. Arguments [N]; `clip` in units of value.

    Values are clipped to the interval rather than moved by a clipped step: a value inside stays bit for bit itself,
    so rounding never counts as clipping.
    """
    free = (values - returns).square()
    bound = (values.clamp(old_values - clip, old_values + clip) - returns).square()
    return ValueLoss(loss=0.5 * torch.maximum(free, bound), clipped=(bound > free).detach())
