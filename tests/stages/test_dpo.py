"""Direct preference learning: zero at the start, the same however it is computed, and what is learnt is preferred."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from pydantic import ValidationError
from ranks import on_ranks
from safetensors.torch import load_file
from supervised_runs import settings, written
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_ray.config.common import DataConfig
from rlhf_ray.config.load import load
from rlhf_ray.config.supervised import DPOConfig
from rlhf_ray.data.order import held_out_split
from rlhf_ray.data.quarantine import Quarantine
from rlhf_ray.data.rows import JudgedAnswer, PreferencePair, judged_answers, preference_pairs
from rlhf_ray.errors import DataError
from rlhf_ray.runtime.feed import Logged, Saved, Word
from rlhf_ray.stages import dpo
from rlhf_ray.stages.dpo import Answers, Direct, Judged, Pairs, partners
from rlhf_ray.stages.supervised_rank import Job, Measured, Rank, Rows, training_tokenizer

# x is better than y, and people are seven eighths sure of it; some rows say so the other way round.
PAIRS = [
    {
        "prompt": "abc"[row % 3] * (1 + row % 4),
        "chosen": "yx"[row % 4 > 0] * (1 + row % 3),
        "rejected": "xy"[row % 4 > 0] * (1 + row % 2),
        "p": 0.875 if row % 4 > 0 else 0.125,
    }
    for row in range(40)
]
JUDGED = [
    {"prompt": "abc"[row % 3] * (1 + row % 4), "completion": "xy"[row % 2] * (1 + row % 3), "label": row % 2 == 0}
    for row in range(40)
]

SMALL: dict[str, Any] = {"max_tokens": 20, "sequences_per_step": 13, "learning_rate": 3e-3}


def config(loss: str, **changes: Any) -> DPOConfig:
    return DPOConfig.model_validate(
        {"name": "run", "model": "m", "data": {"path": "d", "max_tokens": 9}, "loss": loss, "beta": 0.5, **changes}
    )


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def given_reference(objective: Direct, reference: list[list[float]], mismatched: list[float] | None = None) -> None:
    """`reference` [rows, K], as if a model had said so; KTO's mismatched pairs have log-ratios `mismatched` [rows]."""

    def measure(measured: Measured, rows: Rows) -> Tensor:
        return torch.tensor(reference if measured is objective.answers else [[0.0]] * len(rows))[rows]

    rows = np.arange(len(reference))
    objective.before_training(rows, measure)
    if mismatched is not None:
        objective.before_losses(rows, lambda _, rows: torch.tensor(mismatched)[rows, None])


# Settings


@pytest.mark.parametrize(
    ("loss", "changes", "said"),
    [
        ("ipo", {"label_smoothing": 0.1}, "label_smoothing belongs to loss sigmoid, but loss is ipo"),
        ("kto", {"label_smoothing": 0.1}, "label_smoothing belongs to loss sigmoid, but loss is kto"),
        ("sigmoid", {"desirable_weight": 2.0}, "belong to loss kto, but loss is sigmoid"),
        ("ipo", {"undesirable_weight": 2.0}, "belong to loss kto, but loss is ipo"),
        ("sigmoid", {"label_smoothing": 0.5}, "less than 0.5"),
        ("sigmoid", {"beta": 0.0}, "greater than 0"),
    ],
)
def test_a_setting_of_another_loss_or_without_a_meaning_is_refused(
    loss: str, changes: dict[str, float], said: str
) -> None:
    with pytest.raises(ValidationError, match=said):
        config(loss, **changes)


def test_the_demos_configuration_is_a_configuration() -> None:
    assert load(DPOConfig, Path(__file__).parents[2] / "configs" / "demo" / "dpo.yaml").loss == "sigmoid"


# What is learnt


def test_an_answers_output_is_the_sum_over_its_own_tokens_and_a_rows_answers_stand_side_by_side() -> None:
    answers = Answers([ids(10, 11), ids(20)], [(ids(1, 2), ids(3)), (ids(4), ids(5, 6))])
    assert answers.lengths.tolist() == [4 + 3, 2 + 3]
    seen = []

    def engine(packed: Any) -> Any:
        seen.append(packed)
        return SimpleNamespace(logprobs=torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]))

    outputs = answers.forward(engine, np.array([1, 0]), torch.device("cpu"))
    assert seen[0].targets.tolist() == [4, 5, 6, 1, 2, 3]
    assert outputs.tolist() == [[1.0, 6.0], [24.0, 32.0]]


