"""An examination of a policy: which of given answers it chooses, what its own are like, how they do against others'.

Nothing here trains, and nothing is left out: an item that cannot be measured is an error, as is a measure that cannot
be had, and neither takes away what was measured before it. Baselines that look at no model stand beside every choice.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_ray import interrupts
from rlhf_ray.algorithms.intervals import McNemar
from rlhf_ray.config.common import DataConfig
from rlhf_ray.config.evaluation import EvaluateConfig
from rlhf_ray.config.rewards import RewardSection
from rlhf_ray.data import rows
from rlhf_ray.data.quarantine import Quarantine
from rlhf_ray.data.templates import ensure_chat_template
from rlhf_ray.errors import DataError
from rlhf_ray.evaluation.items import OWN, Item, items
from rlhf_ray.evaluation.table import table
from rlhf_ray.feedback import constitution as constitutions
from rlhf_ray.models import load
from rlhf_ray.runtime import session
from rlhf_ray.stages import scoring
from rlhf_ray.stages.engines import Reader
from rlhf_ray.stages.examination import Examination, Inputs
from rlhf_ray.stages.reward_check import check_reward
from rlhf_ray.telemetry.progress import console
from rlhf_ray.telemetry.tracker import Tracker


def run(config: EvaluateConfig, address: str | None = None) -> dict[str, Any]:
    """The whole stage; returns what summary.json says. Any failure ends it with an RLHFError."""
    with Tracker(config, "evaluate") as tracker:
        found = Examination(config, prepare(config, tracker.folder.path), tracker.folder)
        with session.connect(address), interrupts.stoppable():
            with found.engines("policy") as policy:  # one model is up at a time
                found.choose(policy)
                found.answer(policy)
            found.beside_reference()
            found.by_reward()
            found.measure_answers()
            found.duel()
        summary = found.summary
        tracker.log(0, _metrics(summary))
        tracker.summary(summary)
        _show(summary)
        return summary


def prepare(config: EvaluateConfig, folder: Path) -> Inputs:
    trust, quarantine = config.trust_remote_code, Quarantine(folder / "quarantine.jsonl")
    readers = {name: Reader(section, name, trust) for name, section in config.engines.items()}
    policy = readers["policy"].tokenizer
    for name, section in config.answers.items():
        if section.rewards:
            measures = RewardSection(parts=section.rewards)
            check_reward(measures, policy, config.policy.model, trust, f"answers.{name}.rewards")
    if config.reward:
        own = scoring.tokenizer_of(config.reward, config.policy.model)
        check_reward(config.reward, load.tokenizer(own, "reward", trust), own, trust)
    constitutions.load(config.constitution)
    if config.duel:
        constitutions.load(config.duel.constitution).only(config.duel.principles)
    path = str(OWN) if config.items == "hhh" else config.items
    found = items(DataConfig(path=path), quarantine) if path else []
    pairs = []
    if config.pairs and config.reward:
        tokenizer = load.tokenizer(scoring.tokenizer_of(config.reward, config.policy.model), "reward", trust)
        data = DataConfig(path=config.pairs, max_tokens=config.policy.max_tokens)
        pairs = rows.benchmark_pairs(data, ensure_chat_template(tokenizer), quarantine.another())
    room = config.policy.max_tokens - config.policy.max_new_tokens
    prompts = {
        name: rows.prompts(section.data(room), policy, quarantine.another()) for name, section in config.answers.items()
    }
    before = None
    if config.before is not None:
        before = _earlier(Path(config.before), found)
    return Inputs(readers, found, pairs, prompts, before)


def _earlier(folder: Path, found: Sequence[Item]) -> list[dict[str, Any]]:
    """The rows of an earlier evaluation. Raises DataError unless it is of the same items."""
    path = folder / "items.jsonl"
    if not path.exists():
        raise DataError(f"before '{folder}': no evaluation of items there, {path.name} is missing")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if {row["id"] for row in rows} != {item.id for item in found}:
        raise DataError(f"before '{folder}' is of other items, {len(rows)} of them; give the same `items`")
    return rows


def _metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    if "choices" in summary:
        found |= {f"choices/{rule}": each["micro"]["accuracy"] for rule, each in summary["choices"]["rules"].items()}
    if "pairs" in summary:
        found["pairs/accuracy"] = summary["pairs"]["micro"]["accuracy"]
    for name, each in summary["answers"].items():
        found |= {f"answers/{name}/{part}": value["mean"] for part, value in each["rewards"].items()}
        found |= {f"answers/{name}/commonest_5gram": each["commonest_5gram"]["share"]}
        found |= {f"answers/{name}/tokens": each["tokens"]["mean"]}
    for name, each in summary.get("duel", {}).items():
        found[f"duel/{name}/win_rate"] = each["win_rate"]
    return found


def _show(summary: Mapping[str, Any]) -> None:
    from rich.table import Table

    screen = console()
    if "choices" in summary:
        changes = {rule: McNemar(**change) for rule, change in summary["choices"].get("changes", {}).items()}
        screen.print(table(summary["choices"], "choices", changes or None))
    measures = Table("", "measure", "mean ± standard error")
    for name, each in summary["answers"].items():
        for part, value in {**each["rewards"], "tokens": each["tokens"]}.items():
            measures.add_row(name, part, f"{value['mean']:.3f} ± {value['se']:.3f}")
        measures.add_row(name, "share with the commonest 5-gram", f"{each['commonest_5gram']['share']:.3f}")
    for name, each in summary.get("duel", {}).items():
        measures.add_row(name, "win rate", f"{each['win_rate']:.3f} ({each['low']:.3f} to {each['high']:.3f})")
    if measures.row_count:
        screen.print(measures)
