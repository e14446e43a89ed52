"""Which placement of a PPO run's roles is best on a cluster, and what does not fit: `rlhf-ray plan`.

Compares the configuration's own placement with a few others of the same run. A placement that does not fit is never
called the best, and has no seconds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from rlhf_ray.config.layout import groups
from rlhf_ray.config.load import load, read
from rlhf_ray.config.plan import GIB, plan, table
from rlhf_ray.config.ppo import ROLES, PPOConfig
from rlhf_ray.config.prediction import Cluster, Held, held, models_of, seconds_of
from rlhf_ray.config.roofline import FILL, Models, Work, cache_bytes, kv_bytes
from rlhf_ray.errors import ConfigError

SPLITS = (0.25, 0.5, 0.75)
"""Shares of the nodes, or of one node's GPUs, that placements with roles apart give to generation."""
LEAST_CACHE = 0.5
"""Of an engine's weights: with less room for its KV cache an engine gets more GPUs."""
PHASES = ("generate", "score", "learn", "publish", "update")


@dataclass(frozen=True)
class Prediction:
    """One placement."""

    name: str
    config: PPOConfig
    held: tuple[Held, ...]
    seconds: dict[str, float]
    """By phase, as in the metrics `time/<phase>`, and `update`."""
    answer_tokens: float
    """Generated in an update."""

    @property
    def fits(self) -> bool:
        # A KV cache that fills what is left is rounded to bytes.
        return all(held.left > -GIB / 1000 for held in self.held)

    @property
    def tokens_per_s(self) -> float:
        return self.answer_tokens / self.seconds["update"]


def predict(config: PPOConfig, cluster: Cluster, work: Work) -> list[Prediction]:
    """The placement of `config`, where the cluster has room for it, then others of the same run.

    Raises ConfigError for an unknown GPU, ModelError for a model whose size is unknown."""
    return [_prediction(name, placed, cluster, work) for name, placed in _placements(config, cluster, work)]


def best(predictions: list[Prediction]) -> Prediction | None:
    """The fastest that fits; None: nothing fits."""
    return max((found for found in predictions if found.fits), key=lambda found: found.tokens_per_s, default=None)


