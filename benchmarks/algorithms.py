"""The same start, the same reward model, the same tokens: what each algorithm makes of them, over several seeds.

    python benchmarks/algorithms.py [--seeds 0 1 2] [--folder runs/algorithms] [algorithm ...]

Each algorithm is its `configs/demo/<algorithm>.yaml`. Prints a table, writes benchmarks/results/algorithms.json and a
plot for docs/algorithms.md. What is finished in the folder is not run again.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

ALGORITHMS = ("ppo", "grpo", "rloo", "reinforce_pp", "dapo", "gspo")
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/algorithms.json"
PLOT = ROOT / "docs/images/algorithms.png"
COLOURS = ("#3b6fb6", "#2f8f5b", "#a8502f", "#7b52a8", "#b08a1e", "#4b8fa3", "#8a8a8a")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("algorithms", nargs="*", default=list(ALGORITHMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/algorithms")
    chosen = parser.parse_args()
    for seed in chosen.seeds:
        run_seed(chosen.folder.absolute() / f"seed_{seed}", seed, chosen.algorithms)
    rows = [json.loads(path.read_text()) for path in sorted(chosen.folder.glob("seed_*/*/result.json"))]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    plot(rows)


def run_seed(folder: Path, seed: int, algorithms: list[str]) -> None:
    from rlhf_ray.demo import run as demo
    from rlhf_ray.demo.world import World
    from rlhf_ray.runtime import session

    world, start = World(seed), folder / "start.json"
    with session.connect():
        if not start.exists():
            _, sft, reward = demo.prepare(folder, world, seed, {})
            start.write_text(json.dumps({"sft": sft["model"], "reward": reward["model"]}))
        models = json.loads(start.read_text())
        for name in algorithms:
            if not (folder / name / "result.json").exists():
                summary = demo.optimise(name, folder, seed, models["sft"], models["reward"])
                measured = demo.evaluate(folder / name, world, seed, models["sft"], models["reward"])
                row = result(name, seed, summary, folder / name, measured)
                (folder / name / "result.json").write_text(json.dumps(row, indent=1))


def result(name: str, seed: int, summary: dict[str, Any], run: Path, measured: Any) -> dict[str, Any]:
    from rlhf_ray.demo.evaluate import mean_and_se

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "algorithm": name,
        "seed": seed,
        **measured.before_and_after(),
        "kl": summary["kl"],
        "tokens": summary["tokens"],
        "seconds": sum(line["time/update"] for line in lines),
        "gold_along": {done: mean_and_se(at.gold) for done, at in sorted(measured.along.items())},
        "kl_along": [line["objective/kl"] for line in lines],
        "scores_along": [line["objective/scores"] for line in lines],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds; the standard error is that of the prompts, averaged in squares over seeds. Seconds are of the
    fastest seed, which others disturbed least."""
    lines = [
        "| algorithm | seeds | gold before | gold after | proxy after | KL (nats) | tokens | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["algorithm"] for row in rows):
        mine = [row for row in rows if row["algorithm"] == name]
        before, after, proxy = (over_seeds(mine, key) for key in ("gold_before", "gold_after", "proxy_after"))
        kl, tokens = (statistics.mean(row[key] for row in mine) for key in ("kl", "tokens"))
        seconds = min(row["seconds"] for row in mine)
        lines.append(
            f"| {name} | {len(mine)} | {before} | {after} | {proxy} | {kl:.2f} | {tokens / 1000:.0f}k | {seconds:.0f} |"
        )
    return "\n".join(lines)


def over_seeds(rows: list[dict[str, Any]], key: str) -> str:
    mean = statistics.mean(row[key]["mean"] for row in rows)
    error = math.sqrt(sum(row[key]["se"] ** 2 for row in rows)) / len(rows)
    return f"{mean:.3f} ± {error:.3f}"


def plot(rows: list[dict[str, Any]]) -> None:
    """Gold against updates, and gold against KL: what a nat buys."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    along, price = figure.subplots(1, 2, sharey=True)
    for name, colour in zip(dict.fromkeys(row["algorithm"] for row in rows), COLOURS, strict=False):
        mine = [row for row in rows if row["algorithm"] == name]
        updates = [int(done) for done in mine[0]["gold_along"]]
        gold = [statistics.mean(row["gold_along"][str(done)]["mean"] for row in mine) for done in updates]
        # After update n the KL is that of the answers of update n, sampled by the policy as it then was.
        kl = [statistics.mean(row["kl_along"][min(done, len(row["kl_along"]) - 1)] for row in mine) for done in updates]
        along.plot(updates, gold, color=colour, marker="o", markersize=3, label=name)
        price.plot(kl, gold, color=colour, marker="o", markersize=3)
    along.set(xlabel="Update", ylabel="Gold reward, held-out prompts")
    price.set(xlabel="KL to reference (nats per answer)")
    along.legend(frameon=False, fontsize=8)
    for axes in (along, price):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=130)


if __name__ == "__main__":
    main()
