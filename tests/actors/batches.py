"""Small batches as the learner gathers them, with what a policy says of them, for numbers worked by hand."""

from typing import Any

import numpy as np
import torch

from rlhf_ray.actors.experience import Batch, Experience, build
from rlhf_ray.algorithms.logprobs import TokenStatistics
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.records import Finish, ReferenceColumns
from tests.test_records import trajectories

Answers = list[tuple[int, list[int]]]


def config(samples: int = 1, longest: int = 8, **ppo: Any) -> PPOConfig:
    return PPOConfig.model_validate(
        {
            "name": "x",
            "policy": "p",
            "reward": {"function": "a:b"},
            "data": {"path": "d", "max_tokens": 8},
            "rollout": {"samples_per_prompt": samples, "max_new_tokens": longest},
            "ppo": ppo,
        }
    )


def batch(scores: list[float], answers: Answers, reference: list[float], finish: list[Finish] | None = None) -> Batch:
    """The sampler's log-probabilities are half the token's id, negative."""
    chunk = trajectories([[1], [2]], answers)
    chunk.finish[:] = finish or [Finish.EOS] * len(answers)
    return Batch.gather([(chunk, sampled(reference), np.array(scores, np.float32))])


def sampled(logprobs: list[float]) -> ReferenceColumns:
    return ReferenceColumns.sampled(np.array(logprobs, np.float32))


def policy(logprobs: list[float], entropy: float = 0.0, kl: list[float] | None = None) -> TokenStatistics:
    return TokenStatistics(
        torch.tensor(logprobs), torch.full((len(logprobs),), entropy), None if kl is None else torch.tensor(kl)
    )


TWO: Answers = [(0, [2, 3]), (1, [4])]
FOUR: Answers = [(0, [2, 3]), (0, [4]), (1, [5]), (1, [6, 7])]
GAE = {"name": "ppo", "gae_lambda": 1.0}


def made(some: Batch, says: TokenStatistics, beta: float = 0.1, **ppo: Any) -> Experience:
    """One token-value of zero each where the algorithm has a critic."""
    chosen = config(**ppo)
    values = torch.zeros(len(says.logprobs)) if chosen.ppo.algorithm.needs_critic else None
    return build(some, says, values, chosen, beta)
