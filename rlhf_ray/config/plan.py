"""What a configuration will ask for, said before anything starts: actors, bundles, batch arithmetic, bytes.

Arithmetic on the configuration and on model shapes only; it must never import torch or Ray, open a connection, or
need the cluster. It counts weights, gradients, optimiser state and KV cache. Activations, NCCL's buffers and the CUDA
context come on top, so a GPU that this plan fills to the brim is too small.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import ceil

from rlhf_ray.config.advice import advice
from rlhf_ray.config.common import LoraConfig, StageConfig, ZeroConfig
from rlhf_ray.config.feedback import EnginesConfig
from rlhf_ray.config.ilql import ILQLConfig
from rlhf_ray.config.layout import groups, needs, workers
from rlhf_ray.config.load import dump
from rlhf_ray.config.model_size import ModelSize, adapter_parameters, model_size, q_head_parameters
from rlhf_ray.config.ppo import ROLES, PPOConfig
from rlhf_ray.config.supervised import DPOConfig, RewardConfig, SupervisedConfig

GPUS_PER_NODE = 8
"""GPUs of the machines that the plan lays bundles on; the cluster's real nodes may differ."""

GIB = 2**30

Held = tuple[tuple[str, ...], int, float, float]
"""(roles, how many bundles hold just them, CPUs of each, GPUs of each)"""


@dataclass(frozen=True)
class Actors:
    """Actors of one role."""

    role: str
    count: int
    cpus: float
    """Of each."""
    gpus: float
    """Of each."""


@dataclass(frozen=True)
class Bundles:
    """Equal placement-group bundles; each lies on one node, whatever it holds."""

    roles: tuple[str, ...]
    count: int
    cpus: float
    """Of each."""
    gpus: float
    """Of each."""
    bytes_per_device: int | None
    """On each GPU, or in host memory where there are no GPUs. None: a model's size is unknown."""
    nodes: tuple[int, ...]
    """Numbers, from 1, of the nodes with `GPUS_PER_NODE` GPUs that hold them; empty if none can, or without GPUs."""


@dataclass(frozen=True)
class Memory:
    """Bytes that one worker keeps for one model. A field is None where it does not apply or cannot be known."""

    role: str
    part: str
    """Which of the role's models: the learner has policy and critic, the reward may have several."""
    model: str
    size: ModelSize
    weights: int | None
    gradients: int | None = None
    optimizer: int | None = None
    """Adam's two moments and, where DeepSpeed keeps one, the fp32 master copy of the weights."""
    optimizer_on_host: bool = False
    kv_cache: int | None = None
    kv_cache_tokens: int | None = None

    @property
    def is_trained(self) -> bool:
        return self.role in ("learner", "worker")

    @property
    def on_device(self) -> int | None:
        """Bytes on the worker's GPUs (in its process, without GPUs); None: the model's size is unknown."""
        if self.weights is None or (self.is_trained and self.gradients is None):
            return None
        optimizer = 0 if self.optimizer_on_host else self.optimizer or 0
        return self.weights + (self.gradients or 0) + optimizer + (self.kv_cache or 0)


@dataclass(frozen=True)
class Batch:
    """What one update (PPO) or one optimiser step (SFT, reward) works on."""

    sequences: int
    tokens_at_most: int
    micro_batches_at_most: int
    """Of one rank, in all epochs and minibatches of the update."""
    optimizer_steps: int
    """Of the update."""
    updates: int | None
    """None: as many as the data gives."""


@dataclass(frozen=True)
class Plan:
    """Everything a dry run prints."""

    config: StageConfig
    actors: tuple[Actors, ...]
    bundles: tuple[Bundles, ...]
    batch: Batch | None
    """None: nothing is trained."""
    memory: tuple[Memory, ...]

    @property
    def gpus(self) -> float:
        return sum(bundles.count * bundles.gpus for bundles in self.bundles)

    @property
    def cpus(self) -> float:
        return sum(bundles.count * bundles.cpus for bundles in self.bundles)


