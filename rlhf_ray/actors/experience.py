"""From what the roles sent to what the learner trains on: KL, rewards, advantages. Flat [N] over response tokens.

Every learner rank holds the whole batch's columns (some tens of bytes a token) and computes this alike, so whitening
and metrics need no communication and cannot depend on how many ranks there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_ray.algorithms import advantages, kl, statistics
from rlhf_ray.config.ppo import PPOAlgorithm
from rlhf_ray.errors import RewardError
from rlhf_ray.records import Finish, Trajectories, token_places


@dataclass(frozen=True)
class Batch:
    """All trajectories of an update with what reference and reward said of them. B answers, N response tokens."""

    trajectories: Trajectories
    reference_logprobs: Tensor
    """[N]"""
    scores: Tensor
    """[B]"""

    @classmethod
    def gather(cls, chunks: Sequence[tuple[Trajectories, np.ndarray, np.ndarray]]) -> "Batch":
        """Joins chunks of (trajectories, reference log-probabilities [n], scores [b]) in order of sample ids, so that
        the order in which answers happened to finish changes nothing."""
        for trajectories, reference, scores in chunks:
            if len(reference) != trajectories.tokens or len(scores) != len(trajectories):
                raise RewardError(
                    f"a chunk of {len(trajectories)} answers and {trajectories.tokens} tokens came with {len(scores)} "
                    f"scores and {len(reference)} reference log-probabilities"
                )
        joined = Trajectories.concatenate([chunk for chunk, _, _ in chunks])
        order = np.argsort(joined.sample_ids, kind="stable")
        reference = np.concatenate([column for _, column, _ in chunks])
        places = token_places(joined.responses.offsets, order)
        return cls(
            joined.take(order),
            torch.from_numpy(reference[places]),
            torch.from_numpy(np.concatenate([scores for _, _, scores in chunks])[order]),
        )

    def __len__(self) -> int:
        return len(self.trajectories)

    @property
    def offsets(self) -> Tensor:
        """[B + 1] where each answer's tokens begin."""
        return torch.from_numpy(self.trajectories.responses.offsets.astype(np.int64))

    @property
    def lengths(self) -> np.ndarray:
        """[B] tokens of prompt and answer together."""
        return self.trajectories.prompt_lengths + self.trajectories.responses.lengths


@dataclass(frozen=True)
class Experience:
    """What the clipped losses need, all [N], and what is reported."""

    old_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    """Whitened over all response tokens of the batch."""
    returns: Tensor
    metrics: dict[str, float]
    sequence_kl: Tensor
    """[B] nats"""


def build(
    batch: Batch, old_logprobs: Tensor, values: Tensor, entropies: Tensor, ppo: PPOAlgorithm, coefficient: float
) -> Experience:
    """r_t = -beta kl_t, plus the score at the last token; then GAE. `coefficient` is beta; tensors are [N].

    An answer cut off by its length scores minus `missing_eos_penalty`, whatever the reward said of its beginning.
    """
    offsets = batch.offsets
    finished = torch.from_numpy(batch.trajectories.finish == Finish.EOS)
    scores = torch.where(finished, batch.scores, torch.full_like(batch.scores, -ppo.missing_eos_penalty))
    token_kl = kl.ESTIMATORS[ppo.kl.estimator](old_logprobs, batch.reference_logprobs)
    rewards = kl.token_rewards(token_kl, scores, offsets, coefficient)
    if ppo.whiten_rewards:
        rewards = statistics.whiten(rewards, keep_mean=True)
    raw_advantages, returns = advantages.gae(rewards, values, offsets, ppo.gamma, ppo.gae_lambda)

    sequence_kl = statistics.sequence_sums(old_logprobs - batch.reference_logprobs, offsets)
    gap = (old_logprobs - torch.from_numpy(batch.trajectories.sampler_logprobs.copy())).abs()
    unexplained = (returns - values).var(unbiased=False) / returns.var(unbiased=False).clamp_min(1e-12)
    lengths = batch.trajectories.responses.lengths
    prompt_tokens = int(batch.trajectories.prompts.lengths.sum())
    metrics = {
        "objective/kl": sequence_kl.mean().item(),
        "objective/kl_per_token": (old_logprobs - batch.reference_logprobs).mean().item(),
        "objective/kl_coefficient": coefficient,
        "objective/scores": batch.scores.mean().item(),
        "objective/scores_std": batch.scores.std(unbiased=False).item(),
        "objective/rlhf_reward": (scores - coefficient * sequence_kl).mean().item(),
        "objective/entropy": entropies.mean().item(),
        "val/explained_variance": 1.0 - unexplained.item(),
        "rollout/eos_share": finished.float().mean().item(),
        "rollout/logprob_gap_max": gap.max().item(),
        "rollout/logprob_gap_mean": gap.mean().item(),
        "tokens/generated": float(lengths.sum()),
        "tokens/prompt": float(prompt_tokens),
        "tokens/response_length": float(lengths.mean()),
    }
    return Experience(old_logprobs, values, statistics.whiten(raw_advantages), returns, metrics, sequence_kl)
