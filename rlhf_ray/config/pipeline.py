"""Configuration of `rlhf-ray pipeline`: stages by name, whose values may be results of other stages.

`${sft.model}` stands for what stage `sft` wrote as `model` into its summary; such references are the edges of the
graph. Every stage is validated before the first one runs, with references left in place.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from rlhf_ray.config.base import Config
from rlhf_ray.config.common import StageConfig
from rlhf_ray.config.load import apply, read, validated
from rlhf_ray.config.stages import config_of, known
from rlhf_ray.errors import ConfigError

NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"
REFERENCE = re.compile(rf"\$\{{({NAME})\.([A-Za-z0-9_.-]+)\}}")


class PipelineConfig(Config):
    """A graph of stages."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The pipeline's name; its folder is `<output_dir>/<name>`."""
    output_dir: str = "runs"
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of every stage that does not say its own."""
    defaults: dict[str, Any] = {}
    """Keys that every stage has unless it says otherwise, such as `device: gpu`."""
    stages: Annotated[dict[Annotated[str, Field(pattern=f"^{NAME}$")], dict[str, Any]], Field(min_length=1)]
    """Name -> the stage's configuration; `stage` says which command it is (without: its name does), and `config` a file
    to start from. `name` and `output_dir` are the pipeline's to set."""

    @property
    def folder(self) -> Path:
        return Path(self.output_dir).absolute() / self.name


@dataclass(frozen=True)
class Node:
    """One stage of a pipeline."""

    name: str
    command: str
    """sft, reward, ppo, ..."""
    tree: Mapping[str, Any]
    """Its configuration as written, references in place."""
    after: tuple[str, ...]
    """Stages that it refers to."""

    def resolved(self, results: Mapping[str, Mapping[str, Any]], where: str, **places: str) -> StageConfig:
        """Its configuration with `results` (stage -> summary) in the place of references. Raises ConfigError."""
        tree = _resolve(dict(self.tree), results, self.name)
        return validated(config_of(self.command), {**tree, **places}, where)


def load_pipeline(path: str | Path, overrides: list[str] | None = None) -> tuple[PipelineConfig, list[Node]]:
    """The configuration and its stages, each after those it refers to, else in the order of the file.

    Raises ConfigError for a fault in the file or in any stage, a reference to no stage, and stages in a circle.
    """
    tree = read(path)
    for override in overrides or []:
        apply(tree, override, ())
    config = validated(PipelineConfig, tree, str(path))
    nodes = [_node(config, name, stage, path) for name, stage in config.stages.items()]
    for node in nodes:
        node.resolved({}, f"{path}: stage '{node.name}'", name=node.name, output_dir=str(config.folder))
    return config, _in_order(nodes, path)


def _node(config: PipelineConfig, name: str, stage: Mapping[str, Any], path: str | Path) -> Node:
    own = dict(stage)
    command = str(own.pop("stage", name))
    if command not in known():
        raise ConfigError(
            f"{path}: stage '{name}': there is no command '{command}'; give `stage:`, one of {', '.join(known())}"
        )
    for key in ("name", "output_dir"):
        if key in own:
            raise ConfigError(f"{path}: stage '{name}': '{key}' is the pipeline's to set; remove it")
    base = {}
    if "config" in own:
        base = read(Path(path).parent / str(own.pop("config")))
        base = {key: value for key, value in base.items() if key not in ("name", "output_dir", "seed")}
    tree = merged(merged({"seed": config.seed, **config.defaults}, base), own)
    after = tuple(dict.fromkeys(stage for stage, _ in references(tree)))
    for other in after:
        if other not in config.stages:
            raise ConfigError(
                f"{path}: stage '{name}' refers to '{other}', which is none of {', '.join(config.stages)}"
            )
    return Node(name, command, tree, after)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, section by section."""
    found = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = merged(found[key], value) if both else value
    return found


def references(tree: Any) -> Iterator[tuple[str, str]]:
    """(stage, key) of every reference in `tree`."""
    if isinstance(tree, str):
        yield from REFERENCE.findall(tree)
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from references(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from references(value)


def _resolve(tree: Any, results: Mapping[str, Mapping[str, Any]], who: str) -> Any:
    """References to stages that are not in `results` stay as they are."""
    if isinstance(tree, Mapping):
        return {key: _resolve(value, results, who) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_resolve(value, results, who) for value in tree]
    if not isinstance(tree, str):
        return tree
    whole = REFERENCE.fullmatch(tree)
    if whole and whole[1] in results:  # a number stays one
        return _result(results[whole[1]], whole[1], whole[2], who)
    return REFERENCE.sub(
        lambda found: str(_result(results[found[1]], found[1], found[2], who)) if found[1] in results else found[0],
        tree,
    )


def _result(summary: Mapping[str, Any], stage: str, key: str, who: str) -> Any:
    value: Any = summary
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ConfigError(
                f"stage '{who}' refers to ${{{stage}.{key}}}, but the summary of '{stage}' has no '{part}'; it has "
                f"{', '.join(map(str, summary))}"
            )
        value = value[part]
    return value


def _in_order(nodes: list[Node], path: str | Path) -> list[Node]:
    done: list[Node] = []
    left = list(nodes)
    while left:
        names = {node.name for node in done}
        ready = next((node for node in left if set(node.after) <= names), None)
        if ready is None:
            raise ConfigError(f"{path}: stages wait for each other in a circle: {', '.join(n.name for n in left)}")
        done.append(ready)
        left.remove(ready)
    return done
