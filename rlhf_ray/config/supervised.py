"""Configuration of `rlhf-ray sft`, `rlhf-ray reward` and `rlhf-ray dpo`: several losses, one way to train."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf_ray.config.base import Config
from rlhf_ray.config.common import GPUs, MixedDataConfig, OptimizerConfig, Positive, Share, StageConfig, ZeroConfig


class TrainingConfig(Config):
    """How many passes, how much at once."""

    epochs: Positive = 1
    sequences_per_step: Positive = 32
    """Rows (SFT, KTO) or pairs (reward, DPO) of one optimiser step, over all ranks."""
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
    data: MixedDataConfig
    training: TrainingConfig = TrainingConfig()
    workers: WorkersConfig = WorkersConfig()
    deadline_s: Annotated[float, Field(gt=0)] = 600.0
    """Longest time without a step or an answer from the workers before the run stops."""

    @model_validator(mode="after")
    def devices_agree(self) -> "SupervisedConfig":
        self.check_zero(self.training.zero)
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


class DPOConfig(SupervisedConfig):
    """`rlhf-ray dpo`: a language model learns from preferences directly; `model` is its start and its reference."""

    loss: Literal["sigmoid", "ipo", "kto"] = "sigmoid"
    """sigmoid (DPO) and ipo learn from pairs, kto from single answers with a `label`; docs/preferences.md."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Reward of one nat of log-ratio to the reference: the smaller, the further the model may move."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """With sigmoid: the probability that a label is wrong, on top of the column `p` (conservative DPO)."""
    desirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """With kto: what a desirable answer weighs; with `undesirable_weight` it evens out unequal numbers of both."""
    undesirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """With kto: what an undesirable answer weighs."""

    @model_validator(mode="after")
    def settings_belong_to_the_loss(self) -> "DPOConfig":
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing belongs to loss sigmoid, but loss is {self.loss}")
        if (self.desirable_weight, self.undesirable_weight) != (1, 1) and self.loss != "kto":
            raise ValueError(f"desirable_weight and undesirable_weight belong to loss kto, but loss is {self.loss}")
        return self
