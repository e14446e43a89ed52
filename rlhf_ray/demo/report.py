"""What came of a demo: gold and proxy before, along and after PPO, as numbers, a table, a plot and three dialogues."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.actors.reward import RewardModel
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.demo import gold
from rlhf_ray.demo.evaluate import TOKENS_PER_PASS, Measured, mean_and_se, measure, reward_model_accuracy
from rlhf_ray.runtime.checkpoints import written


@dataclass(frozen=True)
class Evaluated:
    prompts: list[str]
    accuracy: dict[str, float]
    """Of the reward model: accuracy_labels, accuracy_gold."""
    along: dict[int, Measured]
    """Updates done -> what the policy answered then; 0 is the start."""

    @property
    def before(self) -> Measured:
        return self.along[0]

    @property
    def after(self) -> Measured:
        return self.along[max(self.along)]

    def before_and_after(self) -> dict[str, dict[str, float]]:
        return {
            "gold_before": mean_and_se(self.before.gold),
            "gold_after": mean_and_se(self.after.gold),
            "proxy_before": mean_and_se(self.before.proxy),
            "proxy_after": mean_and_se(self.after.proxy),
        }


def evaluate(
    ppo: Path, start: str, reward: str, prompts: list[str], pairs: list[dict[str, Any]], seed: int
) -> Evaluated:
    """Samples from the start and from every checkpoint of the run folder `ppo`."""
    from rlhf_ray.config.load import load

    tokens = load(PPOConfig, ppo / "config.yaml").rollout.max_new_tokens
    scorer = RewardModel(reward, TOKENS_PER_PASS, "cpu", False)
    policies = {0: start}
    for place in written(ppo / "checkpoints"):
        policies[json.loads((place / "state.json").read_text())["updates"]] = str(place / "policy")
    along = {done: measure(path, scorer, prompts, tokens, seed) for done, path in policies.items()}
    return Evaluated(prompts, reward_model_accuracy(scorer, pairs), along)


def summary_text(summary: dict[str, Any]) -> str:
    return json.dumps(summary, indent=2) + "\n"


def show(summary: dict[str, Any], evaluated: Evaluated, folder: Path) -> None:
    """Prints a table, three dialogues and the plot's path."""
    from rich.console import Console
    from rich.table import Table

    from rlhf_ray.telemetry.plots import plot_run

    gold_curve = []
    for done, measured in sorted(evaluated.along.items()):
        at = mean_and_se(measured.gold)
        gold_curve.append((done, at["mean"], at["se"]))
    plot = folder / "plot.png"
    plot_run(folder / "ppo/metrics.jsonl", plot, gold_curve)
    ppo, reward, seconds = summary["ppo"], summary["reward_model"], summary["seconds"]

    def change(name: str) -> str:
        before, after = ppo[f"{name}_before"], ppo[f"{name}_after"]
        return f"{before['mean']:.3f} ± {before['se']:.3f} -> {after['mean']:.3f} ± {after['se']:.3f}"

    table = Table(title=f"seed {summary['seed']}, {len(evaluated.prompts)} held-out prompts", show_header=False)
    table.add_row("gold reward, before -> after PPO", change("gold"))
    table.add_row("proxy reward, before -> after PPO", change("proxy"))
    table.add_row("KL to the reference", f"{ppo['kl']:.2f} nats a sequence")
    table.add_row(
        "reward model's accuracy", f"{reward['accuracy_gold']:.3f} by gold, {reward['accuracy_labels']:.3f} by labels"
    )
    table.add_row("largest log-probability gap, engine to learner", f"{ppo['logprob_gap_max']:.1e}")
    table.add_row("PPO", f"{ppo['updates']} updates, {ppo['tokens']} tokens, {ppo['tokens_per_s']:.0f} tokens/s")
    table.add_row("time", ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items()))
    console = Console()
    console.print(table)
    for row in _one_of_each_kind(evaluated.prompts):
        console.print(f"\n[bold]{evaluated.prompts[row]}[/bold]", highlight=False)
        for name, measured in (("before", evaluated.before), ("after ", evaluated.after)):
            console.print(f"  {name}  gold {measured.gold[row]:+.2f}  ", measured.responses[row], markup=False)
    console.print(f"\nplot: {plot}", soft_wrap=True, highlight=False)


def _one_of_each_kind(prompts: list[str]) -> list[int]:
    kinds = [gold.question_of(prompt).kind for prompt in prompts]
    return [kinds.index(kind) for kind in dict.fromkeys(kinds)]
