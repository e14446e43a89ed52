"""Bytes and seconds that a PPO run takes as it is placed, on GPUs that one may not have yet.

Bytes are those of the dry run (`plan.py`), seconds those of `roofline.py` at stated shares of the peaks. Nothing is
measured. Not in it: activations, communication between ranks (but for what the share of FLOP/s has of it), an optimiser
on the host, and the time of scores that no model gives.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from rlhf_ray.config.layout import groups, workers
from rlhf_ray.config.model_size import ModelShape, model_shape
from rlhf_ray.config.plan import GIB, Bundles, plan
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.config.roofline import (
    ADAPTERS,
    FILL,
    GPUS,
    NETWORK,
    WHOLE,
    Device,
    Engines,
    Models,
    Shares,
    Work,
    generate_s,
    learn_s,
    optimizer_s,
    performance,
    publish_s,
    score_s,
    tail_s,
    work_of,
)
from rlhf_ray.errors import ConfigError, ModelError


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal GPUs, and what programs reach of their peaks."""

    gpu: str = "h100"
    nodes: int = 1
    gpus_per_node: int = 8
    shares: Shares = field(default_factory=Shares)

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def peak(self) -> Device:
        """Raises ConfigError for a GPU that is not in the table."""
        if self.gpu not in GPUS:
            raise ConfigError(f"there is no GPU '{self.gpu}' in the table; known are {', '.join(GPUS)}")
        return GPUS[self.gpu]

    @cached_property
    def device(self) -> Device:
        return self.peak.at(self.shares)

    @property
    def link(self) -> float:
        """Byte/s of the slowest link that weights cross."""
        return self.device.link if self.nodes == 1 else NETWORK * self.shares.link


@dataclass(frozen=True)
class Held:
    """What lies on each GPU of equal bundles, in bytes; activations come on top."""

    bundles: Bundles
    weights: float
    gradients: float
    optimizer: float
    kv_cache: float
    left: float
    """Of `FILL` of the GPU's memory; below zero it does not fit."""


def work_ahead(config: PPOConfig, prompt_tokens: float | None = None, answer_tokens: float | None = None) -> Work:
    """An update of `config`. A mean length that is not given is half of the longest.

    Raises ConfigError for one that the configuration does not allow."""
    prompts, rollout = config.rollout.prompts_per_update, config.rollout
    return Work(
        prompts=prompts,
        answers=prompts * rollout.samples_per_prompt,
        prompt_tokens=_mean(prompt_tokens, config.data.max_tokens, "--prompt-tokens", "data.max_tokens"),
        answer_tokens=_mean(answer_tokens, rollout.max_new_tokens, "--answer-tokens", "rollout.max_new_tokens"),
        longest=rollout.max_new_tokens,
        epochs=config.ppo.epochs,
    )


def models_of(config: PPOConfig) -> Models:
    """Shapes of all models of the run. Raises ModelError for one whose size is unknown."""
    policy = _shape(config.policy)
    members = [part.model for part in plan(config).memory if part.role == "reward"]
    critic = (replace(_shape(config.critic_body), head=0),) if config.ppo.algorithm.needs_critic else ()
    return Models(
        policy,
        reference=() if config.shares_reference else (policy,),
        reward=tuple(map(_shape, members)),
        critic=critic,
        width=2 if config.device == "gpu" else 4,
    )


def held(config: PPOConfig, cluster: Cluster) -> tuple[Held, ...]:
    asked = plan(config)
    gpus = {actor.role: max(1.0, actor.gpus) for actor in asked.actors}

    def on_gpu(bundles: Bundles, what: str) -> float:
        parts = [part for part in asked.memory if part.role in bundles.roles]
        return sum((getattr(part, what) or 0) / gpus[part.role] for part in parts)

    return tuple(
        Held(
            bundles,
            weights=on_gpu(bundles, "weights"),
            gradients=on_gpu(bundles, "gradients"),
            optimizer=0.0 if config.learner.zero.offload != "none" else on_gpu(bundles, "optimizer"),
            kv_cache=on_gpu(bundles, "kv_cache"),
            left=FILL * cluster.device.memory - (bundles.bytes_per_device or 0),
        )
        for bundles in asked.bundles
        if bundles.gpus
    )


def seconds_of(config: PPOConfig, models: Models, cluster: Cluster, work: Work) -> dict[str, float]:
    """By phase, and `update`: their sum, or with staleness that of the roles whose GPUs are busy longest.

    Roles that share GPUs take turns on them. A frozen model spread over several computes on one at a time."""
    device, roles, ppo = cluster.device, config.roles, config.ppo
    engines = Engines(roles.rollout.engines, max(1.0, roles.rollout.gpus), config.rollout.kv_cache_gib * GIB)
    generating = generate_s if ppo.max_staleness else tail_s
    ranks = roles.learner.ranks
    trained = 0 if config.learner.lora else sum(shape.parameters for shape in models.trained)
    steps = ppo.epochs * ppo.minibatches
    of_role = {
        "rollout": generating(models, work, engines, device),
        "reference": score_s(models.reference, work, device, max(1, workers(config, "reference"))),
        "reward": score_s(models.reward, work, device, max(1, workers(config, "reward"))),
        # Old log-probabilities and values are the learner's work.
        "learner": score_s(models.trained, work, device, ranks)
        + learn_s(models.trained, work, device, ranks, _passes(config))
        + steps * optimizer_s(trained, device, ranks if config.learner.zero.stage else 1),
    }
    together = [group.roles for group in groups(config)]
    scoring = [sum(of_role[role] for role in group if role in ("reference", "reward")) for group in together]
    seconds = {
        "generate": of_role["rollout"],
        "score": max(scoring),
        "learn": of_role["learner"],
        "publish": publish_s(models.weights, cluster.link, cluster.link),
    }
    turns = [sum(of_role[role] for role in group) for group in together]
    busy = max(turns) if ppo.max_staleness else sum(seconds[phase] for phase in ("generate", "score", "learn"))
    return {**seconds, "update": busy + seconds["publish"]}


def performance_of(config: PPOConfig, models: Models, metrics: Mapping[str, float], device: Device) -> dict[str, float]:
    """`perf/phi` and `perf/mfu` of an update of a run on GPUs with the peaks of `device`, from the update's metrics."""
    rollout, roles = config.rollout, config.roles
    return performance(
        models,
        work_of(metrics, rollout.samples_per_prompt, rollout.max_new_tokens, config.ppo.epochs),
        metrics,
        device,
        gpus=sum(bundle.get("GPU", 0.0) for group in groups(config) for bundle in group.bundles),
        learner_gpus=roles.learner.ranks,
        engine_gpus=max(1.0, roles.rollout.gpus),
        passes=_passes(config),
    )


def _passes(config: PPOConfig) -> int:
    return ADAPTERS if config.learner.lora else WHOLE


def _mean(given: float | None, longest: int, option: str, key: str) -> float:
    if given is not None and not 0 < given <= longest:
        raise ConfigError(f"{option} is {given:g}, but {key} is {longest}; give a mean above 0 and up to that")
    return longest / 2 if given is None else given


def _shape(model: str) -> ModelShape:
    found = model_shape(model)
    if found is None:
        raise ModelError(
            f"the size of model '{model}' is unknown: there is no such folder, nothing in the local cache, and no size "
            "in its name, as in llama-8b; give a folder with its config.json"
        )
    return found