def two_pairs() -> list[PreferencePair]:
    return [PreferencePair(ids(1), ids(2), ids(3, 4), p=0.75), PreferencePair(ids(1), ids(2), ids(3, 4))]


def test_soft_labels_smoothing_and_the_reference_reach_the_loss_and_the_metrics() -> None:
    objective = Pairs(two_pairs(), config("sigmoid", label_smoothing=0.1))
    given_reference(objective, [[-1.0, -2.0], [-3.0, -3.0]])
    outputs, rows = torch.tensor([[2.0, -1.0], [-4.0, -3.0]]), np.array([0, 1])
    # Log-ratios 3 and 1, then -1 and 0; differences 2 and -1, times beta 1 and -0.5; labels 0.75 and 1 smoothed.
    first = 0.7 * math.log1p(math.exp(-1)) + 0.3 * math.log1p(math.exp(1))
    second = 0.9 * math.log1p(math.exp(0.5)) + 0.1 * math.log1p(math.exp(-0.5))
    torch.testing.assert_close(objective.losses(outputs, rows), torch.tensor([first, second]))
    torch.testing.assert_close(objective.losses(outputs[1:], rows[1:]), torch.tensor([second]))
    assert objective.step_metrics(outputs, rows) == pytest.approx(
        {
            "logps/chosen": -1.0,
            "logps/rejected": -2.0,
            "dpo/loss": (first + second) / 2,
            "rewards/chosen": 0.5 * (3 - 1) / 2,
            "rewards/rejected": 0.5 * (1 + 0) / 2,
            "rewards/margins": (1 - 0.5) / 2,
            "rewards/accuracies": 0.5,
            "dpo/tokens": 10.0,
        }
    )


def test_ipo_is_another_loss_on_the_same_pairs() -> None:
    objective = Pairs(two_pairs(), config("ipo"))
    given_reference(objective, [[0.0, 0.0], [0.0, 0.0]])
    # beta 0.5: h should be 1 where the label is certain; at 0.75 a quarter of the loss is (h + 1)^2.
    losses = objective.losses(torch.tensor([[2.0, -1.0], [2.0, -1.0]]), np.array([0, 1]))
    assert losses.tolist() == pytest.approx([0.75 * 4 + 0.25 * 16, 4])


def three_answers() -> list[JudgedAnswer]:
    goods = (True, False, True)
    return [JudgedAnswer(ids(row), ids(7, 8), good) for row, good in enumerate(goods)]


def test_kto_judges_answers_against_the_mean_of_the_steps_mismatched_pairs() -> None:
    objective = Judged(three_answers(), config("kto", desirable_weight=2.0))
    given_reference(objective, [[-1.0], [-1.0], [-1.0]], mismatched=[4.0, -2.0, 1.0])  # on average 1
    outputs, rows = torch.tensor([[2.0], [-2.0], [-1.0]]), np.arange(3)  # log-ratios 3, -1 and 0
    sigmoid = [1 / (1 + math.exp(0.5 * gain)) for gain in (2, 2, -1)]
    losses = [2 * sigmoid[0], sigmoid[1], 2 * sigmoid[2]]
    assert objective.losses(outputs, rows).tolist() == pytest.approx(losses)
    assert objective.held_out_metrics(outputs, rows) == pytest.approx(
        {
            "logps/chosen_held_out": 0.5,
            "logps/rejected_held_out": -2.0,
            "dpo/loss_held_out": sum(losses) / 3,
            "rewards/chosen_held_out": 0.75,
            "rewards/rejected_held_out": -0.5,
            "rewards/margins_held_out": 1.25,
            "rewards/accuracies_held_out": 2 / 3,  # the third is desirable and below the reference point
            "kto/kl_held_out": 1.0,
        }
    )


def test_a_side_that_a_step_lacks_has_no_metrics() -> None:
    objective = Judged(three_answers(), config("kto"))
    given_reference(objective, [[0.0]] * 3, mismatched=[0.0] * 3)
    metrics = objective.step_metrics(torch.zeros(1, 1), np.array([0]))
    assert "rewards/chosen" in metrics
    assert metrics.keys().isdisjoint({"rewards/rejected", "rewards/margins", "logps/rejected"})


