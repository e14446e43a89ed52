"""Several reward models as one score, and how far they are apart.

Members are read in equal units (mean 0, deviation 1 on answers that none was trained on), or the one with the largest
scores would decide alone. An answer that only some of them like is where a policy that is optimised goes: `worst` and
`uncertainty` do not pay for it, `mean` pays in part, and disagreement shows it whichever is chosen.
"""

from torch import Tensor


def mean(scores: Tensor) -> Tensor:
    """[B] mean over members of scores [K, B]."""
    return scores.mean(0)


def worst(scores: Tensor) -> Tensor:
    """[B] min_k of scores [K, B]: worst-case optimisation of Coste et al. 2023 (arXiv 2310.02743)."""
    return scores.amin(0)


def uncertainty(scores: Tensor, coefficient: float) -> Tensor:
    """[B] mean_k - coefficient var_k of scores [K, B], var without Bessel's correction.

    Uncertainty-weighted optimisation of Coste et al. 2023 (arXiv 2310.02743).
    """
    return scores.mean(0) - coefficient * scores.var(0, correction=0)


def disagreement(scores: Tensor) -> Tensor:
    """[B] standard deviation over members of scores [K, B], without Bessel's correction."""
    return scores.std(0, correction=0)
