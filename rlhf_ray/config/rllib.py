"""Configuration of `rlhf-ray rllib`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf_ray.config.base import Config, named
from rlhf_ray.config.common import Positive, Share, StageConfig


class WalksConfig(Config):
    """Walks on a random graph, drawn by the run's seed; a token is the node gone to, a walk's score its optimality."""

    nodes: Annotated[int, Field(ge=2, le=256)] = 21
    share: Annotated[float, Field(gt=0, le=1)] = 0.15
    """Probability of an edge from one node to another."""
    longest: Positive = 10
    """Steps after which a walk is cut off."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Price of a nat of cross-entropy to the reference, to which all nodes are alike; docs/rllib.md."""


class Algorithm(Config):
    """What every algorithm has."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    gamma: Share = 1.0
    """Discount of a token."""


class PPO(Algorithm):
    """RLlib's proximal policy optimisation; advantages are whitened."""

    name: Literal["ppo"] = "ppo"
    gae_lambda: Share = 0.95
    clip_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.2
    epochs: Positive = 4
    minibatches: Positive = 8
    """Optimiser steps in each epoch."""
    entropy_bonus: Annotated[float, Field(ge=0)] = 0.03


class DQN(Algorithm):
    """RLlib's deep Q-network, double and dueling; its policy is greedy."""

    name: Literal["dqn"] = "dqn"
    transitions_per_step: Positive = 64
    """Tokens replayed for an optimiser step."""
    exploration_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the run over which the share of random tokens falls from 1 to 0.05."""
    sync_every: Positive = 500
    """Tokens sampled from one copy of Q into its target to the next."""


class RLlibConfig(StageConfig):
    """`rlhf-ray rllib`: RLlib's PPO or DQN on a token MDP whose optimum is known, on CPU; docs/rllib.md."""

    environment: WalksConfig = WalksConfig()
    algorithm: Annotated[PPO | DQN, Field(discriminator="name"), named("ppo")] = PPO()
    """Its name, or a section with its settings."""
    updates: Positive = 50
    tokens_per_update: Positive = 2000
    """Tokens sampled, at least, for an update (PPO), or between two lines of metrics (DQN)."""

    @model_validator(mode="after")
    def minibatches_are_not_empty(self) -> "RLlibConfig":
        if isinstance(self.algorithm, PPO) and self.algorithm.minibatches > self.tokens_per_update:
            raise ValueError(
                f"algorithm.minibatches is {self.algorithm.minibatches}, but an update has only "
                f"{self.tokens_per_update} tokens"
            )
        return self

    @model_validator(mode="after")
    def it_runs_on_cpu(self) -> "RLlibConfig":
        if self.device == "gpu":
            raise ValueError("device is gpu, but rllib's networks are too small for one; leave it at cpu")
        return self
