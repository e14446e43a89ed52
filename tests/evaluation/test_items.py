import json
from pathlib import Path

import pytest

from rlhf_ray.config.common import DataConfig
from rlhf_ray.data.quarantine import Quarantine
from rlhf_ray.errors import DataError
from rlhf_ray.evaluation.items import Item, items

OURS = {"id": "one", "category": "helpful", "prompt": "Why?", "good": "Because.", "bad": "Hm.", "a": "bad"}
PUBLIC = {"input": "Why?", "targets": {"choices": ["Hm.", "Because."], "labels": [0, 1]}}
LISTS = {"prompt": "Why?", "corrects": ["Because.", "So."], "incorrects": ["Hm."]}


def read(folder: Path, *rows: object, name: str = "helpful.jsonl", quarantine: Quarantine | None = None) -> list[Item]:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return items(DataConfig(path=str(path), max_bad_share=0.9), quarantine or Quarantine())


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (OURS, Item("one", "helpful", "Why?", ("Hm.", "Because."), frozenset({1}))),
        ({**OURS, "a": "good"}, Item("one", "helpful", "Why?", ("Because.", "Hm."), frozenset({0}))),
        (PUBLIC, Item("helpful-1", "helpful", "Why?", ("Hm.", "Because."), frozenset({1}))),
        (
            {**PUBLIC, "id": 7, "category": "honest"},
            Item("honest-7", "honest", "Why?", ("Hm.", "Because."), frozenset({1})),
        ),
        (LISTS, Item("helpful-1", "helpful", "Why?", ("Because.", "So.", "Hm."), frozenset({0, 1}))),
    ],
)
def test_each_form_of_row_is_one_item(tmp_path: Path, row: dict[str, object], expected: Item) -> None:
    assert read(tmp_path, row) == [expected]


def test_the_public_file_of_a_category_is_one_object_with_examples(tmp_path: Path) -> None:
    folder = tmp_path / "harmless"
    folder.mkdir()
    (folder / "task.json").write_text(json.dumps({"examples": [PUBLIC, {**PUBLIC, "input": "How?"}]}, indent=2))
    found = items(DataConfig(path=str(folder / "task.json")), Quarantine())
    assert [(item.id, item.category) for item in found] == [("harmless-1", "harmless"), ("harmless-2", "harmless")]


@pytest.mark.parametrize(
    ("prompt", "turns"),
    [
        ("\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?", ["user", "assistant", "user"]),
        ([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}], ["system", "user"]),
    ],
)
def test_a_prompt_may_have_turns(tmp_path: Path, prompt: object, turns: list[str]) -> None:
    (item,) = read(tmp_path, {**OURS, "prompt": prompt})
    assert [turn["role"] for turn in item.prompt] == turns  # type: ignore[index]
    assert item.prompt[-1] == {"role": "user", "content": "Why?"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Why?"}, "missing column: none of targets, corrects and good; the row has prompt"),
        ({**OURS, "good": None}, "wrong type: 'good' is null, expected text"),
        ({**OURS, "bad": " "}, "empty: 'bad' has no text"),
        ({**OURS, "a": "b"}, "wrong value: 'a' is 'b', expected which answer stands first, good or bad"),
        ({**OURS, "bad": "Because."}, "identical: two of the answers are the same"),
        ({**OURS, "prompt": 3}, "wrong type: 'prompt' is int, expected text or a list of messages"),
        ({**OURS, "prompt": []}, "empty: 'prompt' has no messages"),
        (
            {**OURS, "prompt": [{"role": "assistant", "content": "a"}]},
            "wrong value: 'prompt' ends with the assistant's turn, expected the user's",
        ),
        (
            {**OURS, "prompt": [{"role": "user"}]},
            "wrong type: 'prompt'[0] is dict, expected an object with 'role' and 'content'",
        ),
        ({**PUBLIC, "input": 3}, "wrong type: 'input' is int, expected text or a list of messages"),
        ({**PUBLIC, "targets": ["a"]}, "wrong type: 'targets' is list, expected 'choices' and 'labels'"),
        ({**PUBLIC, "targets": {"choices": "ab"}}, "wrong type: 'targets.choices' is str, expected a list of texts"),
        ({**PUBLIC, "targets": {"choices": ["a", 1]}}, "wrong type: 'targets.choices'[1] is int, expected text"),
        (
            {**PUBLIC, "targets": {"choices": ["a", "b"], "labels": [1]}},
            "wrong value: 'targets.labels' is [1], expected 2 labels of 0 or 1",
        ),
        ({**PUBLIC, "targets": {"choices": ["a", "b"], "labels": [1, 2]}}, "wrong value: 'targets.labels'"),
        (
            {**PUBLIC, "targets": {"choices": ["a", "b"], "labels": [0, 0]}},
            "nothing to choose: 0 of 2 answers are right",
        ),
        ({**LISTS, "incorrects": []}, "nothing to choose: 2 of 2 answers are right"),
        ({"prompt": "Why?", "corrects": ["a"]}, "wrong type: 'incorrects' is NoneType, expected a list of texts"),
        ({**OURS, "prompt": "How?"}, "duplicate: the id 'one', or the prompt with these answers, stands in"),
        ({**OURS, "id": "two", "prompt": "why? ", "a": "good"}, "duplicate: the id 'two', or the prompt with"),
    ],
)
def test_a_bad_row_is_quarantined_with_its_reason_and_the_good_one_is_kept(
    tmp_path: Path, row: dict[str, object], reason: str
) -> None:
    quarantine = Quarantine()
    assert [item.id for item in read(tmp_path, OURS, row, quarantine=quarantine)] == ["one"]
    assert quarantine.first[0].startswith(f"{tmp_path / 'helpful.jsonl'}:2: {reason}")


def test_the_same_prompt_with_other_answers_is_another_item(tmp_path: Path) -> None:
    assert len(read(tmp_path, OURS, {**OURS, "id": "two", "bad": "Why not?"})) == 2


def test_too_many_bad_rows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(OURS) + "\n{}\n")
    with pytest.raises(DataError, match="1 of 2 rows"):
        items(DataConfig(path=str(path)), Quarantine())
