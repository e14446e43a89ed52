"""The one base class of all configuration: frozen, typed, and closed to keys it does not know."""

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from rlhf_ray.errors import ConfigError


class Config(BaseModel):
    """A section of a run's configuration. Unknown keys are errors: an ignored key is a silent wrong run."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def readable(error: ValidationError, root: type[BaseModel], where: str) -> ConfigError:
    """One line for each fault: dotted key, what is wrong, and for an unknown key the nearest known one."""
    lines = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown key '{key}'{_nearest(key, root)}")
        elif fault["type"] == "missing":
            lines.append(f"{where}: '{key}' is missing; it has no default")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            # Without a key the fields contradict each other, and the message names them.
            lines.append(f"{where}: '{key}': {message}{_given(fault)}" if key else f"{where}: {message}")
    return ConfigError("\n".join(lines))


def leaves(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> FieldInfo of every leaf of `model`, sections walked into."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        if section is None:
            found[prefix + name] = field
        else:
            found.update(leaves(section, f"{prefix}{name}."))
    return found


def _section(annotation: Any) -> type[BaseModel] | None:
    """The Config class inside `annotation`, if it is one or an optional one."""
    options = [annotation, *getattr(annotation, "__args__", ())]
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)


def _nearest(key: str, root: type[BaseModel]) -> str:
    """The known name most like `key`: one of its own section if any is close, else one that ends alike anywhere."""
    paths = [name.split(".") for name in leaves(root)]
    known = list(dict.fromkeys(".".join(path[:end]) for path in paths for end in range(1, len(path) + 1)))
    parent, _, last = key.rpartition(".")
    siblings = [name for name in known if name.rpartition(".")[0] == parent]
    for names in (siblings, known):
        by_ending = {name.rpartition(".")[2]: name for name in reversed(names)}
        close = difflib.get_close_matches(last, by_ending, n=1, cutoff=0.6)
        if close:
            return f"; did you mean '{by_ending[close[0]]}'?"
    return ""


def _given(fault: Any) -> str:
    value = fault.get("input")
    return f" (got {value!r})" if isinstance(value, str | int | float | bool | type(None)) else ""