def test_a_reference_that_was_not_noted_is_no_number() -> None:
    objective = Pairs(two_pairs(), config("sigmoid"))
    assert objective.losses(torch.zeros(2, 2), np.array([0, 1])).isnan().all()


# Whose answer a prompt is mismatched with


@some.composite
def prompt_lists(draw: Any) -> list[int]:
    """Numbers of prompts, none of which has more than half of the rows."""
    numbers = draw(some.lists(some.integers(0, 5), min_size=2, max_size=30))
    return (
        numbers if 2 * max(map(numbers.count, numbers)) <= len(numbers) else [*range(10, 10 + len(numbers)), *numbers]
    )


@given(prompt_lists(), some.integers(0, 5))
def test_every_answer_is_mismatched_once_and_never_with_its_own_prompt(numbers: Sequence[int], seed: int) -> None:
    # Ids that end in zero bytes differ in length alone.
    found = partners(
        [ids(*[1, 0, 0, 0, 0, 0][: 1 + number]) if number < 6 else ids(number) for number in numbers], seed
    )
    assert sorted(found.tolist()) == list(range(len(numbers)))
    assert all(numbers[row] != numbers[partner] for row, partner in enumerate(found))


def test_mismatched_pairs_depend_on_the_seed_alone() -> None:
    prompts = [ids(number) for number in range(50)]
    assert partners(prompts, 3).tolist() == partners(prompts, 3).tolist() != partners(prompts, 4).tolist()


def test_answers_to_one_prompt_alone_have_no_mismatch() -> None:
    with pytest.raises(DataError, match=r"loss kto .* one prompt has 2 of the 3 rows"):
        partners([ids(1), ids(2), ids(1)], 0)


def test_a_mismatched_answer_is_cut_where_its_prompt_leaves_no_room() -> None:
    long, short = JudgedAnswer(ids(*range(6)), ids(50), True), JudgedAnswer(ids(9), ids(*range(60, 67)), False)
    objective = Judged(
        [long, short], config("kto")
    )  # of 7 and 8 tokens; the longer prompt and answer have 13, and 9 are allowed
    assert objective.mismatched.sequences[0].tolist() == [*range(6), 60, 61, 62]
    assert objective.mismatched.sequences[1].tolist() == [9, 50]
    assert (objective.longest_sequence, objective.longest_row) == (9, 9)


# The gradient does not depend on who computes it


def steps_of(rank: int, world: int, told: dict[str, Any]) -> list[Word]:
    """The words of rank 0 over a whole training, without Ray."""
    config = DPOConfig.model_validate(told)
    tokens = training_tokenizer(config)
    objective: Direct
    if config.loss == "kto":
        objective = Judged(judged_answers(config.data, tokens, Quarantine()), config)
    else:
        objective = Pairs(preference_pairs(config.data, tokens, Quarantine()), config)
    words: list[Word] = []

    def tell(word: Word) -> bool:
        words.append(word)
        return False

    job = Job(config, objective, np.arange(31), np.arange(31, 40), str(Path(config.output_dir) / f"{world}"))
    Rank(job, rank, world, tell).train()
    return words


def logged(words: list[Word]) -> list[dict[str, float]]:
    return [word.metrics for word in words if isinstance(word, Logged)]


def weights(words: list[Word]) -> dict[str, Tensor]:
    return load_file(Path(next(word.path for word in words if isinstance(word, Saved))) / "model.safetensors")


