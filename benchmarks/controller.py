"""The controller in simulated worlds: what asynchrony gains, and how many samples a second one core can account for.

    python benchmarks/controller.py

Prints the tables of docs/performance.md and writes benchmarks/results/controller.json. Needs no Ray and no model: the
controller is the real one (`runtime/controller.py`), its actors are seeded latencies (`runtime/simulation.py`).
"""

import json
import platform
import resource
import time
import tracemalloc
from pathlib import Path

import numpy as np

from rlhf_ray.runtime.admission import Terms
from rlhf_ray.runtime.audit import audit
from rlhf_ray.runtime.simulation import World, simulate

RESULTS = Path(__file__).parent / "results/controller.json"
BOUNDS = (0, 1, 2, 4)
SEEDS = range(5)
UPDATES, GROUPS = 60, 32
LEARN_SHARES = {"3 s for an update": 3.0, "7 s for an update": 7.0}
"""Seconds of an update; the mean answer takes 1.6 s and the longest of 32 about 7 s."""
IN_FLIGHT, ENGINES = 100_000, 1024


def main() -> None:
    found = {"staleness": staleness(), "scale": scale(), "machine": platform.processor() or platform.machine()}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def staleness() -> dict[str, dict[str, dict[str, float]]]:
    """Samples a second by bound, of the run with bound 0, and what was idle."""
    tables: dict[str, dict[str, dict[str, float]]] = {}
    for name, learn_s in LEARN_SHARES.items():
        world = World(engines=4, answer_tokens=100, sigma=1.0, token_s=0.01, learn_s=learn_s, kv_tokens=1e9)
        print(f"\nlearner takes {name}")
        print("| max_staleness | samples/s | of synchronous | learner idle | engines idle | mean age | oldest |")
        print("|---|---|---|---|---|---|---|")
        rows: dict[str, dict[str, float]] = {}
        for bound in BOUNDS:
            runs = [simulate(Terms(UPDATES, GROUPS, bound), world, seed) for seed in SEEDS]
            ages = sum((audit(run.history).staleness for run in runs), start=audit(()).staleness)
            rate = float(np.mean([run.trained / run.seconds for run in runs]))
            rows[str(bound)] = {
                "samples_per_s": rate,
                "of_synchronous": rate / rows["0"]["samples_per_s"] if rows else 1.0,
                "learner_idle": 1 - float(np.mean([run.learner_busy_s / run.seconds for run in runs])),
                "engines_idle": 1 - float(np.mean([run.engine_busy_s / run.seconds for run in runs])),
                "mean_age": sum(age * count for age, count in ages.items()) / ages.total(),
                "oldest": float(max(ages)),
            }
            row = rows[str(bound)]
            print(
                f"| {bound} | {rate:.1f} | {row['of_synchronous']:.2f} | {row['learner_idle']:.2f} | "
                f"{row['engines_idle']:.2f} | {row['mean_age']:.2f} | {row['oldest']:.0f} |"
            )
        tables[name] = rows
    return tables


def scale() -> dict[str, float]:
    """CPU seconds of controller and simulation together, for a run with `IN_FLIGHT` samples under way."""
    terms, world = Terms(4, IN_FLIGHT // 4, 3), World(engines=ENGINES, kv_tokens=1e9)
    began = time.process_time()
    trained = simulate(terms, world, 0).trained
    cpu_s = time.process_time() - began
    tracemalloc.start()
    simulate(Terms(2, 2000, 1), World(engines=ENGINES, kv_tokens=1e9), 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    row = {
        "engines": ENGINES,
        "samples_in_flight": IN_FLIGHT,
        "samples_per_cpu_s": trained / cpu_s,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "bytes_per_sample_with_history": peak / 4000,
    }
    print(
        f"\n{ENGINES} engines, {IN_FLIGHT:,} samples under way: {row['samples_per_cpu_s']:,.0f} samples a CPU second, "
    )
    print(f"{row['peak_rss_mib']:.0f} MiB at most, history kept in memory included")
    return row


if __name__ == "__main__":
    main()
