"""Losses on preferences, of a reward model and of a policy that learns from them directly, and how well they predict.

p is the probability that `chosen` is the better of its pair, and a loss is the expectation over who is: the gradient
of Bradley-Terry in d = chosen - rejected is sigmoid(d) - p. A policy's rewards are beta times its log-ratios, log pi -
log pi_ref summed over the tokens of an answer, never averaged over them: pi is the probability of the whole answer.

The measures are the same whichever of a pair is named first: on data that always name the better one first, anything
else would be gamed by confidence alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry(
    chosen: Tensor,
    rejected: Tensor,
    p: Tensor | None = None,
    margin: Tensor | float | None = None,
    centre: float = 0.0,
) -> Tensor:
    """-[p log s(d) + (1 - p) log s(-d)] + centre (chosen + rejected)^2, d = chosen - rejected - margin. [P].

    chosen [P] and rejected [P] are rewards; p [P] in [0, 1], none: all 1; margin [P] or one number, none: 0.
    `centre` weighs a pull of the two rewards' sum towards zero, which the comparison itself leaves free.
    """
    d = chosen - rejected
    if margin is not None:
        d = d - margin
    loss = -logsigmoid(d) if p is None else -(p * logsigmoid(d) + (1 - p) * logsigmoid(-d))
    if centre:
        loss = loss + centre * (chosen + rejected).square()
    return loss


def dpo(chosen: Tensor, rejected: Tensor, p: Tensor, beta: float) -> Tensor:
    """-[p log s(d) + (1 - p) log s(-d)], d = beta (chosen - rejected). [P] of log-ratios [P] in nats and p [P].

    Rafailov et al. 2023, "Direct preference optimization", eq. 7, where p = 1; p = 1 - epsilon is conservative DPO.
    """
    return bradley_terry(beta * chosen, beta * rejected, p)


def ipo(chosen: Tensor, rejected: Tensor, p: Tensor, beta: float) -> Tensor:
    """p (h - 1 / (2 beta))^2 + (1 - p) (h + 1 / (2 beta))^2, h = chosen - rejected. [P] of log-ratios [P] and p [P].

    Azar et al. 2023, "A general theoretical paradigm to understand learning from human preferences", eq. 17, where
    p = 1 and beta is called tau. The minimum lies at h = (p - 1/2) / beta, finite even for certain labels.
    """
    h = chosen - rejected
    return p * (h - 0.5 / beta).square() + (1 - p) * (h + 0.5 / beta).square()


PAIRED: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {"sigmoid": dpo, "ipo": ipo}
"""By the name in the configuration: losses [P] of (chosen, rejected, p, beta)."""


def kto(
    log_ratios: Tensor,
    desirable: Tensor,
    reference_point: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """weight (1 - s(beta (r - z))) for a desirable answer, weight (1 - s(beta (z - r))) for an undesirable one. [N].

    log_ratios r [N] in nats, desirable [N] bool, reference_point z [], of `kto_reference_point`. Ethayarajh et al.
    2024, "KTO: Model alignment as prospect theoretic optimization", section 4.
    """
    gains = torch.where(desirable, log_ratios - reference_point, reference_point - log_ratios)
    # s(-x) in place of 1 - s(x), which is all rounding where x is large.
    return torch.where(desirable, desirable_weight, undesirable_weight) * (-beta * gains).sigmoid()


def kto_reference_point(mismatched: Tensor) -> Tensor:
    """max(0, mean of `mismatched` [N]), a scalar in nats without gradient: KL(pi || pi_ref), roughly.

    `mismatched` are log-ratios of answers that were given to other prompts. The true KL is never negative, whatever a
    few answers say, and a gradient through it would be a second loss, on answers that nobody judged here.
    """
    return mismatched.detach().mean().clamp(min=0)


def accuracy(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Share of pairs in which prediction and label prefer the same; ties, on either side, count half. Scalar.

    probabilities [P], predicted, sigmoid(chosen - rejected); labels [P] in [0, 1], 1 throughout for hard labels.
    """
    return (0.5 + 0.5 * (probabilities - 0.5).sign() * (labels - 0.5).sign()).mean()


def brier(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Mean squared difference of probabilities [P] and labels [P]. Scalar; 0.25 for always answering one half."""
    return (probabilities - labels).square().mean()


def length_controlled_accuracy(probabilities: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
    """Mean of two accuracies: where the better answer is the longer, and where it is the shorter. Scalar.

    One half for whoever always prefers the longer answer, however often that is right. Pairs of equal length, or whose
    label is one half, belong to neither side and are left out; NaN where a side has no pair. probabilities [P] and
    labels [P] in [0, 1]; lengths [P, 2] in tokens, chosen before rejected.
    """
    side = (lengths[:, 0] - lengths[:, 1]).sign() * (labels - 0.5).sign()
    longer, shorter = (accuracy(probabilities[side == sign], labels[side == sign]) for sign in (1, -1))
    return (longer + shorter) / 2


class Reliability(NamedTuple):
    """Of pairs in bins of confidence. Means are NaN where a bin is empty."""

    counts: Tensor
    """[bins]"""
    confidence: Tensor
    """[bins] mean predicted probability of the side predicted."""
    agreement: Tensor
    """[bins] mean weight of the label on that side: the share of pairs in which it is the better one."""


def reliability(probabilities: Tensor, labels: Tensor, bins: int = 10) -> Reliability:
    """What the predictions of each confidence come to. probabilities [P] and labels [P] in [0, 1].

    Confidence is the probability of the side predicted, binned in `bins` equal parts of [0.5, 1]; agreement is the
    label's weight on that side, one half where no side is predicted.
    """
    lean = probabilities - 0.5
    place = (lean.abs() * 2 * bins).long().clamp(max=bins - 1)
    nothing = torch.zeros(bins, dtype=lean.dtype, device=lean.device)
    counts = nothing.index_add(0, place, torch.ones_like(lean))
    confidence = nothing.index_add(0, place, 0.5 + lean.abs())
    agreement = nothing.index_add(0, place, 0.5 + lean.sign() * (labels - 0.5))
    return Reliability(counts, confidence / counts, agreement / counts)


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 10) -> Tensor:
    """sum_b n_b / P |mean confidence - mean agreement|, a scalar (Guo et al. 2017, eq. 3).

    probabilities [P] and labels [P] in [0, 1], in the bins of `reliability`.
    """
    found = reliability(probabilities, labels, bins)
    gaps = (found.confidence - found.agreement).abs().nan_to_num(0)
    return (found.counts * gaps).sum() / len(probabilities)
