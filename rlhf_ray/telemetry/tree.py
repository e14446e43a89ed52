"""A pipeline as a person sees it: every stage under the last one that it waits for, and how far it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_ray.telemetry.progress import console

State = Literal["waiting", "running", "done", "kept", "failed"]
"""kept: finished in an earlier run, with the same inputs."""

MARKS: dict[State, tuple[str, str]] = {
    "waiting": ("·", "dim"),
    "running": ("▸", "bold yellow"),
    "done": ("✓", "green"),
    "kept": ("=", "cyan"),
    "failed": ("✗", "bold red"),
}


@dataclass
class Progress:
    """One stage's line."""

    name: str
    after: Sequence[str]
    state: State = "waiting"
    seconds: float | None = None
    shown: Mapping[str, Any] = field(default_factory=dict)
    """A few results worth seeing."""

    @property
    def line(self) -> str:
        parts = [self.state, f"{self.seconds:.0f} s" if self.seconds is not None else ""]
        parts += [f"{name} {_value(value)}" for name, value in self.shown.items()]
        return "  ".join(part for part in parts if part)


def show(title: str, stages: Sequence[Progress]) -> None:
    """Prints the tree to stderr."""
    from rich.text import Text
    from rich.tree import Tree

    branches = {"": Tree(Text(title, style="bold"))}
    for stage in stages:
        mark, style = MARKS[stage.state]
        parent = branches[_last(stage.after, stages)]
        branches[stage.name] = parent.add(Text.assemble((f"{mark} {stage.name}", style), f"  {stage.line}"))
    console().print(branches[""])


def _last(names: Sequence[str], stages: Sequence[Progress]) -> str:
    """Of several stages that one waits for, the one that ends last."""
    order = [stage.name for stage in stages]
    return max(names, key=order.index) if names else ""


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
