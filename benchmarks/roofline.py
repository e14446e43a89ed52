"""Predicted against measured seconds of an update: does the roofline tell how long a run with other numbers takes?

    python benchmarks/roofline.py RUN [OTHER ...]    # folders of finished PPO runs, such as runs/demo/ppo

The machine's peaks are measured: one core's fp32 products and copying of memory. What each phase reaches of its bound
is taken from the first half of RUN's updates. With those shares its other half is predicted, and every OTHER run of the
same models on the same machine, with another batch, other lengths or epochs. Medians over updates, without the first
two. Prints a table and writes benchmarks/results/roofline.json.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from rlhf_ray.config.load import load
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.config.prediction import models_of
from rlhf_ray.config.roofline import (
    Device,
    Engines,
    Models,
    Work,
    generate_s,
    learn_s,
    optimizer_s,
    performance,
    publish_s,
    score_s,
    work_of,
)

RESULTS = Path(__file__).parent / "results" / "roofline.json"
PHASES = ("generate", "score", "learn", "publish")
WARM_UP = 2
CORES = 2
SIDE, COPIED, REPEATS = 512, 2**26, 300
"""Of the matrices, and bytes that are copied: milliseconds each, so that the fastest had the core to itself."""

Rows = list[dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    runs = {folder.name: read(folder) for folder in parser.parse_args().runs}
    device = peaks()
    first, (config, rows) = next(iter(runs.items()))
    half = len(rows) // 2
    shares = shares_of(config, rows[:half], device)
    cases = {f"{first}, second half": (config, rows[half:])} | dict(list(runs.items())[1:])
    found = {name: compare(*case, device, shares) for name, case in cases.items()}
    table = {
        "flops": device.flops,
        "bytes_per_s": device.bandwidth,
        "shares": shares,
        "runs": found,
    }
    RESULTS.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    console = Console(width=120)
    console.print(f"one core: {device.flops / 1e9:.0f} GFLOP/s, {device.bandwidth / 1e9:.1f} GB/s")
    console.print(drawn(found, shares))


def read(folder: Path) -> tuple[PPOConfig, Rows]:
    """A run's configuration, and its metrics after the warm-up."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return load(PPOConfig, folder / "config.yaml"), [json.loads(line) for line in lines[WARM_UP:]]


def peaks() -> Device:
    """Of one core."""
    torch.set_num_threads(1)
    left, right = torch.rand(SIDE, SIDE), torch.rand(SIDE, SIDE)
    source, target = torch.zeros(COPIED, dtype=torch.uint8), torch.zeros(COPIED, dtype=torch.uint8)
    bandwidth = 2 * COPIED / fastest(lambda: target.copy_(source))  # read and written
    return Device(2 * SIDE**3 / fastest(lambda: left @ right), bandwidth, memory=8e9, link=bandwidth)


def fastest(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def bounds(config: PPOConfig, models: Models, work: Work, device: Device) -> dict[str, float]:
    """Seconds of each phase at the peaks. An actor computes with one thread, the learner with all cores."""
    engines = Engines(config.roles.rollout.engines, 1, config.rollout.kv_cache_gib * 2**30)
    steps = config.ppo.epochs * config.ppo.minibatches
    return {
        "generate": generate_s(models, work, engines, device),
        "score": score_s((*models.reference, *models.reward), work, device, CORES),
        "learn": score_s(models.trained, work, device, CORES)
        + learn_s(models.trained, work, device, CORES)
        + steps * optimizer_s(sum(shape.parameters for shape in models.trained), device, CORES),
        "publish": publish_s(models.weights, device.link, device.link),
    }


def typical(config: PPOConfig, rows: Rows, device: Device) -> tuple[dict[str, float], dict[str, float]]:
    """Medians over updates: seconds at the peaks and seconds measured, by phase."""
    models, rollout = models_of(config), config.rollout
    works = [work_of(row, rollout.samples_per_prompt, rollout.max_new_tokens, config.ppo.epochs) for row in rows]
    at_peak = [bounds(config, models, work, device) for work in works]
    return (
        {phase: median(seconds[phase] for seconds in at_peak) for phase in PHASES},
        {phase: median(row[f"time/{phase}"] for row in rows) for phase in PHASES},
    )


def shares_of(config: PPOConfig, rows: Rows, device: Device) -> dict[str, float]:
    """What each phase reached of its bound."""
    at_peak, measured = typical(config, rows, device)
    return {phase: at_peak[phase] / measured[phase] for phase in PHASES}


def compare(config: PPOConfig, rows: Rows, device: Device, shares: dict[str, float]) -> dict[str, dict[str, float]]:
    """By phase and for the sum of them: predicted and measured seconds, and the error. Also phi and MFU."""
    at_peak, measured = typical(config, rows, device)
    predicted = {phase: at_peak[phase] / shares[phase] for phase in PHASES}
    predicted["update"], measured["update"] = sum(predicted.values()), sum(measured.values())
    models, rollout, epochs = models_of(config), config.rollout, config.ppo.epochs
    each = []
    for row in rows:
        work = work_of(row, rollout.samples_per_prompt, rollout.max_new_tokens, epochs)
        each.append(performance(models, work, row, device, gpus=CORES, learner_gpus=CORES))
    return {
        phase: {
            "predicted_s": predicted[phase],
            "measured_s": measured[phase],
            "error": predicted[phase] / measured[phase] - 1,
        }
        for phase in predicted
    } | {"perf": {name: median(found[name] for found in each) for name in each[0]}}


def drawn(found: dict[str, dict[str, dict[str, float]]], shares: dict[str, float]) -> Table:
    table = Table("run", "phase", "share of bound", "predicted s", "measured s", "error", title="Shares from the first")
    for name, phases in found.items():
        for phase in (*PHASES, "update"):
            row = phases[phase]
            share = f"{shares[phase]:.3f}" if phase in shares else ""
            seconds = [f"{row[key]:.3f}" for key in ("predicted_s", "measured_s")]
            table.add_row(name, phase, share, *seconds, f"{row['error']:+.0%}")
        table.add_row(
            name, "phi, mfu", "", *(f"{value:.3f}" for value in phases["perf"].values()), "", end_section=True
        )
    return table


if __name__ == "__main__":
    main()
