"""Advantages: by token from rewards and values, by sequence against the other answers to the same prompt.

Every sequence ends: the value after its last token is zero, whether it ended by EOS or was cut off. Nothing may leak
from one sequence into the one stored before it, and tokens that are not the policy's (a tool's output, a user's turn)
must not discount, bootstrap or receive anything. A group whose returns are all the same says nothing about any of
them: its advantages are exactly zero, never rounding errors divided by each other.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

EPS = 1e-6
"""Added to a group's standard deviation."""


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, offsets: Tensor, gamma: float, lam: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Advantages [N] and returns [N] (advantages + values), constants to the losses.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lambda A_{t+1}   (Schulman et al. 2016, eq. 16)

    rewards [N], values [N] (V_t belongs to the state in which token t is chosen), offsets [B + 1]. mask [N], bool, is
    true at the policy's own tokens; none: all are. The result is that of sequences without the other tokens, and zero
    at those; a reward there counts for the policy's last token before it, and for nobody before the first.
    """
    if mask is not None:
        own_rewards, own_offsets = _own(rewards, offsets, mask)
        own = gae(own_rewards, values[mask], own_offsets, gamma, lam)
        advantages, returns = (column.new_zeros(mask.shape).masked_scatter(mask, column) for column in own)
        return advantages, returns
    lengths = offsets.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    remaining = offsets[1:].repeat_interleave(lengths) - torch.arange(len(rewards), device=offsets.device) - 1
    advantages = rewards + gamma * _later(values, remaining, 1) - values
    # A scan by doubling: after the pass with step s, each token has the discounted sum of 2 s deltas from its own on.
    step, decay = 1, gamma * lam
    while step < longest:
        advantages = advantages + decay * _later(advantages, remaining, step)
        step, decay = 2 * step, decay * decay
    return advantages, advantages + values


def rewards_to_go(rewards: Tensor, offsets: Tensor, gamma: float, mask: Tensor | None = None) -> Tensor:
    """R_t = r_t + gamma R_{t+1}, [N]: the advantages of REINFORCE++ before whitening (Hu 2025).

    rewards [N], offsets [B + 1]; mask [N] as in `gae`.
    """
    # Without values, and with lambda 1, the deltas are the rewards and their discounted sum is the return.
    return gae(rewards, torch.zeros_like(rewards), offsets, gamma, 1.0, mask)[0]


@torch.no_grad()
def group(returns: Tensor, groups: Tensor, scale: bool) -> Tensor:
    """R_i less its group's mean, divided by the group's standard deviation + 1e-6 if `scale`. [B].

    With `scale` this is GRPO (Shao et al. 2024, section 4.1.2), without it Dr. GRPO (Liu et al. 2025). returns [B];
    groups [B], any integers: answers to the same prompt have the same one, wherever they stand. A group of one has
    advantage 0.

    The paper leaves open which deviation it means. This is the sample's (squares divided by n - 1), as in TRL and
    verl; with the population's, advantages in a group of two would be 1.41 times as large.
    """
    _, place, sizes = groups.unique(return_inverse=True, return_counts=True)
    deviations = _deviations(returns, place, sizes)
    if not scale:
        return deviations
    squares = returns.new_zeros(len(sizes)).index_add(0, place, deviations.square())
    spread = (squares / (sizes - 1).clamp(min=1)).sqrt()
    return deviations / (spread[place] + EPS)


@torch.no_grad()
def leave_one_out(returns: Tensor, groups: Tensor) -> Tensor:
    """R_i less the mean of the others in its group, [B]: RLOO (Ahmadian et al. 2024).

    returns [B], groups [B] as in `group`. Raises ValueError for a group of one, which has no others.
    """
    names, place, sizes = groups.unique(return_inverse=True, return_counts=True)
    single = names[sizes == 1].tolist()
    if single:
        raise ValueError(f"groups {single} have a single member; leaving one out needs at least two answers a prompt")
    # R_i - (n mean - R_i) / (n - 1)
    return _deviations(returns, place, sizes) * sizes[place] / (sizes[place] - 1)


def _later(x: Tensor, remaining: Tensor, step: int) -> Tensor:
    """x of the token `step` places on in the same sequence, zero past its end. x [N]; remaining [N] tokens follow."""
    return torch.where(remaining >= step, x.roll(-step), 0.0)


def _own(rewards: Tensor, offsets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards and offsets of the sequences that hold the policy's tokens only. [n] of n true in the mask, [B + 1]."""
    before = pad(mask.cumsum(0), (1, 0))
    own_offsets = before[offsets]
    last = before[1:] - 1
    # The last own token at or before a place belongs to the place's sequence unless that has had none yet.
    heard = last >= own_offsets[:-1].repeat_interleave(offsets.diff())
    own_rewards = rewards.new_zeros(int(before[-1])).index_add(0, last[heard], rewards[heard])
    return own_rewards, own_offsets


def _deviations(returns: Tensor, place: Tensor, sizes: Tensor) -> Tensor:
    """Returns [B] less the mean of their group, of which place [B] is the index in sizes [G]."""
    # Counted from the group's smallest, equal returns are zeros and so is their mean, which rounding would miss.
    smallest = returns.new_zeros(len(sizes)).scatter_reduce(0, place, returns, "amin", include_self=False)
    above = returns - smallest[place]
    mean = returns.new_zeros(len(sizes)).index_add(0, place, above) / sizes
    return above - mean[place]
