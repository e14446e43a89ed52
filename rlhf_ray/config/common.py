"""Sections that several stages share. A default stands here and nowhere else."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from rlhf_ray.config.base import Config

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""What a person calls one of several things; part of the names of metrics."""


class DataConfig(Config):
    """Where rows come from. JSONL, JSON, Parquet, any of them gzipped, or a Hugging Face data set."""

    path: Annotated[str, Field(min_length=1)]
    """A file, a folder that `datasets` reads, or the name of a data set on the hub."""
    split: str = "train"
    """Which split of a Hugging Face data set."""
    max_tokens: Positive = 1024
    """Longest row in tokens, prompt and completion together (for PPO: the prompt). Longer rows are quarantined."""
    max_bad_share: Share = 0.01
    """Refuse to start when a larger share of rows than this is quarantined."""

    @property
    def parts(self) -> dict[str, "DataConfig"]:
        """As of `MixedDataConfig`: the one source, which needs no name."""
        return {"": self}


class SourceConfig(Config):
    """One of several sources of rows."""

    path: Annotated[str, Field(min_length=1)]
    """As `data.path`."""
    split: str = "train"
    """As `data.split`."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of an epoch's rows, relative to the other sources' weights; none, for all of them: every row counts."""


class MixedDataConfig(Config):
    """Rows of one path, or of several sources in given shares; docs/reward-models.md."""

    path: Annotated[str, Field(min_length=1)] | None = None
    """A file, a folder that `datasets` reads, or the name of a data set on the hub."""
    split: str = "train"
    """Which split of a Hugging Face data set."""
    sources: dict[Name, SourceConfig] = {}
    """In place of `path`: several sources by name, such as `{people: {path: p.jsonl}, ai: {path: a.jsonl}}`."""
    max_tokens: Positive = 1024
    """Longest row in tokens, prompt and completion together. Longer rows are quarantined."""
    max_bad_share: Share = 0.01
    """Refuse to start when a larger share of a source's rows than this is quarantined."""

    @model_validator(mode="after")
    def path_or_sources(self) -> "MixedDataConfig":
        if (self.path is None) == (not self.sources):
            raise ValueError(f"give exactly one of data.path and data.sources; {'both' if self.path else 'none'} given")
        if "all" in self.sources:
            raise ValueError("data.sources: 'all' stands for all of them in tables; give that source another name")
        without = [name for name, source in self.sources.items() if source.weight is None]
        if 0 < len(without) < len(self.sources):
            raise ValueError(f"data.sources: {', '.join(without)} has no weight; give one to every source or to none")
        return self

    @property
    def parts(self) -> dict[str, DataConfig]:
        """By name of the source, each as a data set of its own; the one source that `path` is has no name."""
        of_path = {"": (self.path, self.split)} if self.path is not None else {}
        of_sources = {name: (source.path, source.split) for name, source in self.sources.items()}
        return {
            name: DataConfig(path=path, split=split, max_tokens=self.max_tokens, max_bad_share=self.max_bad_share)
            for name, (path, split) in (of_path | of_sources).items()
        }

    @property
    def weights(self) -> dict[str, float] | None:
        """By name of the source; none: every row counts alike."""
        weights = {name: source.weight for name, source in self.sources.items() if source.weight is not None}
        return weights or None


class OptimizerConfig(Config):
    """AdamW (betas 0.9 and 0.95, eps 1e-5, no weight decay) and its schedule."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after warm-up; linear and cosine end at zero."""
    warmup_share: Share = 0.03
    """Share of all optimiser steps over which the rate rises linearly."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0


class ZeroConfig(Config):
    """DeepSpeed's memory options."""

    stage: Annotated[int, Field(ge=0, le=3)] = 1
    """ZeRO stage: 1 shards optimiser state, 2 gradients as well, 3 parameters as well."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Kept in host memory: nothing, optimiser state, or at stage 3 also parameters, a layer's fetched when computed."""
    bf16_optimizer: bool = False
    """Keep master weights and Adam's moments in bf16: half of their memory, and changes below a 256th of a weight are
    rounded away."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""

    @model_validator(mode="after")
    def offload_needs_sharding(self) -> "ZeroConfig":
        if self.offload == "optimizer" and self.stage == 0:
            raise ValueError("offload optimizer works with stage 1, 2 and 3, but stage is 0")
        if self.offload == "all" and self.stage < 3:
            raise ValueError(f"offload all works with stage 3, but stage is {self.stage}")
        if self.bf16_optimizer and self.stage == 0:
            raise ValueError("bf16_optimizer works with stage 1, 2 and 3, but stage is 0")
        if self.bf16_optimizer and self.offload != "none":
            raise ValueError(f"bf16_optimizer and offload {self.offload} do not work together; choose one")
        return self


class LoraConfig(Config):
    """Low-rank adapters (Hu et al. 2021) in place of training every weight; docs/lora.md."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """An adapter adds alpha / rank times its product."""
    targets: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get one, such as [q_proj, v_proj]."""
    share_reference: bool = False
    """The learner, adapters off, is the reference too, and the reference has no actor of its own."""


class TelemetryConfig(Config):
    """What is watched and where it goes besides the run folder."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online when an API key is present, else offline. Project and entity are W&B's own environment variables."""


class CheckpointConfig(Config):
    """When state is written."""

    every: Positive | None = None
    """Updates (PPO) or optimiser steps between checkpoints; none: only at the end."""
    keep: Positive = 2
    """How many of the newest checkpoints stay on disk."""


class StageConfig(Config):
    """What every stage has."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The run's name; its folder is `<output_dir>/<name>`."""
    output_dir: str = "runs"
    seed: Annotated[int, Field(ge=0)] = 0
    device: Literal["cpu", "gpu"] = "cpu"
    """Where models live. The one place that decides it; bf16 on gpu, fp32 on cpu."""
    trust_remote_code: bool = False
    """Run Python code that a model folder brings along. Leave off unless you have read that code."""
    telemetry: TelemetryConfig = TelemetryConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def check_zero(self, zero: ZeroConfig) -> None:
        """Raises ValueError for what this device cannot do."""
        if zero.bf16_optimizer and self.device == "cpu":
            raise ValueError("bf16_optimizer needs bf16 weights, but device is cpu, where weights are fp32")

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.device == "gpu" else "float32"


def whole_or_a_fraction_of_one(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError("a worker takes a fraction of one GPU or a whole number of them")
    return gpus


GPUs = Annotated[float, Field(ge=0), AfterValidator(whole_or_a_fraction_of_one)]
"""GPUs of one worker; a fraction shares one GPU with others."""
