"""What offline Q-learning makes of answers that behaviour cloning imitates, in the demo's world, where gold can tell.

    OMP_NUM_THREADS=1 python benchmarks/ilql_demo.py [--seeds 0 1 2] [--folder runs/ilql_demo]

The log: 8 answers of the demo's SFT model to each of 1600 prompts, and what each was worth, which is gold, as in
a shop's books. `rlhf-ray ilql` learns from it with the settings of configs/demo/ilql.yaml, and `rlhf-ray sft` in as
many steps from the same start: from all answers (behaviour cloning), and from the better half of each prompt's.

Better than the clone is not yet better by rewards: Q keeps to the data, so steering sharpens, and in this world the
commonest answers are not bad ones. Hence two controls: imitation at lower temperatures, and the same Q-learning with
rewards shuffled over the log. What is finished in the folder is not run again. Prints a table for docs/ilql.md, writes
benchmarks/results/ilql_demo.json and docs/images/ilql.png.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_ray.data.templates import prompt_ids
from rlhf_ray.demo import gold
from rlhf_ray.demo.evaluate import causal_model, mean_and_se, sample
from rlhf_ray.demo.world import USUAL, World
from rlhf_ray.models import load
from rlhf_ray.models.q_heads import Decoder, steered

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/ilql_demo.json"
PLOT = ROOT / "docs/images/ilql.png"
BETAS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
TEMPERATURES = (1.0, 0.5, 0.25)
CLONE, FILTERED, ILQL, SHUFFLED = "behaviour cloning", "of the better half", "ILQL", "ILQL, rewards shuffled"
PROMPTS, SAMPLES, LOGGED, NEW_TOKENS = 384, 2, 8, 32
ROWS_PER_PASS = 768
Seed = dict[str, dict[str, Any]]
"""By policy: `gold` [P], each held-out prompt's mean over its answers; `kl` to the clone, nats per answer; `finished`,
the share of answers that ended by EOS."""


class Policy(NamedTuple):
    learner: str
    temperature: float = 1.0
    decode_beta: float | None = None

    @property
    def name(self) -> str:
        of = f"temperature {self.temperature:g}" if self.decode_beta is None else f"decode_beta {self.decode_beta:g}"
        return f"{self.learner}, {of}"


IMITATORS = [Policy(learner, temperature) for learner in (CLONE, FILTERED) for temperature in TEMPERATURES]
STEERED = [Policy(learner, decode_beta=beta) for learner in (ILQL, SHUFFLED) for beta in BETAS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/ilql_demo")
    told = parser.parse_args()
    seeds = [run_seed(told.folder.absolute() / f"seed_{seed}", seed) for seed in told.seeds]
    found = {policy.name: summary(policy, seeds) for policy in [*IMITATORS, *STEERED]}
    RESULTS.write_text(json.dumps({"seeds": told.seeds, "policies": found}, indent=1) + "\n", encoding="utf-8")
    print(table(found))
    plot(found)


def run_seed(folder: Path, seed: int) -> Seed:
    result = folder / "result.json"
    if not result.exists():
        models = trained(folder, seed)
        result.write_text(
            json.dumps({policy.name: measured(policy, models, seed) for policy in [*IMITATORS, *STEERED]})
        )
    return json.loads(result.read_text())


def trained(folder: Path, seed: int) -> dict[str, str]:
    """Checkpoints by learner, all from the demo's SFT model."""
    from rlhf_ray.config.ilql import ILQLConfig
    from rlhf_ray.config.load import load as read
    from rlhf_ray.config.supervised import SFTConfig
    from rlhf_ray.demo import run as demo
    from rlhf_ray.runtime import session
    from rlhf_ray.stages import ilql, sft
    from rlhf_ray.telemetry.run_folder import write_rows

    def settings(name: str, rows: list[dict[str, Any]]) -> ILQLConfig:
        write_rows(folder / f"{name}.jsonl", rows)
        told = {"name": name, "output_dir": folder, "seed": seed, "model": start, "data.path": folder / f"{name}.jsonl"}
        return read(ILQLConfig, demo.CONFIGS / "ilql.yaml", [f"{key}={value}" for key, value in told.items()])

    def valued(name: str, rows: list[dict[str, Any]]) -> str:
        return ilql.run(settings(name, rows))["model"]

    def cloned(name: str, rows: list[dict[str, Any]]) -> str:
        told = settings(name, rows).model_dump(include=set(SFTConfig.model_fields))
        told["training"]["epochs"] *= len(log) // len(rows)  # as many steps of fewer rows
        return sft.run(SFTConfig.model_validate(told))["model"]

    folder.mkdir(parents=True, exist_ok=True)
    models, kept, begun = {}, folder / "models.json", folder / "start.json"
    if kept.exists():
        models = json.loads(kept.read_text())
    with session.connect():
        if not begun.exists():
            begun.write_text(json.dumps(demo.prepare(folder, World(seed), seed, {})[1]["model"]))
        start = json.loads(begun.read_text())
        log = logged(start, World(seed), seed)
        for learner, train, name, rows in (
            (CLONE, cloned, "clone", log),
            (FILTERED, cloned, "better_half", better_half(log)),
            (ILQL, valued, "ilql", log),
            (SHUFFLED, valued, "shuffled", shuffled(log, Random(seed))),
        ):
            if learner not in models:
                models[learner] = train(name, rows)
                kept.write_text(json.dumps(models))
    return models


