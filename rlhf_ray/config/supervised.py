"""Configuration of `rlhf-ray sft` and `rlhf-ray reward`: two losses, one way to train."""

from typing import Annotated

from pydantic import Field, model_validator

from rlhf_ray.config.base import Config
from rlhf_ray.config.common import DataConfig, GPUs, OptimizerConfig, Positive, Share, StageConfig, ZeroConfig


class TrainingConfig(Config):
    """How many passes, how much at once."""

    epochs: Positive = 1
    sequences_per_step: Positive = 32
    """Rows (SFT) or pairs (reward) of one optimiser step, over all ranks."""
    tokens_per_micro_batch: Positive = 4096
    """Tokens of one forward and backward pass on one rank. Changes memory and speed, never the gradient."""
    held_out_share: Share = 0.05
    """Share of rows kept from training to measure on; drawn by the seed."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5)
    zero: ZeroConfig = ZeroConfig()


class WorkersConfig(Config):
    """Ray Train workers, one rank each."""

    ranks: Positive = 1
    cpus: Annotated[float, Field(gt=0)] = 1
    """CPU cores of each rank."""
    gpus: GPUs = 0
    """GPUs of each rank."""


class SupervisedConfig(StageConfig):
    model: str
    """Folder or hub name of the model to start from."""
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    workers: WorkersConfig = WorkersConfig()
    deadline_s: Annotated[float, Field(gt=0)] = 600.0
    """Longest time without a step or an answer from the workers before the run stops."""

    @model_validator(mode="after")
    def devices_agree(self) -> "SupervisedConfig":
        if (self.device == "gpu") != (self.workers.gpus > 0):
            raise ValueError(f"device is {self.device}, but workers.gpus is {self.workers.gpus:g}")
        return self

    @model_validator(mode="after")
    def a_row_fits_a_micro_batch(self) -> "SupervisedConfig":
        if self.training.tokens_per_micro_batch < self.data.max_tokens:
            raise ValueError(
                f"training.tokens_per_micro_batch is {self.training.tokens_per_micro_batch}, smaller than the longest "
                f"row, data.max_tokens = {self.data.max_tokens}"
            )
        return self


class SFTConfig(SupervisedConfig):
    """`rlhf-ray sft`: the loss is on completion tokens only."""


class RewardConfig(SupervisedConfig):
    """`rlhf-ray reward`: Bradley-Terry on `chosen` and `rejected`, with optional columns `margin` and `p`."""

    centre: Annotated[float, Field(ge=0)] = 0.01
    """Weight of (r_chosen + r_rejected)^2, which keeps rewards near zero."""
