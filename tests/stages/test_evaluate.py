"""The examination with real engines and tiny models, against plain forward passes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_ray.config.evaluation import EvaluateConfig
from rlhf_ray.data.templates import answer_ids, prompt_ids
from rlhf_ray.errors import ConfigError, DataError, ModelError, RewardError
from rlhf_ray.models import load
from rlhf_ray.stages import evaluate

ANSWERS = [
    ("why", "so it is", "no"),
    ("what now", "wait", "run away"),
    ("tell me", "yes", "never"),
    ("how", "go on", "stop it now"),
]
ITEMS = [
    {
        "id": f"i{n}",
        "category": ("x", "y")[n % 2],
        "prompt": prompt,
        "good": good,
        "bad": bad,
        "a": ("good", "bad")[n // 2],
    }
    for n, (prompt, good, bad) in enumerate(ANSWERS)
]
PAIRS = [
    {"prompt": "why", "chosen": "because", "rejected": "no", "subset": "s"},
    {"prompt": "what", "chosen": "that", "rejected": "nothing at all", "subset": "t"},
]
PROMPTS = ["good day", "what is it", "why", "tell me more"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, reward_model: str) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    for name, rows in (("items", ITEMS), ("pairs", PAIRS), ("prompts", [{"prompt": prompt} for prompt in PROMPTS])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny.write_judge(folder / "opponent", seed=5)
    return folder


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory, policy: str) -> str:
    """It reads the ids that the policy writes."""
    folder = tiny.write_reward_model(tmp_path_factory.mktemp("judging"))
    load.tokenizer(policy, "policy").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_judge(tmp_path_factory.mktemp("examined"))


def config_of(files: Path, policy: str, reward_model: str, name: str, **changes: Any) -> EvaluateConfig:
    served = {"max_tokens": 256, "max_new_tokens": 24, "cpus": 0.5}
    settings: dict[str, Any] = {
        "name": name,
        "output_dir": str(files / "runs"),
        "policy": {"model": policy, **served},
        "items": str(files / "items.jsonl"),
        "reference": str(files / "opponent"),
        "reward": {"model": reward_model},
        "pairs": str(files / "pairs.jsonl"),
        "answers": {
            "plain": {
                "path": str(files / "prompts.jsonl"),
                "rewards": {"length": {"function": "tests.stages.measures:length"}, "learned": {"model": reward_model}},
                "duel": True,
            }
        },
        "duel": {"opponent": str(files / "opponent"), "judge": {"model": policy, **served, "max_tokens": 256}},
        "telemetry": {"wandb": "off"},
    }
    settings["duel"]["constitution"] = str(files / "short.json")
    (files / "short.json").write_text(json.dumps(SHORT))
    settings["constitution"] = settings["duel"]["constitution"]
    settings["question"] = "which"
    return EvaluateConfig.model_validate({**settings, **changes})


SHORT = {
    "name": "short",
    "principles": [{"id": "p", "critique": "bad", "revision": "new", "comparison": "which"}],
    "templates": {
        "comparison": "{conversation} {principle} (A) {a} (B) {b}",
        "reasoning": "{conversation} {principle} (A) {a} (B) {b} why",
        "turn": "{role} {content}",
    },
}


@pytest.fixture(scope="module")
def found(files: Path, policy: str, reward_model: str, ray_session: None) -> dict[str, Any]:
    earlier = files / "earlier"
    earlier.mkdir()
    wrong = [{"id": item["id"], "category": item["category"], "sum": 0.0} for item in ITEMS]
    (earlier / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wrong))
    return evaluate.run(config_of(files, policy, reward_model, "whole", before=str(earlier)))


def read(files: Path, name: str, run: str = "whole") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (files / "runs" / run / name).read_text().splitlines()]


@torch.no_grad()
def logprob(folder: str, prompt: str, answer: str) -> float:
    """Of the answer, its EOS included, by one plain forward pass."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        load.tokenizer(folder, "model"),
    )
    context, ids = prompt_ids(tokenizer, prompt), answer_ids(tokenizer, prompt, answer)
    table = model(torch.tensor([context + ids])).logits[0].log_softmax(-1)
    return float(table[len(context) - 1 : -1].gather(1, torch.tensor(ids)[:, None]).sum())


@torch.no_grad()
def reward_of(folder: str, prompt: str, answer: str) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = load.tokenizer(folder, "model")
    return float(model(torch.tensor([prompt_ids(tokenizer, prompt) + answer_ids(tokenizer, prompt, answer)])).logits)


@pytest.mark.real
def test_choices_are_those_of_plain_forward_passes(
    found: dict[str, Any], files: Path, policy: str, reward_model: str
) -> None:
    rows = read(files, "items.jsonl")
    assert [row["id"] for row in rows] == [item["id"] for item in ITEMS]
    opponent = str(files / "opponent")
    for row, item in zip(rows, ITEMS, strict=True):
        good, bad = [logprob(policy, item["prompt"], item[side]) for side in ("good", "bad")]
        other_good, other_bad = [logprob(opponent, item["prompt"], item[side]) for side in ("good", "bad")]
        assert row["sum"] == float(good > bad)
        assert row["implicit"] == float(good - other_good > bad - other_bad)
        assert row["pmi"] == float(good - logprob(policy, "?", item["good"]) > bad - logprob(policy, "?", item["bad"]))
        scores = [reward_of(reward_model, item["prompt"], item[side]) for side in ("good", "bad")]
        assert row["reward"] == float(scores[0] > scores[1])
        assert row["longer"] == float(len(item["good"]) > len(item["bad"]))
        assert row["random"] == 0.5
        assert row["letters"] in (0.0, 0.5, 1.0)
    rules = found["choices"]["rules"]
    assert rules["sum"]["micro"]["accuracy"] == np.mean([row["sum"] for row in rows])
    assert {"random", "longer", "shorter", "letters", "token_mean", "byte_mean"} < set(rules)


