"""The one base class of all configuration: frozen, typed, and closed to keys it does not know."""

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from rlhf_ray.errors import ConfigError


class Config(BaseModel):
    """A section of a run's configuration. Unknown keys are errors: an ignored key is a silent wrong run."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)


def readable(error: ValidationError, root: type[BaseModel], where: str) -> ConfigError:
    """One line for each fault: dotted key, what is wrong, and for an unknown key the nearest known one."""
    lines = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"]) or "(whole configuration)"
        if fault["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown key '{key}'{_nearest(key, root)}")
        elif fault["type"] == "missing":
            lines.append(f"{where}: '{key}' is missing; it has no default")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            lines.append(f"{where}: '{key}': {message}{_given(fault)}")
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
    known = list(leaves(root))
    sections = sorted(
        {name[: name.index(".", start)] for name in known for start in range(len(name)) if "." in name[start:]}
    )
    parent, _, last = key.rpartition(".")
    siblings = {name[len(parent) + 1 if parent else 0 :].split(".")[0] for name in known if name.startswith(parent)}
    close = difflib.get_close_matches(last, sorted(siblings), n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{parent + '.' if parent else ''}{close[0]}'?"
    close = difflib.get_close_matches(key, [*known, *sections], n=1, cutoff=0.4)
    if not close:  # the right name in the wrong section
        close = [name for name in known if name.rpartition(".")[2] == last][:1]
    return f"; did you mean '{close[0]}'?" if close else ""


def _given(fault: Any) -> str:
    value = fault.get("input")
    return f" (got {value!r})" if isinstance(value, str | int | float | bool | type(None)) else ""
