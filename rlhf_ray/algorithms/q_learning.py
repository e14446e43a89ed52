"""Implicit language Q-learning (ILQL, Snell et al. 2022, arXiv 2206.11871): the value of each next token, offline.

A token is an action: s_t is the sequence before token a_t, and s_{t+1} the sequence with it. V is learnt from the
actions in the data alone, never from a maximum over all tokens, of most of which the data say nothing. A target must
never have a gradient: neither y of Q, nor Qhat of V, nor the weight of AWAC.

Everything is by token: answers lie one after the other, prompts and padding have no place, and a loss is the sum over
the N answer tokens divided by their number. Q has one row a head; Qhat is the smaller of the target heads' two.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


@torch.no_grad()
def td_target(rewards: Tensor, values: Tensor, offsets: Tensor, gamma: float) -> Tensor:
    """y_t = r_t + gamma V(s_{t+1}), and r_t at an answer's last token. [N].

    rewards [N] stand at the token that earns them, an answer's own at its last; values [N] are V(s_t), of the state in
    which token t is chosen; offsets [B + 1], answers have tokens. An answer that was cut off ends like any other: its
    reward was given for what there is, and V is learnt of no state after it.
    """
    following = pad(values[1:], (0, 1))
    following[offsets[1:] - 1] = 0
    return rewards + gamma * following


def td_loss(q: Tensor, target: Tensor) -> Tensor:
    """(Q_1(s_t, a_t) - y_t)^2 + (Q_2(s_t, a_t) - y_t)^2, [N] of q [2, N] and target [N]."""
    return (q - target.detach()).square().sum(0)


def expectile_loss(values: Tensor, target_q: Tensor, tau: float) -> Tensor:
    """|tau - 1[Qhat < V]| (Qhat - V)^2, [N] of values [N] and target_q [N], Qhat (Kostrikov et al. 2021).

    The best V(s) is the tau-expectile of Qhat over the data's actions: their mean at tau 1/2, their largest as tau
    nears 1.
    """
    gap = target_q.detach() - values
    return (tau - (gap < 0).to(gap.dtype)).abs() * gap.square()


def conservative_loss(q: Tensor, actions: Tensor) -> Tensor:
    """log sum_a exp Q(s_t, a) - Q(s_t, a_t), [N] of q [N, V] and actions [N], int64 (Kumar et al. 2020).

    The cross-entropy of the data's actions with Q as logits: it keeps Q low where the data have no action.
    """
    return q.logsumexp(-1) - q.gather(-1, actions[:, None])[:, 0]


def awac_loss(logprobs: Tensor, values: Tensor, target_q: Tensor, awac_beta: float) -> Tensor:
    """-exp(awac_beta (Qhat - V)) log pi(a_t | s_t), [N] of logprobs, values and target_q [N] (Nair et al. 2020).

    Cross-entropy that weighs a token by its advantage. awac_beta 0 is plain behaviour cloning.
    """
    return -(awac_beta * (target_q - values)).exp().detach() * logprobs


@torch.no_grad()
def polyak(target: Tensor, online: Tensor, alpha: float) -> Tensor:
    """alpha online + (1 - alpha) target, in the target's precision: in bf16 a small alpha would be rounded to nothing.

    target and online of one shape.
    """
    return target.lerp(online.to(target.dtype), alpha)


def decode_scores(logits: Tensor, target_q: Tensor, values: Tensor, decode_beta: float) -> Tensor:
    """log softmax(logits) + decode_beta (min_i Qhat_i(s, .) - V(s)), [..., V]: logits of the policy to sample from.

    logits [..., V], target_q [2, ..., V], values [...]. The policy times exp(decode_beta A), not normalised;
    decode_beta 0 is the policy itself.
    """
    return logits.log_softmax(-1) + decode_beta * (target_q.amin(0) - values[..., None])