def plan(config: StageConfig) -> Plan:
    """The plan of any stage. Raises ModelError when a local model folder is damaged."""
    if isinstance(config, PPOConfig):
        return _plan_ppo(config)
    if isinstance(config, SupervisedConfig):
        return _plan_supervised(config)
    return _plan_served(config, getattr(config, "engines", {}))


def _plan_ppo(config: PPOConfig) -> Plan:
    resources = {role: needs(config, role) for role in ROLES}
    actors = tuple(
        Actors(role, workers(config, role), resources[role]["CPU"], resources[role].get("GPU", 0.0))
        for role in ROLES
        if workers(config, role)
    )
    reference = [] if config.shares_reference else [_frozen(config, "reference", config.policy, "reference")]
    rollout = _served(config, "rollout", "policy", config.policy, config.rollout.kv_cache_gib)
    memory = (rollout, *reference, *_reward(config), *_learner(config))
    return Plan(config, actors, _bundles(_ppo_bundles(config), actors, memory), _ppo_batch(config), memory)


def _plan_supervised(config: SupervisedConfig) -> Plan:
    ranks, cpus, gpus = config.workers.ranks, config.workers.cpus, config.workers.gpus
    size = model_size(config.model)
    memory = [_trained("worker", "model", config.model, size, config.training.zero, ranks, config)]
    if isinstance(config, ILQLConfig):
        memory.append(_q_heads(config))
    actors = (Actors("worker", ranks, cpus, gpus),)
    bundles = _bundles([(("worker",), ranks, cpus, gpus)], actors, memory)
    return Plan(config, actors, bundles, _supervised_batch(config), tuple(memory))


def _plan_served(config: StageConfig, engines: Mapping[str, EnginesConfig]) -> Plan:
    """Of stages that train nothing: critique, judge, evaluate (whose engines come one after the other), world."""
    actors = tuple(Actors(name, each.engines, each.cpus, each.gpus) for name, each in engines.items())
    memory = [_served(config, name, name, each.model, each.kv_cache_gib) for name, each in engines.items()]
    memory += [_values(config, name, each) for name, each in engines.items() if each.decode_beta is not None]
    held: list[Held] = [((actor.role,), actor.count, actor.cpus, actor.gpus) for actor in actors]
    return Plan(config, actors, _bundles(held, actors, memory), None, tuple(memory))


# Batch arithmetic


def _ppo_batch(config: PPOConfig) -> Batch:
    samples = config.rollout.prompts_per_update * config.rollout.samples_per_prompt
    longest = config.data.max_tokens + config.rollout.max_new_tokens
    steps = config.ppo.epochs * config.ppo.minibatches
    sequences_of_a_rank = ceil(ceil(samples / config.ppo.minibatches) / config.roles.learner.ranks)
    return Batch(
        sequences=samples,
        tokens_at_most=samples * longest,
        micro_batches_at_most=steps
        * _micro_batches(sequences_of_a_rank, longest, config.learner.tokens_per_micro_batch),
        optimizer_steps=steps,
        updates=config.ppo.updates,
    )


def _supervised_batch(config: SupervisedConfig) -> Batch:
    training, longest = config.training, config.data.max_tokens
    paired = isinstance(config, RewardConfig) or (isinstance(config, DPOConfig) and config.loss != "kto")
    sequences = training.sequences_per_step * (2 if paired else 1)
    of_a_rank = ceil(sequences / config.workers.ranks)
    micro_batches = _micro_batches(of_a_rank, longest, training.tokens_per_micro_batch)
    return Batch(sequences, sequences * longest, micro_batches, optimizer_steps=1, updates=None)


