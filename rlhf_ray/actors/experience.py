"""From what the roles sent to what the learner trains on: KL, rewards, advantages. Flat [N] over response tokens.

Every learner rank holds the whole batch's columns (some tens of bytes a token) and computes this alike, so whitening
and metrics need no communication and cannot depend on how many ranks there are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_ray.algorithms import advantages, correction, kl, statistics
from rlhf_ray.algorithms.correction import Correction
from rlhf_ray.algorithms.logprobs import TokenStatistics
from rlhf_ray.config import ppo as configs
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.errors import RewardError, TrainingError
from rlhf_ray.records import Finish, ReferenceColumns, Trajectories, token_places


@dataclass(frozen=True)
class Batch:
    """All trajectories of an update with what reference and reward said of them. B answers, N response tokens."""

    trajectories: Trajectories
    reference: ReferenceColumns
    scores: Tensor
    """[B]"""
    details: Tensor
    """[B, D] what the configuration's `reward.details` names."""

    @classmethod
    def gather(cls, chunks: Sequence[tuple[Trajectories, ReferenceColumns, np.ndarray]]) -> "Batch":
        """Joins chunks of trajectories, what the reference says of them, and scores [b] or, with details, [b, 1 + D].

        In order of sample ids, so that the order in which answers happened to finish changes nothing."""
        for trajectories, reference, scores in chunks:
            if len(reference) != trajectories.tokens or len(scores) != len(trajectories):
                raise RewardError(
                    f"a chunk of {len(trajectories)} answers and {trajectories.tokens} tokens came with {len(scores)} "
                    f"scores and {len(reference)} reference log-probabilities"
                )
        columns = torch.from_numpy(np.concatenate([scores.reshape(len(scores), -1) for _, _, scores in chunks]))
        whole = cls(
            Trajectories.concatenate([chunk for chunk, _, _ in chunks]),
            ReferenceColumns.concatenate([columns for _, columns, _ in chunks]),
            columns[:, 0],
            columns[:, 1:],
        )
        return whole.take(np.argsort(whole.trajectories.sample_ids, kind="stable"))

    def take(self, rows: np.ndarray) -> "Batch":
        """The answers `rows`, in that order."""
        places, at = token_places(self.trajectories.responses.offsets, rows), torch.from_numpy(rows)
        return Batch(self.trajectories.take(rows), self.reference.take(places), self.scores[at], self.details[at])

    def of_prompts(self, numbers: np.ndarray, samples_per_prompt: int) -> "Batch":
        """The answers to the prompts `numbers`. Raises TrainingError unless each has all of its answers, once.

        An engine that failed must not look like one that had nothing left to do."""
        mine = self.take(np.flatnonzero(np.isin(self.prompts(samples_per_prompt).numpy(), numbers)))
        wanted = (np.sort(numbers)[:, None] * samples_per_prompt + np.arange(samples_per_prompt)).reshape(-1)
        if not np.array_equal(mine.trajectories.sample_ids, wanted):
            arrived = len(np.intersect1d(mine.trajectories.sample_ids, wanted))
            raise TrainingError(
                f"{len(wanted)} answers were asked for; {len(mine)} arrived, {arrived} of them distinct"
            )
        return mine

    def __len__(self) -> int:
        return len(self.trajectories)

    @property
    def offsets(self) -> Tensor:
        """[B + 1] where each answer's tokens begin."""
        return torch.from_numpy(self.trajectories.responses.offsets.astype(np.int64))

    def prompts(self, samples_per_prompt: int) -> Tensor:
        """[B] number of each answer's prompt in the run: answers to one prompt are a group."""
        return torch.from_numpy(self.trajectories.sample_ids // samples_per_prompt)


@dataclass(frozen=True)
class Experience:
    """What the clipped losses need, all [N] and constants to them, and what is reported."""

    old_logprobs: Tensor
    """What ratios are taken to."""
    reference_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    """Importance weights between engine and learner."""
    values: Tensor | None
    """The critic's before the update, with its targets; none without a critic."""
    returns: Tensor | None
    metrics: dict[str, float]
    sequence_kl: Tensor
    """[B] nats, of the sampled tokens"""


@dataclass(frozen=True)
class Rewarded:
    """What an advantage is computed from."""

    rewards: Tensor
    """[N] the KL penalty where it stands in the reward, plus the score at each answer's last token."""
    offsets: Tensor
    """[B + 1]"""
    groups: Tensor
    """[B] number of the prompt"""
    values: Tensor | None
    """[N], with a critic"""


def _gae(data: Rewarded, settings: configs.PPO) -> tuple[Tensor, Tensor]:
    assert data.values is not None
    rewards = statistics.whiten(data.rewards, keep_mean=True) if settings.whiten_rewards else data.rewards
    raw, returns = advantages.gae(rewards, data.values, data.offsets, settings.gamma, settings.gae_lambda)
    return statistics.whiten(raw), returns


def _group(data: Rewarded, settings: configs.Algorithm) -> tuple[Tensor, None]:
    returns = statistics.sequence_sums(data.rewards, data.offsets)
    of_answer = advantages.group(returns, data.groups, scale=not isinstance(settings, configs.DrGRPO))
    return statistics.at_tokens(of_answer, data.offsets), None


def _leave_one_out(data: Rewarded, settings: configs.RLOO) -> tuple[Tensor, None]:
    returns = statistics.sequence_sums(data.rewards, data.offsets)
    return statistics.at_tokens(advantages.leave_one_out(returns, data.groups), data.offsets), None


def _reinforce(data: Rewarded, settings: configs.ReinforcePP) -> tuple[Tensor, None]:
    rewards = data.rewards
    if settings.baseline:  # at the last token, where the score stands
        returns = statistics.sequence_sums(rewards, data.offsets)
        shift = advantages.group(returns, data.groups, scale=False) - returns
        rewards = rewards.index_add(0, data.offsets[1:] - 1, shift)
    return statistics.whiten(advantages.rewards_to_go(rewards, data.offsets, settings.gamma)), None


ADVANTAGES: dict[str, Callable[[Rewarded, Any], tuple[Tensor, Tensor | None]]] = {
    "ppo": _gae,
    "grpo": _group,
    "dr_grpo": _group,
    "rloo": _leave_one_out,
    "reinforce_pp": _reinforce,
    "dapo": _group,
    "gspo": _group,
}
"""Name of an algorithm to advantages [N] and, with a critic, its targets [N]."""


def build(
    batch: Batch, policy: TokenStatistics, values: Tensor | None, config: PPOConfig, coefficient: float
) -> Experience:
    """Rewards, advantages and weights from what the learner's policy says, before the update, of the N tokens.

    values [N], with a critic; `coefficient` is beta.
    """
    ppo, offsets = config.ppo, batch.offsets
    reference = torch.from_numpy(batch.reference.logprobs.copy())
    sampler = torch.from_numpy(batch.trajectories.sampler_logprobs.copy())
    scores = final_scores(batch.trajectories, batch.scores, config)
    token_kl = kl_tokens(policy, reference, ppo.kl.estimator.name)
    in_reward = coefficient if ppo.kl.estimator.placement != "loss" else 0.0
    rewards = kl.token_rewards(token_kl, scores, offsets, in_reward)
    groups = batch.prompts(config.rollout.samples_per_prompt)
    found, returns = ADVANTAGES[ppo.algorithm.name](Rewarded(rewards, offsets, groups, values), ppo.algorithm)
    corrected = correct(policy.logprobs, sampler, offsets, ppo.correction)

    sequence_kl = statistics.sequence_sums(policy.logprobs - reference, offsets)
    metrics = {
        **_objective_metrics(batch, policy, reference, scores, sequence_kl, coefficient),
        **_rollout_metrics(batch, policy.logprobs, sampler, corrected),
        **dict(zip(config.reward.details, batch.details.mean(0).tolist(), strict=True)),
        "objective/rlhf_reward": (scores - coefficient * statistics.sequence_sums(token_kl, offsets)).mean().item(),
    }
    if policy.kl is not None:
        metrics["objective/kl_full"] = statistics.sequence_sums(policy.kl, offsets).mean().item()
    if values is not None and returns is not None:
        unexplained = (returns - values).var(unbiased=False) / returns.var(unbiased=False).clamp_min(1e-12)
        metrics["val/explained_variance"] = 1.0 - unexplained.item()
    old = sampler if isinstance(ppo.correction, configs.Coupled) else policy.logprobs
    return Experience(old, reference, found, corrected.weights, values, returns, metrics, sequence_kl)


def final_scores(trajectories: Trajectories, scores: Tensor, config: PPOConfig) -> Tensor:
    """[B] what each answer is paid: its of `scores` [B], or the penalty where it was cut off; less the price of length.

    Over the last `overlong_buffer` tokens before the limit the price grows from 0 to 1 (Yu et al. 2025, eq. 13).
    """
    penalty = config.ppo.missing_eos_penalty
    if penalty is not None:
        finished = torch.from_numpy(trajectories.finish == Finish.EOS)
        scores = torch.where(finished, scores, torch.full_like(scores, -penalty))
    buffer = getattr(config.ppo.algorithm, "overlong_buffer", 0)
    if buffer:
        lengths = torch.from_numpy(trajectories.responses.lengths)
        excess = lengths - (config.rollout.max_new_tokens - buffer)
        scores = scores - excess.clamp(min=0) / buffer
    return scores


def kl_tokens(policy: TokenStatistics, reference: Tensor, estimator: str) -> Tensor:
    """[N] nats by the configured estimator; differentiable in what `policy` holds. reference [N]."""
    if estimator == "full":
        assert policy.kl is not None
        return policy.kl
    return kl.ESTIMATORS[estimator](policy.logprobs, reference)


def correct(learner: Tensor, sampler: Tensor, offsets: Tensor, settings: configs.Correction) -> Correction:
    """Weights of tokens [N] from the learner's and the sampler's log-probabilities [N]."""
    match settings:
        case configs.Truncate(level=level, cap=cap):
            return correction.truncate(correction.log_weights(learner, sampler, offsets, level), cap)
        case configs.Mask(level=level, low=low, high=high):
            return correction.mask(correction.log_weights(learner, sampler, offsets, level), low, high)
    return Correction(torch.ones_like(learner), torch.zeros_like(learner, dtype=torch.bool))


def _objective_metrics(
    batch: Batch,
    policy: TokenStatistics,
    reference: Tensor,
    scores: Tensor,
    sequence_kl: Tensor,
    coefficient: float,
) -> dict[str, float]:
    return {
        "objective/kl": sequence_kl.mean().item(),
        "objective/kl_per_token": (policy.logprobs - reference).mean().item(),
        "objective/kl_coefficient": coefficient,
        "objective/scores": batch.scores.mean().item(),
        "objective/scores_std": batch.scores.std(unbiased=False).item(),
        "objective/entropy": policy.entropy.mean().item(),
    }


def _rollout_metrics(batch: Batch, learner: Tensor, sampler: Tensor, corrected: Correction) -> dict[str, float]:
    gap = correction.gap(learner, sampler)
    lengths = batch.trajectories.responses.lengths
    return {
        "rollout/eos_share": float((batch.trajectories.finish == Finish.EOS).mean()),
        "rollout/logprob_gap_max": gap.max.item(),
        "rollout/logprob_gap_p99": gap.p99.item(),
        "rollout/logprob_gap_mean": gap.mean.item(),
        "correction/weight_mean": corrected.weights.mean().item(),
        "correction/clipped_share": corrected.clipped.float().mean().item(),
        "correction/effective_sample_share": correction.effective_sample_share(corrected.weights).item(),
        "tokens/prompt": float(batch.trajectories.prompts.lengths.sum()),
        "tokens/trained": float(lengths.sum()),
        "tokens/response_length": float(lengths.mean()),
    }
