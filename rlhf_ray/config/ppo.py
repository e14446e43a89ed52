"""Configuration of `rlhf-ray ppo`."""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from rlhf_ray.config.base import Config, named
from rlhf_ray.config.common import (
    DataConfig,
    GPUs,
    LoraConfig,
    OptimizerConfig,
    Positive,
    Share,
    StageConfig,
    ZeroConfig,
)
from rlhf_ray.config.rewards import RewardSection


class RolloutConfig(Config):
    """What is generated for an update."""

    prompts_per_update: Positive = 64
    samples_per_prompt: Positive = 1
    max_new_tokens: Positive = 128
    temperature: Annotated[float, Field(gt=0)] = 1.0
    kv_cache_gib: Annotated[float, Field(gt=0)] = 0.0625
    """Memory for each engine's KV cache."""


class FixedController(Config):
    """beta stays what it is."""

    name: Literal["fixed"] = "fixed"


class AdaptiveController(Config):
    """Ziegler et al. 2019, section 2.2: beta follows the relative error of the KL, a little with each sample."""

    name: Literal["adaptive"] = "adaptive"
    target: Annotated[float, Field(gt=0)] = 6.0
    """KL of an answer, in nats, that beta is steered to."""
    horizon: Positive = 10_000
    """Samples over which a relative error of one is closed."""


class BudgetController(Config):
    """beta is the multiplier of the constraint KL <= budget: it rises above the budget and falls to zero below."""

    name: Literal["budget"] = "budget"
    budget: Annotated[float, Field(gt=0)] = 6.0
    """Largest KL of an answer, in nats."""
    rate: Annotated[float, Field(gt=0)] = 0.01
    """Change of beta in an update, for each nat beyond the budget."""


Controller = Annotated[
    FixedController | AdaptiveController | BudgetController, Field(discriminator="name"), named("fixed")
]


class Sampled(Config):
    """What looks at the sampled token alone."""

    top_k: ClassVar[None] = None


class K1(Sampled):
    """x, the log-ratio to the reference: unbiased, and as a loss its gradient has expectation zero."""

    name: Literal["k1"] = "k1"
    placement: ClassVar[Literal["reward"]] = "reward"


class K2(Sampled):
    """x^2 / 2: low variance, and not the KL."""

    name: Literal["k2"] = "k2"
    placement: Literal["reward", "loss"] = "reward"
    """reward: a constant in each token's reward. loss: added to the loss and differentiated."""


class K3(Sampled):
    """exp(-x) - 1 + x: unbiased and never negative; explodes where the reference likes a token much better."""

    name: Literal["k3"] = "k3"
    placement: Literal["reward", "loss"] = "reward"
    """As of k2."""


class FullKL(Config):
    """The sum over the whole vocabulary, exactly."""

    name: Literal["full"] = "full"
    placement: Literal["reward", "loss", "both"] = "reward"
    """As of k2; both is the whole gradient of the KL of answers, of which each alone is a part."""
    top_k: Positive | None = None
    """Only the sampler's likeliest tokens and one bucket for all others: a lower bound that travels cheaply."""


Estimator = Annotated[K1 | K2 | K3 | FullKL, Field(discriminator="name"), named("k1")]


class KLConfig(Config):
    """The penalty that keeps the policy near the reference; docs/kl.md has the table of which form does what."""

    coefficient: Annotated[float, Field(ge=0)] = 0.05
    """beta, the price of a nat; the initial value where a controller steers it."""
    controller: Controller = FixedController()
    """Its name, or a section with its settings."""
    estimator: Estimator = K1()
    """Its name, or a section with its settings."""

    @model_validator(mode="after")
    def the_controller_moves_beta(self) -> "KLConfig":
        if isinstance(self.controller, AdaptiveController) and self.coefficient == 0:
            raise ValueError("controller adaptive multiplies the coefficient, which is 0 and would stay so")
        return self


def _pair(value: object) -> object:
    return (value, value) if isinstance(value, int | float) else value


Clip = Annotated[
    tuple[Annotated[float, Field(gt=0, lt=1)], Annotated[float, Field(gt=0)]],
    BeforeValidator(_pair, json_schema_input_type=float),
]
"""How far a ratio may fall below and rise above one; a single number is both."""


class Algorithm(Config):
    """What every algorithm has. Their losses are sums over tokens in the same minibatch; they differ in advantages,
    in what a ratio is of, and in how tokens are weighed."""

    needs_critic: ClassVar[bool] = False
    needs_groups: ClassVar[bool] = False
    """Advantages compare several answers to one prompt."""
    needs_signal: ClassVar[bool] = False
    """A prompt whose answers are all paid alike is replaced."""
    ratio: ClassVar[Literal["token", "sequence"]] = "token"

    clip_ratio: Clip = (0.2, 0.2)
    """How far a ratio may fall below and rise above one; a single number is both."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound on the loss of a token with negative advantage, in multiples of it (Ye et al. 2020)."""
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """What a token weighs: one of all tokens; one of its answer's, answers alike; one of `max_new_tokens`."""


