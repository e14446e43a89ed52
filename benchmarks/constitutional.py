"""What each choice in constitutional AI changes, in the demo's world, where gold tells harm from its absence.

    python benchmarks/constitutional.py [--seeds 0 1 2] [--folder runs/ablation] [variant ...]

Each variant is configs/pipelines/constitutional.yaml with a few keys changed; stages that variants have in common are
run once, and what is finished in the folder is kept. All runs on one core, so seeds can run side by side. Prints two
tables for docs/constitutional-ai.md and writes benchmarks/results/constitutional.json.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PIPELINE = ROOT / "configs/pipelines/constitutional.yaml"
RESULTS = ROOT / "benchmarks/results/constitutional.json"
SOURCES = "{people: {path: '${world.preferences_helpful}', weight: 0.5}, ai: {path: '${judge.rows}', weight: 0.5}}"
ENSEMBLE = [
    f"stages.reward_{n}={{stage: reward, config: ../demo/reward.yaml, seed: {100 + n}, model: '${{sft.model}}', "
    f"workers: {{ranks: 1, cpus: 1}}, data: {{path: null, sources: {SOURCES}}}}}"
    for n in (2, 3)
]
VARIANTS: dict[str, list[str]] = {
    "as configured": [],
    "1 round": ["stages.critique.rounds=1"],
    "hard labels": ["stages.judge.labels=hard"],
    "clamped labels": ["stages.judge.clamp=0.6"],
    "1 principle": [
        "stages.critique.principles=[harmless-1]",
        "stages.judge.principles=[harmless-1]",
        "stages.judge.principles_per_pair=1",
    ],
    "ensemble of 3": [
        *ENSEMBLE,
        "stages.ppo.reward.model=null",
        "stages.ppo.reward.ensemble.models=['${reward.model}', '${reward_2.model}', '${reward_3.model}']",
        "stages.ppo.reward.ensemble.combine=worst",
    ],
}
"""As configured: 4 rounds, 16 principles, soft labels, one reward model."""
ONE_CORE = [
    "stages.sft.workers.cpus=1",
    "stages.reward.workers.cpus=1",
    "stages.judge.generator.cpus=0.5",
    "stages.judge.judge.cpus=0.5",
    "stages.ppo.roles.cpus=0.25",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variants", nargs="*", default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/ablation")
    parser.add_argument("--results", type=Path, default=RESULTS, help="what is there already is added to")
    chosen = parser.parse_args()
    there = json.loads(chosen.results.read_text()) if chosen.results.exists() else []
    rows = {(row["variant"], row["seed"]): row for row in there}
    for seed in chosen.seeds:
        for variant in chosen.variants:
            rows[variant, seed] = run(variant, seed, chosen.folder.absolute())
            chosen.results.write_text(json.dumps(list(rows.values()), indent=1) + "\n", encoding="utf-8")
    print(table(list(rows.values())))
    print(rounds(list(rows.values())))


def run(variant: str, seed: int, folder: Path) -> dict[str, Any]:
    from rlhf_ray.config.pipeline import load_pipeline
    from rlhf_ray.runtime import session
    from rlhf_ray.stages import pipeline

    places = [f"name=seed_{seed}", f"output_dir={folder}", f"seed={seed}", "defaults={telemetry: {wandb: 'off'}}"]
    began = time.monotonic()
    with session.connect(cpus=1):
        made = pipeline.run(*load_pipeline(PIPELINE, [*VARIANTS[variant], *ONE_CORE, *places]))
    found = {name: json.loads((Path(stage["folder"]) / "summary.json").read_text()) for name, stage in made.items()}
    return {
        "variant": variant,
        "seed": seed,
        "rounds": harm_by_round(Path(found["critique"]["transcripts"])),
        "critique": {key: found["critique"][key] for key in ("prompts", "dropped", "changed_share")},
        "judge": {key: found["judge"][key] for key in ("calibration", "position_bias", "flip_rate", "option_mass")},
        "reward": found["reward"]["held_out_last"],
        "before": found["before"]["answers"],
        "after": found["after"]["answers"],
        "kl": found["ppo"]["kl"],
        "seconds": {name: stage["seconds"] for name, stage in made.items()},
        "seconds_all": time.monotonic() - began,
    }


def harm_by_round(transcripts: Path) -> list[float]:
    """Share of answers that are harmful, of the prompts that ask for harm: the first answers, then each round's."""
    from rlhf_ray.demo import gold

    rows = [json.loads(line) for line in transcripts.read_text().splitlines()]
    harm: list[list[bool]] = []
    for row in rows:
        prompt = row["prompt"][-1]["content"]
        if gold.question_of(prompt).kind != "decline":
            continue
        answers = [row["response"], *(each["revision"] for each in row["rounds"])]
        for number, answer in enumerate(answers):
            if len(harm) <= number:
                harm.append([])
            if answer is not None and answer["finish"] == "eos" and answer["text"]:
                harm[number].append(helps_harm(prompt, answer["text"]))
    return [statistics.mean(each) for each in harm]


def helps_harm(prompt: str, answer: str) -> bool:
    """Senseless answers do no harm, though gold gives them nothing for harmlessness."""
    from rlhf_ray.demo import gold

    return gold.moves_of(answer) is not None and gold.parts(prompt, answer)["harmless"] == 0


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds; standard errors are those of the prompts, averaged in squares over seeds."""
    lines = [
        "| variant | seeds | harmless before | harmless after | se between | not evasive (benign) | gold (red team) | "
        "5-gram share | tokens | judge: accuracy, ECE |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == name]

        def of(when: str, prompts: str, reward: str, mine: list[dict[str, Any]] = mine) -> tuple[float, float]:
            found = [row[when][prompts]["rewards"][reward] for row in mine]
            error = math.sqrt(sum(one["se"] ** 2 for one in found)) / len(found)
            return statistics.mean(one["mean"] for one in found), error

        (low, low_se), (high, high_se) = of("before", "red_team", "harmless"), of("after", "red_team", "harmless")
        evades = [of(when, "benign", "not_evasive")[0] for when in ("before", "after")]
        gold = [of(when, "red_team", "gold")[0] for when in ("before", "after")]
        share = statistics.mean(row["after"]["red_team"]["commonest_5gram"]["share"] for row in mine)
        tokens = statistics.mean(row["after"]["red_team"]["tokens"]["mean"] for row in mine)
        accuracy = statistics.mean(row["judge"]["calibration"]["accuracy"] for row in mine)
        error = statistics.mean(row["judge"]["calibration"]["ece"] for row in mine)
        lines.append(
            f"| {name} | {len(mine)} | {low:.3f} ± {low_se:.3f} | {high:.3f} ± {high_se:.3f} | "
            f"{(high - low) / math.hypot(low_se, high_se):.1f} | {evades[0]:.2f} -> {evades[1]:.2f} | "
            f"{gold[0]:.2f} -> {gold[1]:.2f} | {share:.2f} | {tokens:.1f} | {accuracy:.2f}, {error:.2f} |"
        )
    return "\n".join(lines)


def rounds(rows: list[dict[str, Any]]) -> str:
    """Harmful answers to prompts that ask for harm, as configured."""
    mine = [row for row in rows if row["variant"] == "as configured"]
    head = ["seed", "first answer", *(f"round {n}" for n in range(1, len(mine[0]["rounds"])))]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {row['seed']} | {' | '.join(f'{each:.2f}' for each in row['rounds'])} |" for row in mine]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
