"""What a configuration may say but a person should know: combinations that run and are known to be biased or risky.

Combinations that can only be mistakes are refused by the models themselves.
"""

from rlhf_ray.config.common import StageConfig
from rlhf_ray.config.ppo import FixedController, PPOConfig, Uncorrected

KL_DOUBTS = {
    ("k2", "reward"): "k2 in the reward does not have the gradient of the KL; k1 has",
    ("k3", "reward"): "k3 in the reward does not have the gradient of the KL; k1 has",
    (
        "k3",
        "loss",
    ): "k3 as a loss has the gradient of the other KL, reference to policy; k2 has that of this one",
    (
        "full",
        "reward",
    ): "full in the reward alone leaves out a token's own share of the gradient; use placement: both",
    ("full", "loss"): "full as a loss alone leaves out what a token does to later ones; use placement: both",
}
"""(estimator, placement) to what is wrong with it."""


def advice(config: StageConfig) -> list[str]:
    """One sentence or two for each doubtful choice; printed by a dry run and at the start of a run."""
    return _ppo_advice(config) if isinstance(config, PPOConfig) else []


def _ppo_advice(config: PPOConfig) -> list[str]:
    kl, found = config.ppo.kl, []
    if kl.coefficient > 0 or not isinstance(kl.controller, FixedController):
        doubt = KL_DOUBTS.get((kl.estimator.name, kl.estimator.placement))
        found += [f"ppo.kl: {doubt} (docs/kl.md)"] if doubt else []
    if isinstance(config.ppo.correction, Uncorrected):
        found.append(
            "ppo.correction is none: tokens train as if the learner had sampled them, whatever the engine's precision "
            "and age; rollout/logprob_gap_mean says how far apart the two are"
        )
    if config.ppo.max_staleness and any({"rollout", "learner"} <= set(group) for group in config.roles.shared):
        found.append(
            "ppo.max_staleness lets generation and training overlap, but rollout and learner share their GPUs: each "
            "slows the other down; give them machines of their own, or set it to 0"
        )
    if config.ppo.on_breach == "warn":
        found.append("ppo.on_breach is warn: an update that breaks an invariant only says so")
    return found
