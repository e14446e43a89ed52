"""Bradley-Terry on soft labels, and how well a preference model predicts.

p is the probability that `chosen` is the better of its pair; the gradient in d = chosen - rejected is sigmoid(d) - p.
The measures are the same whichever of a pair is named first: on data that always name the better one first, anything
else would be gamed by confidence alone.
"""

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


def accuracy(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Share of pairs in which prediction and label prefer the same; ties, on either side, count half. Scalar.

    probabilities [P], predicted, sigmoid(chosen - rejected); labels [P] in [0, 1], 1 throughout for hard labels.
    """
    return (0.5 + 0.5 * (probabilities - 0.5).sign() * (labels - 0.5).sign()).mean()


def brier(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Mean squared difference of probabilities [P] and labels [P]. Scalar; 0.25 for always answering one half."""
    return (probabilities - labels).square().mean()


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 10) -> Tensor:
    """sum_b n_b / P |mean confidence - mean agreement|, a scalar (Guo et al. 2017, eq. 3).

    probabilities [P] and labels [P] in [0, 1]. Confidence is the probability of the side predicted, binned in `bins`
    equal parts of [0.5, 1]; agreement is the label's weight on that side, one half where no side is predicted.
    """
    lean = probabilities - 0.5
    confidence = 0.5 + lean.abs()
    agreement = 0.5 + lean.sign() * (labels - 0.5)
    place = (lean.abs() * 2 * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=lean.dtype, device=lean.device).index_add(0, place, confidence - agreement)
    return gaps.abs().sum() / len(probabilities)
