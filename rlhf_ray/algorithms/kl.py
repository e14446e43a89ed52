"""KL divergence from the reference: estimators on sampled tokens, per-token rewards, and the penalty's controllers.

With x = log pi(y) - log pi_ref(y) on a token y sampled from pi, the estimators differ in what they are for: k1 in the
reward is the one whose policy gradient is that of KL(pi || pi_ref), and PPO uses it there. k2 and k3 have less variance
and are never negative, but in the reward, near the reference, they do not act on the token they are measured at.
docs/kl.md has the gradient of each, in the reward and as a loss. A score must never land on another token than the last
of its own sequence, and no controller may ever take a KL that is not finite.

Torch is imported for annotations only: the process that steers a run holds a controller and no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_ERROR = 0.2
"""Bound on the relative error that one update of the adaptive controller reacts to."""


def k1(logp: Tensor, ref: Tensor) -> Tensor:
    """x, [N] nats. Unbiased, may be negative. Both arguments [N]."""
    return logp - ref


def k2(logp: Tensor, ref: Tensor) -> Tensor:
    """x^2 / 2, [N] nats. Biased, never negative. Both arguments [N]."""
    return (logp - ref).square() / 2


def k3(logp: Tensor, ref: Tensor) -> Tensor:
    """exp(-x) - 1 + x, [N] nats. Unbiased, never negative, explodes where ref >> logp. Both arguments [N].

    Schulman 2020, "Approximating KL divergence".
    """
    x = logp - ref
    return (-x).expm1() + x


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def token_rewards(kl: Tensor, scores: Tensor, offsets: Tensor, beta: float) -> Tensor:
    """r_t = -beta kl_t, plus the score at each sequence's last token, the EOS token itself. [N].

    kl [N], scores [B], offsets [B + 1]. Raises ValueError for a sequence without tokens: its score has no place.

    >>> import torch
    >>> token_rewards(torch.ones(5), torch.tensor([3.0, 7.0]), torch.tensor([0, 3, 5]), beta=0.5)
    tensor([-0.5000, -0.5000,  2.5000, -0.5000,  6.5000])
    """
    empty = (offsets.diff() == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"sequences {empty} have no tokens; a score belongs to a sequence's last token")
    return (-beta * kl).index_add(0, offsets[1:] - 1, scores.to(kl.dtype))


class Controller:
    """beta, the price of KL in score per nat, and what a checkpoint keeps of it."""

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient

    def update(self, kl: float, samples: int) -> None:
        """Takes the mean KL of a sequence, in nats, over `samples` sequences."""
        raise NotImplementedError

    def state(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def restore(self, state: dict[str, float]) -> None:
        self.coefficient = state["coefficient"]


class FixedKL(Controller):
    """beta as configured."""

    def update(self, kl: float, samples: int) -> None:
        """Does nothing."""


class AdaptiveKL(Controller):
    """beta steered so that the KL of a sequence nears `target` nats (Ziegler et al. 2019, section 2.2).

    error = clip(kl / target - 1, -0.2, 0.2); beta *= 1 + error * samples / horizon.
    """

    def __init__(self, coefficient: float, target: float, horizon: float) -> None:
        super().__init__(coefficient)
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, samples: int) -> None:
        """Takes the mean KL of a sequence, in nats, over `samples` sequences.

        Raises ValueError when kl is not finite, or when so many samples at once could turn beta zero or negative,
        which would reward distance from the reference.
        """
        _require_finite(kl)
        if samples * LARGEST_ERROR >= self.horizon:
            raise ValueError(
                f"a horizon of {self.horizon:g} samples is too short for updates of {samples} samples: beta could turn "
                f"negative; set the horizon above {samples * LARGEST_ERROR:g}, usually to many times the samples"
            )
        error = max(-LARGEST_ERROR, min(LARGEST_ERROR, kl / self.target - 1))
        self.coefficient *= 1 + error * samples / self.horizon


class BudgetKL(Controller):
    """beta as the multiplier of the constraint KL(sequence) <= `budget` nats, by projected dual ascent.

    beta <- max(0, beta + rate (kl - budget)), the multiplier's update in Tessler et al. 2019, "Reward constrained
    policy optimization". At rest either KL is the budget, or beta is zero and the constraint costs nothing.
    """

    def __init__(self, coefficient: float, budget: float, rate: float) -> None:
        super().__init__(coefficient)
        self.budget = budget
        self.rate = rate

    def update(self, kl: float, samples: int) -> None:
        """Takes the mean KL of a sequence, in nats; one step whatever the samples. Raises ValueError if not finite."""
        _require_finite(kl)
        self.coefficient = max(0.0, self.coefficient + self.rate * (kl - self.budget))


def _require_finite(kl: float) -> None:
    # max(0, NaN) is 0 in Python: a broken KL would switch the penalty off without a word.
    if not math.isfinite(kl):
        raise ValueError(f"the KL controller was given a KL of {kl}")
