"""Configuration of `rlhf-ray ppo`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf_ray.config.base import Config
from rlhf_ray.config.common import (
    DataConfig,
    GPUs,
    OptimizerConfig,
    Positive,
    Share,
    StageConfig,
    ZeroConfig,
)


class RewardSource(Config):
    """Where scores come from: exactly one of the three."""

    model: str | None = None
    """A sequence-classification model with one output, scored at the last real token."""
    function: str | None = None
    """A Python function `package.module:name` of (prompts, responses), two lists of text, to a list of floats."""
    url: Annotated[str, Field(pattern=r"^https?://")] | None = None
    """An HTTP server: POST {"prompts": [...], "responses": [...]} is answered with {"scores": [...]}."""
    deadline_s: Annotated[float, Field(gt=0)] = 60.0
    """Longest time for one batch of scores, retries included, for `function` and `url`."""

    @model_validator(mode="after")
    def exactly_one(self) -> "RewardSource":
        given = [name for name in ("model", "function", "url") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of model, function and url; {', '.join(given) or 'none'} given")
        return self


class RolloutConfig(Config):
    """What is generated for an update."""

    prompts_per_update: Positive = 64
    samples_per_prompt: Positive = 1
    max_new_tokens: Positive = 128
    temperature: Annotated[float, Field(gt=0)] = 1.0
    kv_cache_gib: Annotated[float, Field(gt=0)] = 0.0625
    """Memory for each engine's KV cache."""


class KLConfig(Config):
    """The penalty that keeps the policy near the reference."""

    coefficient: Annotated[float, Field(ge=0)] = 0.05
    """beta in r_t = score_t - beta * kl_t; the initial value when adaptive."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    """adaptive: Ziegler et al. 2019, section 2.2."""
    target: Annotated[float, Field(gt=0)] = 6.0
    """KL per sequence in nats that the adaptive controller steers to."""
    horizon: Positive = 10_000
    """Samples over which the adaptive controller closes a relative error of one."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Per-token estimator. In the reward only k1 has the gradient of the reverse KL; the others are for study."""


class PPOAlgorithm(Config):
    """Proximal policy optimisation (Schulman et al. 2017) on tokens."""

    updates: Positive = 100
    epochs: Positive = 4
    minibatches: Positive = 1
    """Optimiser steps in each epoch."""
    clip_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_value: Annotated[float, Field(gt=0)] = 0.2
    gamma: Share = 1.0
    gae_lambda: Share = 0.95
    entropy_bonus: Annotated[float, Field(ge=0)] = 0.0
    missing_eos_penalty: Annotated[float, Field(ge=0)] = 1.0
    """Answers cut off at `max_new_tokens` score minus this instead of what the reward says."""
    whiten_rewards: bool = False
    """Scale per-token rewards to unit variance, mean kept."""
    kl: KLConfig = KLConfig()


class LearnerConfig(Config):
    """How the learner computes. The critic's body is the reward model's where there is one, else the policy's."""

    tokens_per_micro_batch: Positive = 4096
    """Tokens of one forward and backward pass on one rank. Changes memory and speed, never the gradient."""
    optimizer: OptimizerConfig = OptimizerConfig()
    critic_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """none: the policy's. All other optimiser settings are shared."""
    zero: ZeroConfig = ZeroConfig()


class PublicationConfig(Config):
    """How weights travel from the learner to the engines."""

    backend: Literal["auto", "shm", "gloo", "ipc", "nccl"] = "auto"
    """auto: shm on CPU within a node, gloo across; ipc on a GPU that engine and learner share, nccl otherwise."""
    canary_bound: Annotated[float, Field(gt=0)] | None = None
    """Largest log-probability difference between learner and engine; none: 1e-3 in fp32, 0.5 in bf16."""


class EnginesConfig(Config):
    """vLLM engines, each an actor."""

    engines: Positive = 1
    gpus: GPUs = 0
    """GPUs of each engine; over several it spreads by tensor parallelism."""

    @property
    def workers(self) -> int:
        return self.engines


class ReplicasConfig(Config):
    """Copies of a frozen model, each an actor."""

    replicas: Positive = 1
    gpus: GPUs = 0
    """GPUs of each replica; over several its layers are spread."""

    @property
    def workers(self) -> int:
        return self.replicas


