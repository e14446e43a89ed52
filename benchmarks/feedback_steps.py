"""Each step of feedback from a model, in the demo's world, measured against gold on held-out prompts.

    python benchmarks/feedback_steps.py [--seeds 0 1] [--folder runs/feedback_steps]

Rounds of critique and revision by harmlessness principles, and comparisons by all principles. Prints tables and writes
benchmarks/results/feedback_steps.json. A base model that is in the folder is not trained again. Sampled and scored with
transformers, not with the engines.
"""

import argparse
import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from rlhf_ray.demo import critics, evaluate, gold
from rlhf_ray.demo.feedback import asked, prepare_feedback
from rlhf_ray.demo.principles import CONSTITUTION

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/feedback_steps.json"
ROUNDS = 4
ROWS_PER_PASS = 128
OPTIONS = ("(A)", "(B)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/feedback_steps")
    chosen = parser.parse_args()
    results = []
    for seed in chosen.seeds:
        folder = chosen.folder / f"seed_{seed}"
        if not (folder / "base/model.safetensors").exists():
            (folder / "summary.json").write_text(json.dumps(prepare_feedback(folder, seed), indent=1))
        results.append(measure(folder, seed))
        show(results[-1])
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measure(folder: Path, seed: int) -> dict[str, Any]:
    model = Model(folder / "base")
    rng = Random(seed)
    base = json.loads((folder / "summary.json").read_text())["base_model"]
    return {
        "seed": seed,
        "base_model": {name: base[name] for name in ("loss_first", "loss_last", "parameters", "tokens")},
        "rounds": {
            name: rounds(model, [row["prompt"] for row in _rows(folder / f"held_out_{name}.jsonl")], rng)
            for name in ("red_team", "benign")
        },
        "judge": judge(model, _rows(folder / "judgements_held_out.jsonl"), rng),
    }


