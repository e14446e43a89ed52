import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification

from rlhf_ray.actors.reward import RewardModel
from rlhf_ray.config.common import DataConfig
from rlhf_ray.data.quarantine import Quarantine
from rlhf_ray.data.rows import BenchmarkPair, PreferencePair, benchmark_pairs
from rlhf_ray.errors import RewardError
from rlhf_ray.evaluation.reward_bench import by_reward, evaluate


def pairs(*subsets: str) -> list[BenchmarkPair]:
    ids = [np.array([token], np.int32) for token in (7, 8, 9)]
    return [BenchmarkPair(PreferencePair(*ids), subset) for subset in subsets]


def fixed(*scores: tuple[float, float]) -> Callable[[Sequence[PreferencePair]], np.ndarray]:
    return lambda _: np.array(scores)


def test_accuracies_and_both_averages_by_hand() -> None:
    # chat: right, tie; safety: wrong, right, right, right.
    found = evaluate(
        pairs("chat", "safety", "chat", "safety", "safety", "safety"),
        fixed((2, 1), (0, 1), (3, 3), (5, -5), (1, 0.5), (0.1, 0)),
    )
    assert found.right.tolist() == [1, 0, 0.5, 1, 1, 1]
    chat, safety = found.categories["chat"], found.categories["safety"]
    assert (chat.right, chat.items, chat.accuracy) == (1.5, 2, 0.75)
    assert (safety.right, safety.items, safety.accuracy) == (3, 4, 0.75)
    assert found.micro.accuracy == 0.75 and found.macro == 0.75
    # Wilson's interval of 3 of 4, from a table: (0.3006, 0.9544).
    assert (safety.low, safety.high) == (pytest.approx(0.3006, abs=1e-4), pytest.approx(0.9544, abs=1e-4))
    assert json.loads(json.dumps(found.summary()))["categories"]["chat"]["accuracy"] == 0.75


def test_a_large_subset_weighs_more_in_the_micro_average_and_not_in_the_macro() -> None:
    found = evaluate(pairs("a", "a", "a", "b"), fixed((1, 0), (1, 0), (1, 0), (0, 1)))
    assert (found.micro.accuracy, found.macro) == (0.75, 0.5)


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9), st.sampled_from("abc")), min_size=1, max_size=30))
def test_a_scorer_and_its_negative_are_right_on_all_pairs_together(rows: list[tuple[int, int, str]]) -> None:
    some = pairs(*(subset for *_, subset in rows))
    scores = np.array([row[:2] for row in rows], np.float64)
    here, there = evaluate(some, lambda _: scores), evaluate(some, lambda _: -scores)
    assert here.micro.accuracy + there.micro.accuracy == pytest.approx(1)
    assert here.macro + there.macro == pytest.approx(1)
    assert evaluate(some, lambda _: 3 * scores + 1).right.tolist() == here.right.tolist()
    for accuracy in [here.micro, *here.categories.values()]:
        assert 0 <= accuracy.low <= accuracy.accuracy <= accuracy.high <= 1


def test_scores_that_are_missing_or_not_finite_are_errors() -> None:
    with pytest.raises(RewardError, match=r"expected scores of shape \(2, 2\).*got \(1, 2\)"):
        evaluate(pairs("a", "a"), fixed((1, 0)))
    with pytest.raises(RewardError, match=r"pair 1 of 2 \(subset 'b'\) scores \[nan, 0.0\]"):
        evaluate(pairs("a", "b"), fixed((1, 0), (np.nan, 0)))


def test_rows_know_their_subset_and_one_without_is_quarantined(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c", "subset": "chat", "id": 7},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "bb", "rejected": "c", "subset": "safety"},
        {"prompt": "a", "chosen": "bb", "rejected": "c", "subset": 3},
    ]
    path = tmp_path / "bench.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    found = benchmark_pairs(DataConfig(path=str(path), max_bad_share=0.5), tiny.tokenizer(), quarantine)
    assert [(each.subset, each.id) for each in found] == [("chat", "7"), ("safety", "")]
    reasons = [json.loads(line) for line in quarantine.path.read_text().splitlines()]  # type: ignore[union-attr]
    assert [(entry["line"], entry["reason"].partition(":")[0]) for entry in reasons] == [
        (2, "missing column"),
        (4, "wrong type"),
    ]


def test_a_reward_model_scores_prompts_with_their_own_answers(reward_model: str) -> None:
    tokens = [np.array(ids, np.int32) for ids in ([7, 8], [9, 10, 1], [11], [12], [13, 1], [14, 15, 1])]
    some = [PreferencePair(*tokens[:3]), PreferencePair(*tokens[3:])]
    scores = by_reward(RewardModel(reward_model, 16, "cpu", False))(some)
    model = AutoModelForSequenceClassification.from_pretrained(reward_model)
    for pair, row in zip(some, scores, strict=True):
        for answer, score in zip((pair.chosen, pair.rejected), row, strict=True):
            ids = torch.from_numpy(np.concatenate([pair.prompt, answer]).astype(np.int64))
            with torch.no_grad():
                assert score == pytest.approx(model(ids[None]).logits.item(), abs=1e-4)