class PPO(Algorithm):
    """Proximal policy optimisation with a critic (Schulman et al. 2017)."""

    needs_critic: ClassVar[bool] = True

    name: Literal["ppo"] = "ppo"
    gamma: Share = 1.0
    gae_lambda: Share = 0.95
    critic_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """none: the policy's. All other optimiser settings are shared."""
    clip_value: Annotated[float, Field(gt=0)] = 0.2
    whiten_rewards: bool = False
    """Scale per-token rewards to unit variance, mean kept."""


class GRPO(Algorithm):
    """Scores of a prompt's answers, centred and scaled by their deviation (Shao et al. 2024)."""

    needs_groups: ClassVar[bool] = True

    name: Literal["grpo"] = "grpo"
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "sequence_mean"


class DrGRPO(Algorithm):
    """Centred only, every token weighed alike whatever the answer's length (Liu et al. 2025)."""

    needs_groups: ClassVar[bool] = True

    name: Literal["dr_grpo"] = "dr_grpo"
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "constant"


class RLOO(Algorithm):
    """Each answer against the mean of its prompt's others (Ahmadian et al. 2024)."""

    needs_groups: ClassVar[bool] = True

    name: Literal["rloo"] = "rloo"


class ReinforcePP(Algorithm):
    """REINFORCE++ (Hu 2025): rewards to go, whitened over the whole batch."""

    name: Literal["reinforce_pp"] = "reinforce_pp"
    gamma: Share = 1.0
    baseline: bool = False
    """Subtract the mean of a prompt's answers first."""


class DAPO(Algorithm):
    """GRPO with an asymmetric clip, groups without signal replaced, and a soft limit on length (Yu et al. 2025)."""

    needs_groups: ClassVar[bool] = True
    needs_signal: ClassVar[bool] = True

    name: Literal["dapo"] = "dapo"
    clip_ratio: Clip = (0.2, 0.28)
    max_refills: Annotated[int, Field(ge=0)] = 4
    """How many times in a row a prompt whose answers all score alike is replaced, before its place stays empty."""
    overlong_buffer: Annotated[int, Field(ge=0)] = 0
    """Over so many last tokens before `max_new_tokens` a penalty grows from zero to one."""


class GSPO(Algorithm):
    """GRPO with one ratio an answer: the geometric mean of its tokens' (Zheng et al. 2025)."""

    needs_groups: ClassVar[bool] = True
    ratio: ClassVar[Literal["token", "sequence"]] = "sequence"

    name: Literal["gspo"] = "gspo"
    clip_ratio: Clip = (3e-4, 4e-4)
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "sequence_mean"


AnyAlgorithm = Annotated[
    PPO | GRPO | DrGRPO | RLOO | ReinforcePP | DAPO | GSPO, Field(discriminator="name"), named("ppo")
]


class Correction(Config):
    """What every correction has: bounds on the mean |difference| of engine's and learner's log-probabilities."""

    warn_gap: Annotated[float, Field(gt=0)] | None = None
    """Nats a token from which an update warns; none: 1e-3 in fp32, 0.05 in bf16."""
    stop_gap: Annotated[float, Field(gt=0)] | None = None
    """Nats a token from which the run stops; none: 1e-2 in fp32, 0.2 in bf16."""


class Truncate(Correction):
    """Weights p(learner) / p(engine), cut at a cap (truncated importance sampling)."""

    name: Literal["truncate"] = "truncate"
    level: Literal["token", "sequence", "geometric"] = "token"
    """Of a token, of the whole answer (product), or of the answer's mean token (geometric mean)."""
    cap: Annotated[float, Field(gt=1)] = 2.0


class Mask(Correction):
    """Tokens whose weight lies outside the bounds do not train (IcePop, masked importance sampling)."""

    name: Literal["mask"] = "mask"
    level: Literal["token", "sequence", "geometric"] = "token"
    low: Annotated[float, Field(ge=0, lt=1)] = 0.5
    high: Annotated[float, Field(gt=1)] = 2.0


class Coupled(Correction):
    """The clipped ratio itself is taken to the engine's log-probabilities; the learner computes none of its own."""

    name: Literal["coupled"] = "coupled"


class Uncorrected(Correction):
    """Tokens train as if the learner had sampled them."""

    name: Literal["none"] = "none"


AnyCorrection = Annotated[Truncate | Mask | Coupled | Uncorrected, Field(discriminator="name"), named("truncate")]


