"""Rewards of given answers, by an actor of its own; what PPO's reward role gives, for stages that train nothing."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from rlhf_ray.actors.reward import Rewards
from rlhf_ray.config.common import StageConfig
from rlhf_ray.config.layout import Group
from rlhf_ray.config.rewards import RewardSection
from rlhf_ray.records import Trajectories
from rlhf_ray.runtime.deadlines import fetch
from rlhf_ray.runtime.environment import torch_environment
from rlhf_ray.runtime.placement import Placement

TOKENS_PER_PASS = 8192
ROWS_AT_ONCE = 1024
"""Rows of one call, each of which has the deadline."""


class Scorer:
    """One actor with all sources of a reward."""

    def __init__(self, actor: Any, reward: RewardSection, deadline_s: float) -> None:
        self.actor, self.reward, self.deadline_s = actor, reward, deadline_s

    def columns(self, prompts: Sequence[Any], answers: Sequence[Any]) -> np.ndarray:
        """[B, 1 + D] of token ids prompts [B] and answers [B]: the score, then what `reward.details` names."""
        parts = []
        for start in range(0, len(prompts), ROWS_AT_ONCE):
            some = slice(start, start + ROWS_AT_ONCE)
            call = self.actor.scores.remote(Trajectories.given(prompts[some], answers[some]))
            parts.append(fetch(call, self.deadline_s, "reward", "scoring"))
        return np.concatenate(parts)

    def scores(self, trajectories: Trajectories) -> np.ndarray:
        """[B] scores, as a source of rewards gives them."""
        rows = range(len(trajectories))
        prompts = [trajectories.prompt(row) for row in rows]
        return self.columns(prompts, [trajectories.responses[row] for row in rows])[:, 0]


def tokenizer_of(reward: RewardSection, otherwise: str) -> str:
    """The model whose tokenizer the reward reads; one without models reads text."""
    return next(iter(reward.members), otherwise)


@contextmanager
def scorer(reward: RewardSection, tokenizer: str, stage: StageConfig, deadline_s: float) -> Iterator[Scorer]:
    """Up within it, and gone after it; `tokenizer` is the model of the ids that it will get."""
    needs = {"CPU": 1.0, "GPU": 1.0} if stage.device == "gpu" and reward.members else {"CPU": 1.0}
    placement = Placement([Group(("reward",), (needs,))], {"reward": needs}, deadline_s)
    try:
        placement.reserve()
        arguments = (reward, TOKENS_PER_PASS, stage.device, tokenizer, stage.trust_remote_code)
        actor = placement.start("reward", 0, Rewards, *arguments, env=torch_environment(1))
        fetch(actor.__ray_ready__.remote(), deadline_s, "reward", "starting")
        yield Scorer(actor, reward, deadline_s)
    finally:
        placement.release()
