"""Pictures: of a PPO run, what the reward says, what is true, and how far the policy went for it; of a reward model,
how far its confidence can be believed."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Gold = tuple[int, float, float]
"""(update, mean, standard error) of the gold reward."""

PROXY, GOLD, KL = "#3b6fb6", "#2f8f5b", "#a8502f"


def plot_run(metrics_jsonl: Path, png: Path, gold: Sequence[Gold] | None = None) -> None:
    """Draws proxy reward, gold reward (with a band of one standard error) and KL against updates.

    Updates without a metric are left out of its line. Raises FileNotFoundError when there is no `metrics_jsonl`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = metrics_jsonl.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]

    figure = Figure(figsize=(7, 7), layout="constrained")
    FigureCanvasAgg(figure)
    proxy, true, kl = figure.subplots(3, 1, sharex=True)
    _line(proxy, rows, "objective/scores", PROXY, "Proxy reward\n(optimised)")
    _gold(true, gold or [])
    _line(kl, rows, "objective/kl", KL, "KL to reference\n(nats per answer)")
    kl.set_xlabel("Update")
    kl.xaxis.get_major_locator().set_params(integer=True)
    figure.align_ylabels()
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=150)


def plot_reliability(tables: Mapping[str, Mapping[str, Sequence[float]]], png: Path) -> None:
    """Draws, one line a source, how often predictions of each confidence are right, and below how many there are.

    `tables` are by source: columns `count`, `predicted` and `share`, a value for each bin of confidence in [0.5, 1].
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 7), layout="constrained")
    FigureCanvasAgg(figure)
    right, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _style(right, "Share of pairs in which it is right")
    right.plot([0.5, 1], [0.5, 1], color="0.6", linestyle="--", linewidth=1)
    _style(counts, "Pairs")
    for name, table in tables.items():
        label = f"{name} ({sum(table['count']):g} pairs)"
        right.plot(table["predicted"], table["share"], marker="o", markersize=4, label=label)
        counts.plot(table["predicted"], table["count"], marker="o", markersize=4)
        for place, count in zip(table["predicted"], table["count"], strict=True):
            counts.annotate(f"{count:g}", (place, count), xytext=(0, 4), textcoords="offset points", fontsize=7)
    right.legend(frameon=False)
    counts.set_ylim(bottom=0)
    counts.set_xlabel("Predicted probability of the answer that the model prefers")
    figure.align_ylabels()
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=150)


def _line(axes: Any, rows: Sequence[dict[str, Any]], name: str, colour: str, label: str) -> None:
    points = [(row["update"], row[name]) for row in rows if row.get(name) is not None]
    _style(axes, label)
    axes.plot([x for x, _ in points], [y for _, y in points], color=colour, marker=_marker(points), markersize=3)


def _gold(axes: Any, gold: Sequence[Gold]) -> None:
    _style(axes, "Gold reward\n(± standard error)")
    points = [point for point in sorted(gold) if math.isfinite(point[1])]
    if not points:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color="0.5")
        axes.set_yticks([])
        return
    updates, means, errors = zip(*points, strict=True)
    below = [mean - error for mean, error in zip(means, errors, strict=True)]
    above = [mean + error for mean, error in zip(means, errors, strict=True)]
    axes.fill_between(updates, below, above, color=GOLD, alpha=0.25, linewidth=0)
    axes.plot(updates, means, color=GOLD, marker=_marker(points), markersize=3)


def _marker(points: Sequence[object]) -> str:
    return "o" if len(points) <= 60 else ""


def _style(axes: Any, label: str) -> None:
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