@pytest.mark.real
def test_pairs_are_judged_by_the_reward(found: dict[str, Any], reward_model: str) -> None:
    right = [
        float(reward_of(reward_model, p["prompt"], p["chosen"]) > reward_of(reward_model, p["prompt"], p["rejected"]))
        for p in PAIRS
    ]
    assert found["pairs"]["micro"]["accuracy"] == np.mean(right)
    assert found["pairs"]["categories"]["s"]["accuracy"] == right[0]


@pytest.mark.real
def test_answers_are_described_by_each_measure(found: dict[str, Any], files: Path) -> None:
    rows, described = read(files, "answers-plain.jsonl"), found["answers"]["plain"]
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["length"] for row in rows] == [len(row["response"]) for row in rows]
    assert described["rewards"]["length"]["mean"] == pytest.approx(np.mean([row["length"] for row in rows]))
    assert described["rewards"]["learned"]["se"] == pytest.approx(
        np.std([row["learned"] for row in rows], ddof=1) / 2, rel=1e-5
    )
    assert described["eos_rate"] == np.mean([row["finish"] == "eos" for row in rows])


@pytest.mark.real
def test_every_pair_of_answers_is_fought_in_both_orders(found: dict[str, Any]) -> None:
    duel = found["duel"]["plain"]
    assert duel["wins"] + duel["ties"] + duel["losses"] == len(PROMPTS) - duel["failed"]
    assert duel["failed"] == 0


@pytest.mark.real
def test_what_was_judged_in_a_duel_can_be_looked_up(found: dict[str, Any], files: Path) -> None:
    rows, answers = read(files, "duel-plain.jsonl"), read(files, "answers-plain.jsonl")
    assert [row["responses"][0]["text"] for row in rows] == [row["response"] for row in answers]
    both = [[question["p"] for question in row["pairs"][0]["questions"]] for row in rows if row["pairs"]]
    assert sum(min(p) > 0.5 for p in both) == found["duel"]["plain"]["wins"]
    assert sum(max(p) < 0.5 for p in both) == found["duel"]["plain"]["losses"]


@pytest.mark.real
def test_a_late_failure_leaves_what_was_measured_before_it(
    files: Path, policy: str, reward_model: str, ray_session: None
) -> None:
    answers = {
        name: {"path": str(files / "prompts.jsonl"), "rewards": {name: {"function": f"tests.stages.measures:{name}"}}}
        for name in ("length", "broken")
    }
    alone = {"reference": None, "reward": None, "pairs": None, "duel": None}
    config = config_of(files, policy, reward_model, "late", answers=answers, **alone)
    with pytest.raises(RewardError, match="no measure"):
        evaluate.run(config)

    folder = files / "runs/late"
    assert not (folder / "summary.json").exists()
    kept = json.loads((folder / "unfinished.json").read_text())
    assert {"sum", "pmi", "letters"} < set(kept["choices"]["rules"]) < set(read(files, "items.jsonl", "late")[0])
    assert kept["answers"]["broken"]["responses"] == len(PROMPTS)
    assert [row["prompt"] for row in read(files, "answers-broken.jsonl", "late")] == PROMPTS
    lengths = [row["length"] for row in read(files, "answers-length.jsonl", "late")]
    assert kept["answers"]["length"]["rewards"]["length"]["mean"] == pytest.approx(np.mean(lengths))
    with pytest.raises(ConfigError, match="already holds a run"):
        evaluate.run(config)


@pytest.mark.real
def test_what_changed_since_an_earlier_evaluation_is_told_for_rules_that_both_have(
    found: dict[str, Any], files: Path
) -> None:
    right = sum(row["sum"] for row in read(files, "items.jsonl"))
    assert found["choices"]["changes"]["sum"]["better"] == right > 0
    assert found["choices"]["changes"]["sum"]["worse"] == 0
    assert set(found["choices"]["changes"]) == {"sum"}


def test_other_items_than_before_are_refused(files: Path, policy: str, reward_model: str, tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text('{"id": "other"}\n')
    config = config_of(files, policy, reward_model, "other", before=str(tmp_path))
    with pytest.raises(DataError, match="is of other items"):
        evaluate.run(config)


def test_a_reward_model_that_reads_other_ids_than_the_policy_writes_is_refused(
    files: Path, policy: str, reward_model: str, tmp_path: Path
) -> None:
    other = tiny.write_reward_model(tmp_path / "other")  # its tokenizer has no letters for the options
    answers = {"plain": {"path": str(files / "prompts.jsonl"), "rewards": {"x": {"model": other}}}}
    with pytest.raises(ModelError, match="policy and reward model exchange token ids"):
        evaluate.run(config_of(files, policy, reward_model, "ids", answers=answers, duel=None))


def test_a_measure_that_cannot_be_imported_is_refused_before_a_model_is_loaded(
    files: Path, policy: str, reward_model: str
) -> None:
    answers = {"plain": {"path": str(files / "prompts.jsonl"), "rewards": {"x": {"function": "no.such:thing"}}}}
    with pytest.raises(RewardError, match=r"cannot import 'no\.such'"):
        evaluate.run(config_of(files, policy, reward_model, "measure", answers=answers, duel=None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"items": None, "pairs": None, "answers": {}, "duel": None}, "nothing to evaluate"),
        ({"reward": None}, "pairs are scored by reward"),
        ({"duel": None}, "such a section needs duel"),
        ({"device": "gpu"}, "device is gpu, but policy.gpus is 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    files: Path, policy: str, reward_model: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(files, policy, reward_model, "wrong", **changes)
