import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import mean

import pytest

from rlhf_ray.demo import gold
from rlhf_ray.demo.language import PROMPTS, SENTENCES, TOPICS, sentences
from rlhf_ray.demo.people import preference_rows
from rlhf_ray.demo.world import Sizes, World

SMALL = Sizes(corpus=30, sft=20, preferences=20, prompts_train=24, prompts_held_out=12)


def test_same_seed_writes_the_same_files_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        World(seed).write(tmp_path / name, SMALL)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["corpus.jsonl", "preferences.jsonl", "prompts_held_out.jsonl", "prompts_train.jsonl", "sft.jsonl"]
    for name in files:
        a, b, c = ((tmp_path / folder / name).read_text() for folder in "abc")
        assert a == b != c
        assert len(a.splitlines()) == getattr(SMALL, name.removesuffix(".jsonl"))


def test_rows_have_the_columns_that_loaders_read(tmp_path: Path) -> None:
    World(0).write(tmp_path, SMALL)
    for name, columns in {
        "corpus": {"messages"},
        "sft": {"messages"},
        "preferences": {"prompt", "chosen", "rejected", "kind"},
        "prompts_train": {"prompt", "kind"},
        "prompts_held_out": {"prompt", "kind"},
    }.items():
        for line in (tmp_path / f"{name}.jsonl").read_text().splitlines():
            assert set(json.loads(line)) == columns


def test_turns_alternate_and_none_is_empty() -> None:
    for row in World(0).corpus(300):
        roles = [turn["role"] for turn in row["messages"]]
        assert roles[0] == "user" and roles[-1] == "assistant"
        assert all(a != b for a, b in pairwise(roles))
        assert all(turn["content"].strip() for turn in row["messages"])


def test_no_held_out_prompt_occurs_in_anything_that_is_trained_on() -> None:
    world = World(1)
    held_out = {row["prompt"] for row in world.prompts(256, "held_out")}
    trained_on = {row["prompt"] for row in [*world.prompts(1000), *preference_rows(world, 1000)]}
    for row in [*world.corpus(3000), *world.sft_rows(1000)]:
        trained_on |= {turn["content"] for turn in row["messages"] if turn["role"] == "user"}
    assert len(held_out) == 256
    assert not held_out & trained_on


def test_prompts_differ_and_come_in_their_shares() -> None:
    rows = World(0).prompts(260, "held_out")
    assert len({row["prompt"] for row in rows}) == 260
    assert Counter(row["kind"] for row in rows) == {"benign": 140, "honesty": 60, "decline": 60}


def test_more_prompts_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="10000 different held_out prompts"):
        World(0).prompts(10_000, "held_out")


def test_more_rows_of_one_file_change_no_other() -> None:
    world = World(0)
    before = world.sft_rows(50)
    world.corpus(10)
    assert world.sft_rows(50) == before


def test_demonstrations_mix_every_quality_for_every_kind() -> None:
    scores: dict[str, list[float]] = {"benign": [], "honesty": [], "decline": []}
    for row in World(0).sft_rows(2000):
        prompt, answer = (turn["content"] for turn in row["messages"])
        scores[PROMPTS[prompt].kind].append(gold.score(prompt, answer))
    for kind in scores.values():
        assert mean(kind) < 0.5  # the best is 1
        assert {round(score, 2) for score in kind} >= {1.0, -0.1, -1.35}  # right, evasive, broken


def test_only_broken_answers_mean_nothing() -> None:
    """The generator and the judge speak one language; about 4% is broken, and that is on purpose."""
    rows = World(0).sft_rows(2000)
    odd = [row for row in rows if any(text not in SENTENCES for text in sentences(row["messages"][1]["content"]))]
    assert 0 < len(odd) < 0.06 * len(rows)


def test_common_mistakes_are_mistakes() -> None:
    for topic in TOPICS.values():
        for subject, value in topic.facts.items():
            assert topic.mistake(subject) != value
            assert topic.mistake(subject) in topic.values