class PPOSection(Config):
    """Policy optimisation: sampled answers, clipped ratios, a KL penalty."""

    updates: Positive = 100
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Updates by which a token may be older than the policy that it trains. 0: generation and training take turns; from
    1 on they overlap."""
    epochs: Positive = 4
    minibatches: Positive = 1
    """Optimiser steps in each epoch."""
    algorithm: AnyAlgorithm = PPO()
    """Its name, or a section with its settings; docs/algorithms.md compares them."""
    entropy_bonus: Annotated[float, Field(ge=0)] = 0.0
    missing_eos_penalty: Annotated[float, Field(ge=0)] | None = 1.0
    """Answers cut off at `max_new_tokens` score minus this instead of what the reward says; none: they keep it."""
    kl: KLConfig = KLConfig()
    correction: AnyCorrection = Truncate()
    """Of the difference between engine and learner: its name, or a section with its settings."""
    on_breach: Literal["stop", "warn"] = "stop"
    """What follows when an update breaks an invariant: first ratio 1, KL 0 at update 0, everything finite."""


class LearnerConfig(Config):
    """How the learner computes. The critic's body is the first reward model's, the policy's where there is none."""

    tokens_per_micro_batch: Positive = 4096
    """Tokens of one forward and backward pass on one rank. Changes memory and speed, never the gradient."""
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig | None = None
    """Train adapters of policy and critic, their other weights frozen; none: train every weight."""
    zero: ZeroConfig = ZeroConfig()


class PublicationConfig(Config):
    """How weights travel from the learner to the engines."""

    backend: Literal["auto", "shm", "gloo", "ipc", "nccl"] = "auto"
    """auto: shm on CPU within a node, gloo across; ipc on a GPU that engine and learner share, nccl otherwise."""
    in_flight: Literal["keep", "wait", "abort"] = "keep"
    """What becomes of answers under way: they go on with the new weights, are waited for, or are begun anew."""


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
    """GPUs of each replica; over several its layers are spread, computed one after the other."""

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
    reward: RewardSection
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    ppo: PPOSection = PPOSection()
    learner: LearnerConfig = LearnerConfig()
    publication: PublicationConfig = PublicationConfig()
    roles: RolesConfig = RolesConfig()

    @property
    def critic_body(self) -> str:
        """The model whose body the critic begins with."""
        return next(iter(self.reward.members), self.policy)

    @property
    def shares_reference(self) -> bool:
        """The learner is the reference too."""
        return self.learner.lora is not None and self.learner.lora.share_reference

    @model_validator(mode="after")
    def minibatches_are_not_empty(self) -> "PPOConfig":
        samples = self.rollout.prompts_per_update * self.rollout.samples_per_prompt
        if self.ppo.minibatches > samples:
            raise ValueError(f"ppo.minibatches is {self.ppo.minibatches}, but an update has only {samples} samples")
        return self

    @model_validator(mode="after")
    def the_controller_cannot_turn_beta_negative(self) -> "PPOConfig":
        samples = self.rollout.prompts_per_update * self.rollout.samples_per_prompt
        controller = self.ppo.kl.controller
        if isinstance(controller, AdaptiveController) and 0.2 * samples >= controller.horizon:
            raise ValueError(
                f"ppo.kl.controller.horizon is {controller.horizon} samples, too short for updates of {samples}: beta "
                f"could turn negative; set it above {0.2 * samples:g}, usually to many times the samples of an update"
            )
        return self

    @model_validator(mode="after")
    def groups_have_several_answers(self) -> "PPOConfig":
        algorithm, samples = self.ppo.algorithm, self.rollout.samples_per_prompt
        grouped = algorithm.needs_groups or (isinstance(algorithm, ReinforcePP) and algorithm.baseline)
        if grouped and samples < 2:
            raise ValueError(
                f"ppo.algorithm {algorithm.name} compares answers to the same prompt, but rollout.samples_per_prompt "
                f"is {samples}; set it to 2 or more"
            )
        buffer, longest = getattr(algorithm, "overlong_buffer", 0), self.rollout.max_new_tokens
        if buffer > longest:
            raise ValueError(f"ppo.algorithm.overlong_buffer is {buffer}, more than rollout.max_new_tokens {longest}")
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
        self.check_zero(self.learner.zero)
        for role in ROLES:
            gpus = getattr(self.roles, role).gpus
            if self.device == "cpu" and gpus > 0:
                raise ValueError(f"roles.{role}.gpus is {gpus:g}, but device is cpu; set device: gpu")
        if self.device == "gpu":
            for role in ROLES:
                has_model = role != "reward" or bool(self.reward.members)
                has_model = has_model and not (role == "reference" and self.shares_reference)
                if has_model and getattr(self.roles, role).gpus == 0:
                    raise ValueError(f"device is gpu, but roles.{role}.gpus is 0")
        cpu_backends, gpu_backends = ("shm", "gloo"), ("ipc", "nccl")
        wrong = gpu_backends if self.device == "cpu" else cpu_backends
        if self.publication.backend in wrong:
            raise ValueError(f"publication.backend {self.publication.backend} does not work with device {self.device}")
        return self