def logged(model: str, world: World, seed: int) -> list[dict[str, Any]]:
    """LOGGED rows {"prompt", "completion", "reward"} a training prompt, one after the other."""
    asked = [row["prompt"] for row in world.prompts(USUAL.prompts_train) for _ in range(LOGGED)]
    tokenizer = load.tokenizer(model, "policy")
    _, answers = answered(causal_model(model), tokenizer, asked, seed + 1000)
    said = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [
        {"prompt": prompt, "completion": text, "reward": reward}
        for prompt, text, reward in zip(asked, said, gold.scores(asked, said), strict=True)
    ]


def answered(model: Any, tokenizer: Any, asked: list[str], seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of prompts and of one answer to each."""
    prompts = [prompt_ids(tokenizer, prompt) for prompt in asked]
    passes = [prompts[begin : begin + ROWS_PER_PASS] for begin in range(0, len(prompts), ROWS_PER_PASS)]
    rng = Random(seed)  # two passes must not draw the same random numbers
    return prompts, [row for each in passes for row in sample(model, tokenizer, each, NEW_TOKENS, rng.getrandbits(32))]


def better_half(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each prompt's answers."""
    groups = [log[begin : begin + LOGGED] for begin in range(0, len(log), LOGGED)]
    return [row for group in groups for row in sorted(group, key=lambda row: -row["reward"])[: LOGGED // 2]]


def shuffled(log: list[dict[str, Any]], random: Random) -> list[dict[str, Any]]:
    """The same answers and the same rewards, each at any of the answers."""
    rewards = [row["reward"] for row in log]
    random.shuffle(rewards)
    return [{**row, "reward": reward} for row, reward in zip(log, rewards, strict=True)]


class Head(nn.Module):
    """In place of a model's output head: its logits steered, or at a temperature."""

    def __init__(self, head: nn.Module, policy: Policy, values: nn.ModuleDict | None):
        super().__init__()
        self.head, self.policy, self.values = head, policy, values

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, V] of hidden [B, T, H]"""
        flat = hidden.flatten(0, 1)
        logits = self.head(flat) / self.policy.temperature
        if self.policy.decode_beta is not None:
            logits = steered(logits, flat, self.values, self.policy.decode_beta)
        return logits.unflatten(0, hidden.shape[:2])


def measured(policy: Policy, models: dict[str, str], seed: int) -> dict[str, Any]:
    folder = models[policy.learner]
    tokenizer, model, clone = load.tokenizer(folder, "policy"), causal_model(folder), causal_model(models[CLONE])
    values = None if policy.decode_beta is None else Decoder(Path(folder), model).heads
    model.set_output_embeddings(Head(model.get_output_embeddings(), policy, values))
    asked = [row["prompt"] for row in World(seed).prompts(PROMPTS, "held_out") for _ in range(SAMPLES)]
    prompts, answers = answered(model, tokenizer, asked, seed)
    earned = gold.scores(asked, tokenizer.batch_decode(answers, skip_special_tokens=True))
    return {
        "gold": torch.tensor(earned).view(PROMPTS, SAMPLES).mean(1).tolist(),
        "kl": kl(model, clone, prompts, answers),
        "finished": statistics.mean(answer[-1] == tokenizer.eos_token_id for answer in answers),
    }


@torch.inference_mode()
def kl(model: Any, clone: Any, prompts: list[list[int]], answers: list[list[int]]) -> float:
    """Mean over answers [B], sampled from `model`, of sum_t sum_a pi(a | s_t) log(pi(a | s_t) / clone(a | s_t))."""
    total = 0.0
    for begin in range(0, len(answers), ROWS_PER_PASS):
        rows = list(zip(prompts, answers, strict=True))[begin : begin + ROWS_PER_PASS]
        # Padded on the right, where no token of an answer looks.
        ids = nn.utils.rnn.pad_sequence([torch.tensor(prompt + answer) for prompt, answer in rows], batch_first=True)
        place = torch.arange(ids.shape[1])
        first, last = torch.tensor([(len(prompt) - 1, len(prompt) + len(answer) - 2) for prompt, answer in rows]).T
        chooses = (place >= first[:, None]) & (place <= last[:, None])
        own, other = (policy(input_ids=ids).logits[chooses].log_softmax(-1) for policy in (model, clone))
        total += float((own.exp() * (own - other)).sum())
    return total / len(answers)


def summary(policy: Policy, seeds: list[Seed]) -> dict[str, Any]:
    """Means over seeds, and differences prompt by prompt: to the clone, and to the same policy of shuffled rewards."""
    found = {key: statistics.mean(seed[policy.name][key] for seed in seeds) for key in ("kl", "finished")}
    found["gold"] = over_seeds([mean_and_se(seed[policy.name]["gold"]) for seed in seeds])
    others = {"clone": IMITATORS[0]} | (
        {"shuffled": policy._replace(learner=SHUFFLED)} if policy.learner == ILQL else {}
    )
    for name, other in others.items():
        if other != policy:
            pairs = [zip(seed[policy.name]["gold"], seed[other.name]["gold"], strict=True) for seed in seeds]
            found[f"over_{name}"] = over_seeds([mean_and_se([own - its for own, its in each]) for each in pairs])
    return found


def over_seeds(each: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and its standard error, that of the prompts averaged in squares over seeds; and `by_seed`."""
    mean, squares = statistics.mean(one["mean"] for one in each), sum(one["se"] ** 2 for one in each)
    return {"mean": mean, "se": math.sqrt(squares) / len(each), "by_seed": each}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Of differences the number of standard errors stands behind."""
    lines = ["| policy | gold | over the clone | over shuffled rewards | KL | finished |", "|---" * 6 + "|"]
    for name, row in found.items():
        cells = [f"{row['gold']['mean']:.3f} ± {row['gold']['se']:.3f}"]
        for key in ("over_clone", "over_shuffled"):
            more = row.get(key)
            cells.append(f"{more['mean']:.3f} ({more['mean'] / more['se']:.1f})" if more else "")
        lines.append(f"| {name} | {' | '.join(cells)} | {row['kl']:.2f} | {row['finished']:.1%} |")
    return "\n".join(lines)


def plot(found: dict[str, dict[str, Any]]) -> None:
    """Gold against KL, a line a learner: what a nat away from the clone buys."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = dict(zip((ILQL, SHUFFLED, CLONE, FILTERED), ("#3b6fb6", "#8a8a8a", "#2f8f5b", "#a8502f"), strict=True))
    for learner, colour in colours.items():
        policies = [policy for policy in [*IMITATORS, *STEERED] if policy.learner == learner]
        rows = [found[policy.name] for policy in policies]
        x, y, errors = [row["kl"] for row in rows], *([row["gold"][key] for row in rows] for key in ("mean", "se"))
        axes.errorbar(x, y, errors, color=colour, marker="o", markersize=3, linewidth=1, label=learner)
        for policy, *place in zip(policies, x, y, strict=True):
            mark = f"T {policy.temperature:g}" if policy.decode_beta is None else f"{policy.decode_beta:g}"
            axes.annotate(mark, tuple(place), xytext=(3, 5), textcoords="offset points", fontsize=7, color=colour)
    axes.set(xlabel="KL to behaviour cloning (nats per answer)", ylabel="Gold reward, held-out prompts")
    axes.legend(frameon=False, fontsize=8, title="beside points: decode_beta, or temperature T", title_fontsize=7)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=130)


if __name__ == "__main__":
    main()