def _placements(config: PPOConfig, cluster: Cluster, work: Work) -> Iterator[tuple[str, PPOConfig]]:
    if config.device == "gpu" and _has_room(config, cluster):
        yield "as configured", config
    models = models_of(_placed(config, {}, 1))
    yield "all shared", _all_shared(config, models, cluster, work)
    of, unit = (cluster.nodes, "node") if cluster.nodes > 1 else (cluster.gpus, "GPU")
    counts = {round(of * share) for share in SPLITS} - {0, of}
    for count in sorted(counts):
        apart = _apart(config, models, cluster, work, count * cluster.gpus // of)
        if apart:
            yield f"apart, rollout on {count} {unit}{'s' * (count > 1)}", apart


def _has_room(config: PPOConfig, cluster: Cluster) -> bool:
    asked = plan(config)
    return asked.gpus <= cluster.gpus and max(each.gpus for each in asked.bundles) <= cluster.gpus_per_node


def _all_shared(config: PPOConfig, models: Models, cluster: Cluster, work: Work) -> PPOConfig:
    """Every GPU holds an engine, a rank and a replica of each frozen model; the KV cache gets what they leave."""
    count, device = cluster.gpus, cluster.device
    frozen = [role for role in ("reference", "reward") if getattr(models, role)]
    share = 1 / (2 + len(frozen))
    roles = {
        "rollout": {"engines": count, "gpus": share},
        "learner": {"ranks": count, "gpus": share},
        **{role: {"replicas": count, "gpus": share} for role in frozen},
        "shared": [["rollout", *frozen, "learner"]],
    }
    without = max(each.bytes_per_device or 0 for each in plan(_placed(config, roles, 1)).bundles) - 1
    return _placed(config, roles, _cache(models, work, count, FILL * device.memory - without))


def _apart(config: PPOConfig, models: Models, cluster: Cluster, work: Work, rollout_gpus: int) -> PPOConfig | None:
    """Engines, frozen models and learner on GPUs of their own, frozen ones on as many as make the update shortest.

    None: the GPUs do not suffice."""
    device = cluster.device
    gpus = _engine_gpus(models, cluster)
    engines = rollout_gpus // gpus
    cache = _cache(models, work, engines, cache_bytes(device, gpus, models.weights)) if engines else 1
    found = []
    for replicas in (2**power for power in range(cluster.gpus.bit_length())):
        frozen, taken = _frozen(models, cluster, replicas)
        ranks = cluster.gpus - rollout_gpus - taken
        if engines and ranks >= 1:
            roles = {"rollout": {"engines": engines, "gpus": gpus}, "learner": {"ranks": ranks, "gpus": 1}, **frozen}
            found.append(_placed(config, roles, cache))
    return min(found, key=lambda placed: seconds_of(placed, models, cluster, work)["update"], default=None)


def _engine_gpus(models: Models, cluster: Cluster) -> int:
    """The smallest power of two that leaves a cache worth having; at most a node."""
    gpus = 1
    while (
        gpus < cluster.gpus_per_node
        and cache_bytes(cluster.device, gpus, models.weights) < LEAST_CACHE * models.weights
    ):
        gpus *= 2
    return gpus


def _frozen(models: Models, cluster: Cluster, replicas: int) -> tuple[dict[str, Any], int]:
    """Roles of reference and reward, and their GPUs: one for both if they fit, else each on its own."""
    room = FILL * cluster.device.memory
    sizes = {
        role: sum(shape.parameters * models.width for shape in getattr(models, role))
        for role in ("reference", "reward")
        if getattr(models, role)
    }
    if not sizes:
        return {}, 0
    if sum(sizes.values()) <= room:
        each = {"replicas": replicas, "gpus": 1 / len(sizes)}
        return {"shared": [list(sizes)]} | {role: each for role in sizes}, replicas
    spread = {role: min(cluster.gpus_per_node, ceil(size / room)) for role, size in sizes.items()}
    roles = {role: {"replicas": replicas, "gpus": gpus} for role, gpus in spread.items()}
    return roles, replicas * sum(spread.values())


def _cache(models: Models, work: Work, engines: int, room: float) -> float:
    """Bytes for one engine: for all of its answers at their longest, at most `room`; never less than one takes."""
    answer = (work.prompt_tokens + work.longest) * kv_bytes(models.policy, models.width)
    return max(answer, min(room, answer * work.answers / engines))


def _placed(config: PPOConfig, roles: dict[str, Any], cache: float) -> PPOConfig:
    """The same run with other roles, on GPUs."""
    tree: dict[str, Any] = config.model_dump()
    tree["device"], tree["publication"]["backend"] = "gpu", "auto"
    tree["rollout"]["kv_cache_gib"] = cache / GIB
    kept = {key: tree["roles"][key] for key in ("cpus", "deadline_s")}
    tree["roles"] = {**{role: {"gpus": 1} for role in ROLES}, **kept, **roles}
    return PPOConfig.model_validate(tree)


def _prediction(name: str, config: PPOConfig, cluster: Cluster, work: Work) -> Prediction:
    seconds = seconds_of(config, models_of(config), cluster, work)
    return Prediction(name, config, held(config, cluster), seconds, work.answers * work.answer_tokens)


# Text


def render(config: PPOConfig, cluster: Cluster, work: Work, predictions: list[Prediction]) -> str:
    """All placements: bytes, seconds, and the roles of the best as a configuration has them."""
    chosen = best(predictions)
    room = FILL * cluster.peak.memory / GIB
    lines = [
        *_premises(config, cluster, work),
        "",
        f"Memory of each GPU in GiB, of {room:.1f} that may be planned with (activations come on top)",
        *table(
            ["placement", "GPUs", "holding", "weights", "gradients", "optimizer", "KV cache", "left"],
            [row for found in predictions for row in _memory_rows(found)],
        ),
        "",
        "Seconds of an update",
        *table(["placement", "fits", *PHASES, "tokens/s"], [_seconds_row(found) for found in predictions]),
        "",
    ]
    if predictions[0].config is not config:
        lines.append(_why_not_as_configured(config, cluster))
    if config.learner.zero.offload != "none":
        lines.append("The optimiser is on the host, whose speed is unknown: learn is without its step.")
    lines += [f"Size of {model} estimated (~) from its name." for model in _estimated(config)]
    if chosen is None:
        return "\n".join([*lines, "Nothing fits: take more GPUs, larger ones, or learner.zero.stage=3."])
    return "\n".join([*lines, f"Best: {chosen.name}", *(f"  {line}" for line in _roles(chosen.config))])


def _premises(config: PPOConfig, cluster: Cluster, work: Work) -> list[str]:
    peak, shares = cluster.peak, cluster.shares
    answers = _assumed(work.answer_tokens, work.longest, "rollout.max_new_tokens", "--answer-tokens")
    prompts = _assumed(work.prompt_tokens, config.data.max_tokens, "data.max_tokens", "--prompt-tokens")
    overlap = "overlap" if config.ppo.max_staleness else "take turns"
    return [
        "Premises",
        *table(
            None,
            [
                ["GPUs", f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu}"],
                ["of each", f"{peak.flops / 1e12:g} TFLOP/s, {peak.bandwidth / 1e12:g} TB/s, {peak.memory / 1e9:g} GB"],
                [
                    "reached",
                    f"{shares.compute:g} of FLOP/s, {shares.memory:g} of memory bandwidth, {shares.link:g} of links "
                    "(--mfu, --mbu, --link-share)",
                ],
                ["an update", f"{work.answers:,} answers to {work.prompts:,} prompts, {work.epochs} epochs"],
                ["answer tokens, mean", answers],
                ["prompt tokens, mean", prompts],
                ["generation and training", f"{overlap} (ppo.max_staleness is {config.ppo.max_staleness})"],
            ],
        ),
    ]


def _assumed(mean: float, longest: int, key: str, option: str) -> str:
    return f"{mean:g}" + (f", half of {key} ({option})" if mean == longest / 2 else "")


def _memory_rows(found: Prediction) -> list[list[str]]:
    return [
        [
            "" if number else found.name,
            f"{held.bundles.count * ceil(held.bundles.gpus)}",
            " + ".join(held.bundles.roles),
            *(f"{part / GIB:.1f}" if part else "-" for part in (held.weights, held.gradients, held.optimizer)),
            f"{held.kv_cache / GIB:.1f}" if held.kv_cache else "-",
            f"{held.left / GIB:.1f}",
        ]
        for number, held in enumerate(found.held)
    ]


def _seconds_row(found: Prediction) -> list[str]:
    if not found.fits:
        return [found.name, "no", *["-"] * len(PHASES), "-"]
    return [found.name, "yes", *(f"{found.seconds[phase]:.3g}" for phase in PHASES), f"{found.tokens_per_s:,.0f}"]


def _why_not_as_configured(config: PPOConfig, cluster: Cluster) -> str:
    if config.device == "cpu":
        return "The configuration's own placement is for CPU."
    asked = plan(config)
    largest = max(each.gpus for each in asked.bundles)
    return (
        f"The configuration's own placement is left out: it asks for {asked.gpus:g} GPUs, up to {largest:g} on a node; "
        f"there are {cluster.gpus}, {cluster.gpus_per_node} on a node."
    )


def _estimated(config: PPOConfig) -> list[str]:
    sizes = {part.model: part.size.source for part in plan(config).memory}
    return [model for model, source in sizes.items() if source == "name"]


def _roles(config: PPOConfig) -> list[str]:
    """As overrides to put behind a command."""
    roles = config.roles
    held = [role for role in ROLES if any(role in group.roles for group in groups(config))]
    found = [
        f"'roles.{role}={{{', '.join(f'{key}: {round(value, 3):g}' for key, value in getattr(roles, role))}}}'"
        for role in held
    ]
    shared = "[" + ", ".join(f"[{', '.join(group)}]" for group in roles.shared) + "]"
    return [*found, f"'roles.shared={shared}'", f"rollout.kv_cache_gib={config.rollout.kv_cache_gib:.3g}"]


def load_ppo(path: Path, overrides: list[str]) -> PPOConfig:
    """Raises ConfigError, in one line where the file is of another stage."""
    given = read(path).keys() | {override.partition("=")[0].partition(".")[0] for override in overrides}
    missing = [key for key in ("policy", "reward", "data") if key not in given]
    if missing:
        raise ConfigError(
            f"{path}: is not a configuration of `rlhf-ray ppo`, the only stage that can be planned: it has no "
            f"{' and no '.join(missing)}; known keys are {', '.join(PPOConfig.model_fields)}"
        )
    return load(PPOConfig, path, overrides)
