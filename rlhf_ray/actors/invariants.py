"""What must hold in every update of a real run, checked before a step is taken on the numbers that say so.

Each check gives sentences, one a breach, and knows nothing of what follows from them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_ray.config.ppo import Coupled, PPOConfig


@dataclass(frozen=True)
class Bounds:
    ratio: float
    """Largest |ratio - 1| in the first minibatch: the same weights on the same tokens, packed in another order."""
    kl: float
    """Largest |KL| in nats a token at update 0: policy and reference are the same weights in two processes."""
    warn_gap: float
    """Mean |learner - engine| in nats a token. A publication that went missing once showed 0.2 in bf16."""
    stop_gap: float


BOUNDS = {
    "float32": Bounds(ratio=1e-3, kl=1e-4, warn_gap=1e-3, stop_gap=1e-2),
    "bfloat16": Bounds(ratio=0.5, kl=0.02, warn_gap=0.05, stop_gap=0.2),
}

STALE_GAPS = 0.1, 1.0
"""warn_gap and stop_gap where answers may be older than the policy: what it has moved since comes on top."""


@dataclass(frozen=True)
class Found:
    """Sentences for a person."""

    warnings: tuple[str, ...] = ()
    breaches: tuple[str, ...] = ()


def of_experience(metrics: Mapping[str, float], update: int, config: PPOConfig) -> Found:
    """Before the first step of an update."""
    bounds, breaches, warnings = BOUNDS[config.dtype], [], []
    broken = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if broken:
        breaches.append(f"not finite: {', '.join(broken)}")
    # The one that is used, where it is not the sampled tokens' own: it can be wrong while that is right.
    full = metrics.get("objective/kl_full", 0.0) / metrics["tokens/response_length"]
    kl = max(metrics["objective/kl_per_token"], full, key=abs)
    if update == 0 and not abs(kl) <= bounds.kl:
        breaches.append(
            f"before anything is learned, policy and reference differ by {kl:.3g} nats a token (at most "
            f"{bounds.kl:g} by rounding): they are not the same model, or compute otherwise"
        )
    gap, settings = metrics["rollout/logprob_gap_mean"], config.ppo.correction
    warn, stop = STALE_GAPS if config.ppo.max_staleness else (bounds.warn_gap, bounds.stop_gap)
    warn, stop = settings.warn_gap or warn, settings.stop_gap or stop
    largest = metrics["rollout/logprob_gap_max"]
    apart = f"engine and learner differ by {gap:.3g} nats a token on average and {largest:.3g} at most"
    if not gap <= stop:
        breaches.append(f"{apart}; ppo.correction.stop_gap is {stop:g}")
    elif gap > warn:
        warnings.append(f"{apart}; ppo.correction.warn_gap is {warn:g}")
    return Found(tuple(warnings), tuple(breaches))


def of_first_minibatch(deviation: float, config: PPOConfig) -> Found:
    """`deviation` is the largest |ratio - 1|. A ratio to the engine's log-probabilities need not be one."""
    bound = BOUNDS[config.dtype].ratio
    if isinstance(config.ppo.correction, Coupled) or deviation <= bound:
        return Found()
    return Found(
        breaches=(
            f"the first minibatch has a ratio that is {deviation:.3g} away from one (at most {bound:g} by rounding)",
        )
    )