class RanksConfig(Config):
    """DeepSpeed data-parallel ranks, each an actor."""

    ranks: Positive = 1
    gpus: Annotated[float, Field(ge=0, le=1)] = 0
    """GPUs of each rank."""

    @property
    def workers(self) -> int:
        return self.ranks


Role = Literal["rollout", "reference", "reward", "learner"]
ROLES: tuple[Role, ...] = ("rollout", "reference", "reward", "learner")


class RolesConfig(Config):
    """Where each role runs."""

    rollout: EnginesConfig = EnginesConfig()
    reference: ReplicasConfig = ReplicasConfig()
    reward: ReplicasConfig = ReplicasConfig()
    learner: RanksConfig = RanksConfig()
    cpus: Annotated[float, Field(ge=0)] = 1
    """CPU cores reserved for each actor; a fraction shares a core."""
    shared: list[list[Role]] = []
    """Lists of roles that share machines and GPUs, worker by worker. A role in no list has its own."""
    deadline_s: Annotated[float, Field(gt=0)] = 600.0
    """Longest wait for any answer from a role (starting, generating, updating) before the run stops."""

    @model_validator(mode="after")
    def a_role_is_shared_once(self) -> "RolesConfig":
        named = [role for group in self.shared for role in group]
        for role in named:
            if named.count(role) > 1:
                raise ValueError(f"shared names '{role}' more than once")
        return self


class PPOConfig(StageConfig):
    """`rlhf-ray ppo`."""

    policy: str
    """Folder or hub name of the model to train; also the frozen reference."""
    reward: RewardSource
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    ppo: PPOAlgorithm = PPOAlgorithm()
    learner: LearnerConfig = LearnerConfig()
    publication: PublicationConfig = PublicationConfig()
    roles: RolesConfig = RolesConfig()

    @model_validator(mode="after")
    def minibatches_are_not_empty(self) -> "PPOConfig":
        samples = self.rollout.prompts_per_update * self.rollout.samples_per_prompt
        if self.ppo.minibatches > samples:
            raise ValueError(f"ppo.minibatches is {self.ppo.minibatches}, but an update has only {samples} samples")
        return self

    @model_validator(mode="after")
    def the_controller_cannot_turn_beta_negative(self) -> "PPOConfig":
        samples = self.rollout.prompts_per_update * self.rollout.samples_per_prompt
        if self.ppo.kl.controller == "adaptive" and 0.2 * samples >= self.ppo.kl.horizon:
            raise ValueError(
                f"ppo.kl.horizon is {self.ppo.kl.horizon} samples, too short for updates of {samples}: beta could turn "
                f"negative; set it above {0.2 * samples:g}, usually to many times the samples of an update"
            )
        return self

    @model_validator(mode="after")
    def a_sample_fits_a_micro_batch(self) -> "PPOConfig":
        longest = self.data.max_tokens + self.rollout.max_new_tokens
        if self.learner.tokens_per_micro_batch < longest:
            raise ValueError(
                f"learner.tokens_per_micro_batch is {self.learner.tokens_per_micro_batch}, smaller than the longest "
                f"sample: data.max_tokens + rollout.max_new_tokens = {longest}"
            )
        return self

    @model_validator(mode="after")
    def devices_agree(self) -> "PPOConfig":
        for role in ROLES:
            gpus = getattr(self.roles, role).gpus
            if self.device == "cpu" and gpus > 0:
                raise ValueError(f"roles.{role}.gpus is {gpus:g}, but device is cpu; set device: gpu")
        if self.device == "gpu":
            for role in ROLES:
                has_model = role != "reward" or self.reward.model is not None
                if has_model and getattr(self.roles, role).gpus == 0:
                    raise ValueError(f"device is gpu, but roles.{role}.gpus is 0")
        cpu_backends, gpu_backends = ("shm", "gloo"), ("ipc", "nccl")
        wrong = gpu_backends if self.device == "cpu" else cpu_backends
        if self.publication.backend in wrong:
            raise ValueError(f"publication.backend {self.publication.backend} does not work with device {self.device}")
        return self