@pytest.mark.real
@pytest.mark.parametrize(("loss", "stage"), [("sigmoid", 2), ("kto", 3)])
def test_ranks_and_micro_batches_change_no_metric_and_no_weight(
    loss: str, stage: int, policy: str, tmp_path: Path
) -> None:
    # Undesirable answers that weigh little let the reference point rise above zero, where it counts.
    rows, changes = (JUDGED, {"undesirable_weight": 0.1}) if loss == "kto" else (PAIRS, {})
    large = settings(policy, written(rows, tmp_path / "rows.jsonl"), tmp_path, **SMALL, loss=loss, **changes)
    large["training"]["epochs"] = 2
    one_large = on_ranks(1, steps_of, 1, large)[0]
    small = {**large["training"], "tokens_per_micro_batch": 24, "zero": {"stage": stage}}
    two_small = on_ranks(2, steps_of, 2, {**large, "training": small})[0]

    found, expected = logged(two_small), logged(one_large)
    assert len(found) == len(expected) == 1 + math.ceil(2 * 31 / 13)
    for ours, theirs in zip(found, expected, strict=True):
        kept = [name for name in ours if name != "time/step"]
        assert [ours[name] for name in kept] == pytest.approx([theirs[name] for name in kept], rel=2e-3, abs=1e-4)
    theirs = weights(one_large)
    for name, weight in weights(two_small).items():
        torch.testing.assert_close(weight, theirs[name], atol=2e-3, rtol=1e-3, msg=name)
    if loss == "kto":
        assert expected[-1]["kto/kl"] > 0.1


# With real workers


def log_ratio(policy: Any, reference: Any, prompt: np.ndarray, answer: np.ndarray) -> float:
    """By transformers alone."""
    sequence = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))
    total = 0.0
    for model, sign in ((policy, 1), (reference, -1)):
        with torch.no_grad():
            logprobs = model(sequence[None]).logits[0, :-1].log_softmax(-1)
        total += sign * logprobs.gather(1, sequence[1:, None])[len(prompt) - 1 :].sum().item()
    return total


@pytest.mark.real
def test_dpo_starts_at_its_reference_and_learns_to_prefer_what_people_do(
    ray_session: None, policy: str, tmp_path: Path
) -> None:
    bad = {"prompt": "a", "chosen": "x"}
    data = written([PAIRS[0], bad, *PAIRS[1:]], tmp_path / "rows.jsonl")
    told = settings(policy, data, tmp_path, **SMALL)
    told["data"]["max_bad_share"] = 0.1
    summary = dpo.run(DPOConfig.model_validate(told))

    run = tmp_path / "runs" / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    start = lines[0]
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert start[f"{name}_held_out"] == 0
    assert start["dpo/loss_held_out"] == pytest.approx(math.log(2), rel=1e-6)
    assert start["rewards/accuracies_held_out"] == 0.5
    assert lines[1]["rewards/margins"] == pytest.approx(0, abs=1e-5)  # measured before the first step was taken
    assert lines[1]["dpo/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert summary["held_out_last"]["rewards/accuracies"] == 1.0
    [entry] = map(json.loads, (run / "quarantine.jsonl").read_text().splitlines())
    assert (entry["file"], entry["line"]) == (data, 2)
    assert entry["reason"].startswith("missing column: no 'rejected'")

    trained, untrained = (AutoModelForCausalLM.from_pretrained(folder) for folder in (summary["model"], policy))
    pairs = preference_pairs(
        DataConfig(path=data, max_bad_share=0.1), AutoTokenizer.from_pretrained(policy), Quarantine()
    )
    _, held_out = held_out_split(len(pairs), 0.2, 0)
    chosen, rejected = (
        np.array([log_ratio(trained, untrained, pairs[row].prompt, getattr(pairs[row], side)) for row in held_out])
        for side in ("chosen", "rejected")
    )
    measured = lines[-1]
    assert measured["rewards/chosen_held_out"] == pytest.approx(0.1 * chosen.mean(), abs=1e-4)
    assert measured["rewards/rejected_held_out"] == pytest.approx(0.1 * rejected.mean(), abs=1e-4)
    assert summary["held_out_last"]["rewards/chosen"] == measured["rewards/chosen_held_out"]


@pytest.mark.real
def test_kto_learns_from_answers_that_were_judged_one_by_one(ray_session: None, policy: str, tmp_path: Path) -> None:
    told = settings(policy, written(JUDGED, tmp_path / "rows.jsonl"), tmp_path, **SMALL, loss="kto")
    summary = dpo.run(DPOConfig.model_validate(told))
    first, last = summary["held_out_first"], summary["held_out_last"]
    assert (first["dpo/loss"], first["rewards/margins"], first["kto/kl"]) == (0.5, 0, 0)
    assert last["dpo/loss"] < 0.45 and last["rewards/margins"] > 0.5 and last["rewards/accuracies"] > 0.9
    assert last["kto/kl"] >= 0
