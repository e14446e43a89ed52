"""Results of an examination as a table for people; the same numbers as in summary.json."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def table(summary: Mapping[str, Any], title: str, changes: Mapping[str, Any] | None = None) -> "Table":
    """A line a rule: accuracy over all items with its 95% interval, over categories alike, and in each.

    `summary` is of `choice.Results`; `changes`, of `choice.compare`, add what got better and worse and how likely that
    is by chance.
    """
    from rich.table import Table

    rules = summary["rules"]
    categories = list(next(iter(rules.values()))["categories"])
    shown = Table(title=f"{title}, {summary['items']} items")
    shown.add_column("rule")
    for name in (
        "all items",
        "categories alike",
        *categories,
        *(["better / worse (p)"] if changes is not None else []),
    ):
        shown.add_column(name, justify="right")
    for rule, outcome in rules.items():
        micro = outcome["micro"]
        cells = [f"{micro['accuracy']:.3f} [{micro['low']:.3f}, {micro['high']:.3f}]", f"{outcome['macro']:.3f}"]
        cells += [f"{outcome['categories'][name]['accuracy']:.3f}" for name in categories]
        if changes is not None:
            cells.append(_change(changes[rule]) if rule in changes else "")
        shown.add_row(rule, *cells)
    return shown


def _change(change: Any) -> str:
    return f"{change.better} / {change.worse} ({change.p:.3f})"
