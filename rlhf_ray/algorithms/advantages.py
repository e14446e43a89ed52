"""Generalised advantage estimation over ragged sequences.

Every sequence ends: the value after its last token is zero, whether it ended by EOS or was cut off. Nothing may leak
from one sequence into the one stored before it.
"""

import torch
from torch import Tensor


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, offsets: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages [N] and returns [N] (advantages + values), constants to the losses.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lambda A_{t+1}   (Schulman et al. 2016, eq. 16)

    rewards [N], values [N] (V_t belongs to the state in which token t is chosen), offsets [B + 1].
    """
    lengths = offsets.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    steps = torch.arange(longest, device=offsets.device)
    real = steps < lengths[:, None]
    # One column a sequence, and a row of zeros after the longest. Zeros after a sequence's end are its bootstrap value.
    padded_rewards = _columns(rewards, real)
    padded_values = torch.cat([_columns(values, real), values.new_zeros(1, len(lengths))])
    deltas = padded_rewards + gamma * padded_values[1:] - padded_values[:-1]
    for step in range(longest - 2, -1, -1):
        deltas[step] += gamma * lam * deltas[step + 1]
    advantages = deltas.T[real]
    return advantages, advantages + values


def _columns(flat: Tensor, real: Tensor) -> Tensor:
    """[T, B], time first so that the recursion walks over contiguous rows; zero where not real [B, T]."""
    padded = flat.new_zeros(real.shape)
    padded[real] = flat
    return padded.T.contiguous()
