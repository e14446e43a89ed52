"""The one base class of all configuration: frozen, typed, and closed to keys it does not know."""

import difflib
from typing import Any, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from rlhf_ray.errors import ConfigError


class Config(BaseModel):
    """A section of a run's configuration. Unknown keys are errors: an ignored key is a silent wrong run."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def named(default: str) -> BeforeValidator:
    """For a choice of sections told apart by `name`: `grpo` alone is `{name: grpo}`; without a name it is `default`."""

    def section(value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        return {"name": default, **value} if isinstance(value, dict) else value

    return BeforeValidator(section)


def readable(error: ValidationError, root: type[BaseModel], where: str) -> ConfigError:
    """One line for each fault: dotted key, what is wrong, and for an unknown key the nearest known one."""
    lines = []
    for fault in error.errors():
        key = ".".join(_without_choices(fault["loc"], root))
        if fault["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown key '{key}'{_nearest(key, root)}")
        elif fault["type"] == "missing":
            lines.append(f"{where}: '{key}' is missing; it has no default")
        elif fault["type"] == "union_tag_invalid":
            given, known = fault["ctx"]["tag"], fault["ctx"]["expected_tags"]
            close = difflib.get_close_matches(given, known.replace("'", "").split(", "), n=1)
            meant = f"; did you mean '{close[0]}'?" if close else ""
            lines.append(f"{where}: '{key}': there is no '{given}'; expected one of {known}{meant}")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            # Without a key the fields contradict each other, and the message names them.
            lines.append(f"{where}: '{key}': {message}{_given(fault)}" if key else f"{where}: {message}")
    return ConfigError("\n".join(lines))


def leaves(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> FieldInfo of every leaf of `model`, sections walked into.

    A choice is one leaf, and so is a section that may be left out: what is chosen has settings of its own."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        options = sections(field.annotation)
        if options and not is_choice(field.annotation):
            found.update(leaves(options[0], f"{prefix}{name}."))
        else:
            found[prefix + name] = field
    return found


def choices(model: type[BaseModel], prefix: str = "") -> dict[str, list[type[BaseModel]]]:
    """Dotted name -> sections, wherever one of several is chosen by its `name`, or one may be left out."""
    found: dict[str, list[type[BaseModel]]] = {}
    for name, field in model.model_fields.items():
        options = sections(field.annotation)
        if is_choice(field.annotation):
            found[prefix + name] = options
        for option in options[:1]:
            found.update(choices(option, f"{prefix}{name}."))
    return found


def mappings(model: type[BaseModel], prefix: str = "") -> dict[str, type[BaseModel]]:
    """Dotted name -> section, wherever several of it stand under names that the person gives."""
    found: dict[str, type[BaseModel]] = {}
    for name, field in model.model_fields.items():
        if get_origin(field.annotation) is dict:
            value = get_args(field.annotation)[1]
            if isinstance(value, type) and issubclass(value, BaseModel):
                found[prefix + name] = value
        for option in sections(field.annotation)[:1]:
            found.update(mappings(option, f"{prefix}{name}."))
    return found


def sections(annotation: Any) -> list[type[BaseModel]]:
    """The Config classes inside `annotation`: none for a leaf, several where one is chosen by its `name`."""
    if get_origin(annotation) is dict:
        return []
    options = [annotation, *getattr(annotation, "__args__", ())]
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]


def is_choice(annotation: Any) -> bool:
    """Whether one of several sections is chosen by its `name`, or one may be left out."""
    options = sections(annotation)
    return len(options) > 1 or (bool(options) and type(None) in getattr(annotation, "__args__", ()))


def _without_choices(location: tuple[int | str, ...], root: type[BaseModel]) -> list[str]:
    """Pydantic puts the chosen section's name into the place of a fault, where no YAML has it."""
    path: list[str] = []
    chosen = _all_choices(root, ".".join(map(str, location)))
    for part in location:
        if path and ".".join(path) in chosen and part in _names(chosen[".".join(path)]):
            continue
        path.append(str(part))
    return path


def _names(options: list[type[BaseModel]]) -> list[str]:
    return [option.model_fields["name"].default for option in options if "name" in option.model_fields]


def _all_choices(root: type[BaseModel], like: str, prefix: str = "") -> dict[str, list[type[BaseModel]]]:
    """As `choices`, with those of the section that `like` names where names are free."""
    found = choices(root, prefix)
    for place, section in _own_sections(root, like, prefix):
        found |= _all_choices(section, like, place)
    return found


def _all_keys(root: type[BaseModel], like: str, prefix: str = "") -> list[str]:
    """Every leaf, those of all choices included, and those of the section that `like` names where names are free."""
    chosen = choices(root, prefix)
    keys = [*leaves(root, prefix)]
    keys += [key for name, options in chosen.items() for option in options for key in leaves(option, f"{name}.")]
    for place, section in _own_sections(root, like, prefix):
        keys += _all_keys(section, like, place)
    return keys


def _own_sections(root: type[BaseModel], like: str, prefix: str) -> list[tuple[str, type[BaseModel]]]:
    """(prefix, section) of those of free names that `like` goes through."""
    found = [(f"{name}.", section) for name, section in mappings(root, prefix).items() if like.startswith(f"{name}.")]
    return [(f"{name}{like.removeprefix(name).partition('.')[0]}.", section) for name, section in found]


def _nearest(key: str, root: type[BaseModel]) -> str:
    """The known name most like `key`: one of its own section if any is close, else one that ends alike anywhere."""
    parent, _, last = key.rpartition(".")
    owners = [option for option in _all_choices(root, key).get(parent, []) if last in option.model_fields]
    if owners:
        return f"; {', '.join(_names(owners))} has it: give the name as well"
    paths = [name.split(".") for name in _all_keys(root, key)]
    known = list(dict.fromkeys(".".join(path[:end]) for path in paths for end in range(1, len(path) + 1)))
    siblings = [name for name in known if name.rpartition(".")[0] == parent]
    for names in (siblings, known):
        by_ending = {name.rpartition(".")[2]: name for name in reversed(names)}
        # A known name that goes on is nearer than one that shares more letters.
        close = [name for name in by_ending if last.startswith(f"{name}_")]
        close += difflib.get_close_matches(last, by_ending, n=1, cutoff=0.6)
        if close:
            return f"; did you mean '{by_ending[close[0]]}'?"
    return ""


def _given(fault: Any) -> str:
    value = fault.get("input")
    return f" (got {value!r})" if isinstance(value, str | int | float | bool | type(None)) else ""