class Model:
    """Samples, and scores options."""

    def __init__(self, folder: Path):
        self.model = evaluate.causal_model(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def say(self, dialogues: list[list[str]], seed: int) -> list[str]:
        """One answer to each dialogue of turns, the user's first."""
        ids = [self._ids(turns) for turns in dialogues]
        answers = []
        for start in range(0, len(ids), ROWS_PER_PASS):
            part = ids[start : start + ROWS_PER_PASS]
            answers += evaluate.sample(self.model, self.tokenizer, part, 32, seed + start)
        return self.tokenizer.batch_decode(answers, skip_special_tokens=True)

    @torch.inference_mode()
    def option_logprobs(self, dialogues: list[list[str]]) -> np.ndarray:
        """[B, 2] summed log-probabilities of the options."""
        options = [self.tokenizer(option, add_special_tokens=False)["input_ids"] for option in OPTIONS]
        rows = [(prompt, option) for turns in dialogues for prompt in [self._ids(turns)] for option in options]
        sums: list[float] = []
        for start in range(0, len(rows), ROWS_PER_PASS):
            part = rows[start : start + ROWS_PER_PASS]
            longest = max(len(prompt) + len(option) for prompt, option in part)
            # Padded on the right, which no earlier token sees.
            ids = torch.tensor([[*p, *o] + [self.tokenizer.pad_token_id] * (longest - len(p + o)) for p, o in part])
            logprobs = self.model(input_ids=ids).logits.log_softmax(-1)
            for row, (prompt, option) in zip(logprobs, part, strict=True):
                sums.append(row[range(len(prompt) - 1, len(prompt) + len(option) - 1), option].sum().item())
        return np.array(sums).reshape(-1, len(OPTIONS))

    def _ids(self, turns: list[str]) -> list[int]:
        messages = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def rounds(model: Model, prompts: list[str], rng: Random) -> list[dict[str, float]]:
    """After 0 to ROUNDS revisions by harmlessness principles; what the critiques and revisions of each were worth."""
    principles = CONSTITUTION.only(["harmless"]).principles
    answers = model.say([[prompt] for prompt in prompts], rng.randrange(1 << 30))
    table = [_state(prompts, answers)]
    for _ in range(ROUNDS):
        drawn = [rng.choice(principles) for _ in prompts]
        before = [[p, a, principle.critique] for p, a, principle in zip(prompts, answers, drawn, strict=True)]
        critiques = model.say(before, rng.randrange(1 << 30))
        dialogues = [[*turns, c, p.revision] for turns, c, p in zip(before, critiques, drawn, strict=True)]
        revisions = model.say(dialogues, rng.randrange(1 << 30))
        right = [
            critique == f"the answer {critics.FAULTS[critics.fault_of(prompt, answer, 'harmless')]}"
            for prompt, answer, critique in zip(prompts, answers, critiques, strict=True)
        ]
        kept = [before == after for before, after in zip(answers, revisions, strict=True)]
        answers = revisions
        table.append(
            {**_state(prompts, answers), "critiques_right": float(np.mean(right)), "kept": float(np.mean(kept))}
        )
    return table


def _state(prompts: list[str], answers: list[str]) -> dict[str, float]:
    evasive = [1 - value for value in gold.not_evasive(prompts, answers)]
    senseless = [gold.moves_of(answer) is None for answer in answers]
    harmful = [1 - value for value, odd in zip(gold.harmless(prompts, answers), senseless, strict=True) if not odd]
    return {
        "gold": float(np.mean(gold.scores(prompts, answers))),
        "harmful": float(np.sum(harmful) / len(prompts)),
        "evasive": float(np.mean(evasive) - np.mean(senseless)),
        "senseless": float(np.mean(senseless)),
        "helpful": float(np.mean(gold.helpful(prompts, answers))),
    }


def judge(model: Model, rows: list[dict[str, Any]], rng: Random) -> dict[str, Any]:
    """Of pairs with a known better answer: accuracy of p averaged over both orders, and what else a judge is worth."""
    drawn = [rng.choice(CONSTITUTION.only([row["part"]]).principles) for row in rows]
    results = {}
    for name, template in (("direct", "comparison"), ("reasoned", "reasoning")):
        orders = []
        for a, b in (("chosen", "rejected"), ("rejected", "chosen")):
            turns = [
                [asked(getattr(CONSTITUTION.templates, template), principle, row["prompt"], row[a], row[b])]
                for row, principle in zip(rows, drawn, strict=True)
            ]
            if name == "reasoned":
                reasons = model.say(turns, rng.randrange(1 << 30))
                turns = [
                    [*request, reason, CONSTITUTION.templates.decision]
                    for request, reason in zip(turns, reasons, strict=True)
                ]
            orders.append(model.option_logprobs(turns))
        results[name] = _judged(rows, *orders)
    return results


def _judged(rows: list[dict[str, Any]], chosen_first: np.ndarray, chosen_second: np.ndarray) -> dict[str, Any]:
    first, second = (1 / (1 + np.exp(each[:, 1] - each[:, 0])) for each in (chosen_first, chosen_second))
    p = (first + 1 - second) / 2  # that the chosen answer is better
    parts = np.array([row["part"] for row in rows])
    bins = np.clip((np.maximum(p, 1 - p) * 10).astype(int), 5, 9)
    return {
        "accuracy": float((p > 0.5).mean()),
        "by_part": {part: float((p > 0.5)[parts == part].mean()) for part in gold.WEIGHTS},
        "position_bias": float(((first + second) / 2).mean() - 0.5),
        "flips": float(((first > 0.5) == (second > 0.5)).mean()),
        "option_mass": float(np.exp(np.concatenate([chosen_first, chosen_second])).sum(1).mean()),
        "calibration": [
            {
                "confidence": float(np.maximum(p, 1 - p)[bins == b].mean()),
                "accuracy": float((p > 0.5)[bins == b].mean()),
                "pairs": int((bins == b).sum()),
            }
            for b in range(5, 10)
            if (bins == b).any()
        ],
    }


def show(result: dict[str, Any]) -> None:
    console = Console()
    for name, states in result["rounds"].items():
        table = Table(title=f"seed {result['seed']}: {name}")
        for column in ("round", *states[-1]):
            table.add_column(column)
        for number, state in enumerate(states):
            table.add_row(str(number), *(f"{state[c]:.3f}" if c in state else "" for c in states[-1]))
        console.print(table)
    for name, judged in result["judge"].items():
        console.print(name, {k: v for k, v in judged.items() if k != "calibration"})
        for row in judged["calibration"]:
            console.print("  ", {k: round(v, 3) for k, v in row.items()})


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
