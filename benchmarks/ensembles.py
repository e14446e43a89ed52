"""Reward models of several seeds as one: which combination's favourite of n answers is the best by gold?

    python benchmarks/ensembles.py [--members 4] [--prompts 150] [--n 16] [--seed 0] [--folder runs/ensembles]

The demo's world, model and preferences (a quarter of the labels wrong). The supervised model answers every held-out
prompt n times; each combination picks the answer that it scores highest, which is optimisation without a policy. Prints
a table for docs/reward-models.md and writes benchmarks/results/ensembles.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/ensembles.json"
MAX_NEW_TOKENS = 32


def main() -> None:
    from rlhf_ray.algorithms.intervals import mean_and_se

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=150)
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/ensembles")
    told = parser.parse_args()
    sft, members = trained(told.folder.absolute(), told.seed, told.members)
    scores, gold = scored(sft, members, told)
    rows = []
    for name, columns in scores.items():
        mean, se = mean_and_se(gold[np.arange(told.prompts), columns.argmax(1)].tolist())
        rows.append({"combination": name, "mean": mean, "se": se, "correlation": correlation(columns, gold)})
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"n": told.n, "prompts": told.prompts, "rows": rows}, indent=1), encoding="utf-8")
    print(f"all answers {gold.mean():.3f}, best by gold {gold.max(1).mean():.3f}")
    print("| combination | gold of its favourite | rank correlation with gold within a prompt |\n|---|---|---|")
    for row in rows:
        print(f"| {row['combination']} | {row['mean']:.3f} ± {row['se']:.3f} | {row['correlation']:.3f} |")


def trained(folder: Path, seed: int, members: int) -> tuple[str, list[str]]:
    """The supervised model and reward models that differ in their seed; what is there is not trained again."""
    from rlhf_ray.config.load import load
    from rlhf_ray.config.supervised import RewardConfig
    from rlhf_ray.demo import run as demo
    from rlhf_ray.demo.world import World
    from rlhf_ray.runtime import session
    from rlhf_ray.stages import reward

    start = folder / "start.json"
    if not start.exists():
        with session.connect():
            _, sft, first = demo.prepare(folder, World(seed), seed, {})
            models = [first["model"]]
            for number in range(1, members):
                places = {
                    "name": f"reward_{number}",
                    "output_dir": folder,
                    "seed": 1000 + number,
                    "model": sft["model"],
                    "data.path": folder / "world/preferences.jsonl",
                }
                told = [f"{key}={value}" for key, value in places.items()]
                models.append(reward.run(load(RewardConfig, ROOT / "configs/demo/reward.yaml", told))["model"])
        start.write_text(json.dumps([sft["model"], models]))
    sft_model, models = json.loads(start.read_text())
    return sft_model, models


def scored(sft: str, members: list[str], told: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """[prompts, n] scores of each combination, and gold."""
    from rlhf_ray.actors.reward import AveragedRewardModel, RewardModel
    from rlhf_ray.algorithms import ensembles
    from rlhf_ray.data.templates import prompt_ids
    from rlhf_ray.demo import gold
    from rlhf_ray.demo.evaluate import causal_model, sample
    from rlhf_ray.demo.world import World
    from rlhf_ray.models import load
    from rlhf_ray.records import Trajectories

    tokenizer, model = load.tokenizer(sft, "policy"), causal_model(sft)
    prompts = [row["prompt"] for row in World(told.seed).prompts(told.prompts, "held_out")]
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts for _ in range(told.n)]
    answers = [
        answer
        for first in range(0, len(ids), 512)
        for answer in sample(model, tokenizer, ids[first : first + 512], MAX_NEW_TOKENS, first)
    ]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    true = np.array(gold.scores([prompt for prompt in prompts for _ in range(told.n)], texts))
    trajectories = Trajectories.given(ids, answers)
    each = np.stack([RewardModel(path, 4096, "cpu", False).scores(trajectories) for path in members])
    table = torch.from_numpy(each)
    found = {
        **{f"member {number}": scores for number, scores in enumerate(each, 1)},
        "mean": ensembles.mean(table).numpy(),
        "worst": ensembles.worst(table).numpy(),
        "uncertainty": ensembles.uncertainty(table, 1.0).numpy(),
        "weights": AveragedRewardModel(members, 4096, "cpu", False).scores(trajectories),
    }
    return {name: scores.reshape(told.prompts, -1) for name, scores in found.items()}, true.reshape(told.prompts, -1)


def correlation(scores: np.ndarray, gold: np.ndarray) -> float:
    """Spearman's, within each prompt whose answers differ by gold, on average."""
    from scipy.stats import spearmanr

    decided = gold.std(1) > 0
    found = [spearmanr(*pair).statistic for pair in zip(scores[decided], gold[decided], strict=True)]
    return float(np.mean(found))


if __name__ == "__main__":
    main()