def _micro_batches(sequences: int, longest: int, budget: int) -> int:
    """All sequences of the greatest length is the worst case: shorter ones never fill more micro-batches."""
    return ceil(sequences / (budget // longest))


# Bytes


def _served(config: StageConfig, role: str, part: str, model: str, kv_cache_gib: float) -> Memory:
    """One engine's."""
    size = model_size(model)
    kv_cache = round(kv_cache_gib * GIB)
    values = size.kv_values_per_token
    tokens = kv_cache // (values * _width(config)) if values else None
    weights = _times(size.parameters, _width(config))
    return Memory(role, part, model, size, weights, kv_cache=kv_cache, kv_cache_tokens=tokens)


def _values(config: StageConfig, role: str, section: EnginesConfig) -> Memory:
    """V and both Q of a steered engine: whole on each of its GPUs."""
    parameters, _ = q_head_parameters(section.model) or (None, None)
    size = ModelSize(parameters, "config.json" if parameters else "unknown")
    return Memory(role, "values", section.model, size, _times(parameters, _width(config) * max(1, int(section.gpus))))


def _reward(config: PPOConfig) -> list[Memory]:
    """Every model of every source; members whose weights are averaged are one."""
    found = []
    for place, source in config.reward.sources.items():
        name = place.rpartition(".")[2]
        parts = [f"{name} {number + 1}" for number in range(len(source.members))] if source.disagrees else [name]
        found += [_frozen(config, "reward", model, part) for model, part in zip(source.members, parts, strict=False)]
    return found


def _frozen(config: PPOConfig, role: str, model: str, part: str) -> Memory:
    size = model_size(model)
    return Memory(role, part, model, size, _times(size.parameters, _width(config)))


def _learner(config: PPOConfig) -> list[Memory]:
    zero, ranks = config.learner.zero, config.roles.learner.ranks
    body = config.critic_body
    size = model_size(body)
    critic = ModelSize(size.parameters - size.head, size.source) if size.parameters else size
    lora = config.learner.lora
    policy = _trained("learner", "policy", config.policy, model_size(config.policy), zero, ranks, config, lora)
    if not config.ppo.algorithm.needs_critic:
        return [policy]
    return [policy, _trained("learner", "critic", body, critic, zero, ranks, config, lora)]


def _q_heads(config: ILQLConfig) -> Memory:
    """V, Q1 and Q2, and the targets of both Q: fp32 and whole on every rank."""
    parameters, followed = q_head_parameters(config.model) or (None, None)
    size = ModelSize(parameters, "config.json" if parameters else "unknown")
    heads = _trained("worker", "heads", config.model, size, config.training.zero, config.workers.ranks, config)
    return replace(heads, weights=heads.weights + 4 * followed) if heads.weights and followed else heads


def _trained(
    role: str,
    part: str,
    model: str,
    size: ModelSize,
    zero: ZeroConfig,
    ranks: int,
    config: StageConfig,
    lora: LoraConfig | None = None,
) -> Memory:
    """One rank's share under ZeRO (Rajbhandari et al. 2020, section 5): each stage divides one more thing by ranks.

    With adapters only those have gradients and optimiser state."""
    trained = adapter_parameters(model, lora.rank, lora.targets) if lora else size.parameters
    # DeepSpeed keeps an fp32 master copy beside Adam's two moments, except for fp32 weights that it does not shard.
    has_master = _width(config) == 2 or zero.stage >= 1
    return Memory(
        role,
        part,
        model,
        size,
        weights=_times(size.parameters, _width(config), ranks if zero.stage >= 3 else 1),
        gradients=_times(trained, _width(config), ranks if zero.stage >= 2 else 1),
        optimizer=_times(trained, _optimizer_width(zero, has_master), ranks if zero.stage >= 1 else 1),
        optimizer_on_host=zero.offload != "none" and config.device == "gpu",
    )


def _optimizer_width(zero: ZeroConfig, has_master: bool) -> int:
    """Bytes a parameter: Adam's two moments and the master copy."""
    width = 2 if zero.bf16_optimizer else 4
    return 3 * width if has_master else 2 * width


def _width(config: StageConfig) -> int:
    """Bytes of one number of `config.dtype`."""
    return 2 if config.dtype == "bfloat16" else 4


def _times(parameters: int | None, width: int, ranks: int = 1) -> int | None:
    return None if parameters is None else ceil(parameters * width / ranks)


# Bundles


def _ppo_bundles(config: PPOConfig) -> list[Held]:
    found: list[Held] = []
    for group in groups(config):
        roles = [
            tuple(role for role in group.roles if workers(config, role) > number)
            for number in range(len(group.bundles))
        ]
        for (held, first), equal in groupby(zip(roles, group.bundles, strict=True)):
            found.append((held, len(list(equal)), first["CPU"], first.get("GPU", 0.0)))
    return found


def _bundles(held: Sequence[Held], actors: Sequence[Actors], memory: Sequence[Memory]) -> tuple[Bundles, ...]:
    nodes = _nodes([(count, gpus) for _, count, _, gpus in held])
    gpus_of = {actor.role: actor.gpus for actor in actors}
    return tuple(
        Bundles(
            roles,
            count,
            cpus,
            round(gpus, 6),
            _bytes_per_device({role: gpus_of[role] for role in roles}, memory),
            there,
        )
        for (roles, count, cpus, gpus), there in zip(held, nodes, strict=True)
    )


def _bytes_per_device(gpus_of: Mapping[str, float], memory: Sequence[Memory]) -> int | None:
    """A worker on several GPUs spreads evenly over them, a frozen model as evenly as whole layers allow; workers with
    fractions of a GPU add up on it."""
    parts = [part for part in memory if part.role in gpus_of]
    if any(part.on_device is None for part in parts):
        return None
    return ceil(sum((part.on_device or 0) / max(1, gpus_of[part.role]) for part in parts))


def _nodes(asked: Sequence[tuple[int, float]]) -> list[tuple[int, ...]]:
    """First fit, largest bundles first, on nodes of GPUS_PER_NODE. `asked` is (bundles, GPUs of each)."""
    free: list[float] = []
    found: list[tuple[int, ...]] = [()] * len(asked)
    for number in sorted(range(len(asked)), key=lambda number: -asked[number][1]):
        count, gpus = asked[number]
        if not 0 < gpus <= GPUS_PER_NODE:
            continue
        homes = []
        for _ in range(count):
            home = next((node for node, left in enumerate(free) if left >= gpus - 1e-6), len(free))
            if home == len(free):
                free.append(GPUS_PER_NODE)
            free[home] -= gpus
            homes.append(home + 1)
        found[number] = tuple(sorted(set(homes)))
    return found


# Text


def render(plan: Plan) -> str:
    """The plan as text: the resolved configuration, then a table a subject."""
    return "\n".join(
        [
            "Configuration",
            *(f"  {line}" for line in dump(plan.config).splitlines()),
            "",
            "Actors",
            *table(["role", "actors", "CPUs each", "GPUs each"], _actor_rows(plan)),
            "",
            "Placement: each bundle lies on one node",
            *table(["bundles", "holding", "CPUs", "GPUs", f"{_device(plan)} holds", "nodes"], _bundle_rows(plan)),
            f"  {_nodes_line(plan)}",
            "",
            *(["Batch", *table(None, _batch_rows(plan.batch)), ""] if plan.batch else []),
            "Bytes of each worker (activations come on top)",
            *table(["worker", "parameters", "weights", "gradients", "optimizer", "KV cache"], _memory_rows(plan)),
            *_notes(plan),
            *(f"warning: {sentence}" for sentence in advice(plan.config)),
        ]
    )


def _actor_rows(plan: Plan) -> list[list[str]]:
    rows = [[actor.role, f"{actor.count}", f"{actor.cpus:g}", f"{actor.gpus:g}"] for actor in plan.actors]
    total = ["in all", f"{sum(actor.count for actor in plan.actors)}", f"{plan.cpus:g}", f"{plan.gpus:g}"]
    return [*rows, total]


def _bundle_rows(plan: Plan) -> list[list[str]]:
    return [
        [
            f"{bundles.count}",
            " + ".join(bundles.roles),
            f"{bundles.cpus:g}",
            f"{bundles.gpus:g}",
            _bytes(bundles.bytes_per_device),
            _ranges(bundles.nodes) if bundles.gpus else "any",
        ]
        for bundles in plan.bundles
    ]


def _device(plan: Plan) -> str:
    return "each GPU" if plan.gpus else "memory"


def _nodes_line(plan: Plan) -> str:
    if not plan.actors:
        return "Nothing: the model is served elsewhere."
    if not plan.gpus:
        return f"One node with {plan.cpus:g} CPUs holds everything."
    largest = max(bundles.gpus for bundles in plan.bundles)
    if largest > GPUS_PER_NODE:
        return f"A node with {largest:g} GPUs is needed."
    nodes = max(max(bundles.nodes, default=0) for bundles in plan.bundles)
    return f"{nodes} node{'s' * (nodes > 1)} of {GPUS_PER_NODE} GPUs {'hold' if nodes > 1 else 'holds'} everything."


def _batch_rows(batch: Batch) -> list[list[str]]:
    if batch.updates is None:
        return [
            ["sequences per optimiser step", f"{batch.sequences:,}"],
            ["tokens per optimiser step, at most", f"{batch.tokens_at_most:,}"],
            ["micro-batches per rank and optimiser step, at most", f"{batch.micro_batches_at_most:,}"],
        ]
    return [
        ["samples per update", f"{batch.sequences:,}"],
        ["tokens per update, at most", f"{batch.tokens_at_most:,}"],
        ["optimiser steps per update", f"{batch.optimizer_steps:,}"],
        ["micro-batches per rank and update, at most", f"{batch.micro_batches_at_most:,}"],
        ["updates", f"{batch.updates:,}"],
        ["samples in all", f"{batch.updates * batch.sequences:,}"],
        ["optimiser steps in all", f"{batch.updates * batch.optimizer_steps:,}"],
    ]


def _memory_rows(plan: Plan) -> list[list[str]]:
    roles = [part.role for part in plan.memory]
    several = {role for role in roles if roles.count(role) > 1} | {"learner"}
    rows = []
    for part in plan.memory:
        about = "~" if part.size.source == "name" else ""
        trained = part.is_trained
        tokens = f"{part.kv_cache_tokens:,}" if part.kv_cache_tokens is not None else "unknown"
        rows.append(
            [
                f"{part.role}: {part.part}" if part.role in several else part.role,
                f"{about}{_count(part.size.parameters)}",
                about + _bytes(part.weights),
                about + _bytes(part.gradients) if trained else "-",
                about + _bytes(part.optimizer) + " on host" * part.optimizer_on_host if trained else "-",
                f"{_bytes(part.kv_cache)} ({tokens} tokens)" if part.kv_cache is not None else "-",
            ]
        )
    return rows


def _notes(plan: Plan) -> list[str]:
    sizes = {part.model: part.size.source for part in plan.memory}
    wording = {"name": "estimated (~) from its name", "unknown": "unknown: no local folder, and no size in its name"}
    return [f"  Size of {model} {wording[source]}." for model, source in sizes.items() if source in wording]


def table(header: list[str] | None, rows: list[list[str]]) -> list[str]:
    """Aligned columns, two spaces apart; never wrapped, so that a log or grep gets whole lines."""
    lines = [header, *rows] if header else rows
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    ]


def _bytes(count: int | None) -> str:
    """Binary units: 1 GiB is 2^30 bytes."""
    if count is None:
        return "unknown"
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _count(parameters: int | None) -> str:
    if parameters is None:
        return "unknown"
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if parameters >= size:
            return f"{parameters / size:.3g} {unit}"
    return str(parameters)


def _ranges(numbers: Sequence[int]) -> str:
    """`1-3, 7` for (1, 2, 3, 7)."""
    runs = [list(run) for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else f"{run[0][1]}" for run in runs) or "none fits"
