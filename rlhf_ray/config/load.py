"""From a YAML file and `dotted.key=value` overrides to one validated, frozen configuration."""

import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from rlhf_ray.config.base import Config, choices, readable
from rlhf_ray.config.common import StageConfig
from rlhf_ray.errors import ConfigError

C = TypeVar("C", bound=Config)


class _Loader(yaml.SafeLoader):
    """YAML with 1.2's booleans, so that `wandb: off` is text, and with no key twice, of which one would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' stands twice", key.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|True|false|False)$"), list("tTfF"))


def load(kind: type[C], path: str | Path, overrides: list[str] | None = None) -> C:
    """Reads `path`, applies `overrides` in order, validates. Raises ConfigError with one line for each fault."""
    tree = read(path)
    for override in overrides or []:
        apply(tree, override, choices(kind))
    return validated(kind, tree, str(path))


def validated(kind: type[C], tree: Mapping[str, Any], where: str) -> C:
    """Raises ConfigError with one line for each fault, each beginning with `where`."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise readable(error, kind, where) from None


def dump(config: StageConfig) -> str:
    """The resolved configuration as YAML; `load` of it gives an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def read(path: str | Path) -> dict[str, Any]:
    """The file's keys and values. Raises ConfigError."""
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(tree).__name__}")
    return tree


def apply(tree: dict[str, Any], override: str, chosen: Container[str]) -> None:
    """Sets one key. At the places `chosen`, a section may stand as its name alone."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override '{override}': expected dotted.key=value")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ConfigError(f"override '{override}': the value is not YAML; quote it") from None
    *sections, last = key.split(".")
    for depth, section in enumerate(sections, 1):
        if tree.get(section) is None:  # a section that is absent, or a heading with nothing under it
            tree[section] = {}
        elif isinstance(tree[section], str) and ".".join(sections[:depth]) in chosen:
            tree[section] = {"name": tree[section]}
        nested = tree[section]
        if not isinstance(nested, dict):
            raise ConfigError(f"override '{override}': '{section}' is a value, not a section")
        tree = nested
    tree[last] = value
