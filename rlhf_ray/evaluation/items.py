"""Prompts with answers of which somebody has said which are right: what a model is examined with.

Three forms of rows are read, told apart by their columns: ours (`prompt`, `good`, `bad`, `a`), the public one of the
HHH evaluation (`input`, `targets` of `choices` and `labels`; Askell et al. 2021), and lists of answers (`prompt`,
`corrects`, `incorrects`). A row is one item however many answers it has, because an interval counts items that say
something of their own. For the same reason an item that stands in the data twice is set aside the second time.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.config.common import DataConfig
from rlhf_ray.data.quarantine import BadRow, Quarantine
from rlhf_ray.data.reading import Row, read_rows
from rlhf_ray.data.rows import Turns
from rlhf_ray.data.templates import split_dialogue

OWN = Path(__file__).with_name("hhh.jsonl")
"""160 items that come with the package; docs/hhh-items.md."""


@dataclass(frozen=True)
class Item:
    """One question of an examination."""

    id: str
    category: str
    prompt: Turns
    """Text, or turns that end with the user's."""
    choices: tuple[str, ...]
    """At least two, in the order in which they are shown as (A), (B), and so on."""
    correct: frozenset[int]
    """Places among the choices; neither none nor all of them."""


def items(data: DataConfig, quarantine: Quarantine) -> list[Item]:
    """All items of `data.path`. Raises DataError if too few rows are usable.

    A row's category is its `category`, or else the name of its file, of which the public set has one for each. Nothing
    is tokenised, so `data.max_tokens` bounds nothing.
    """
    found: list[Item] = []
    ids: dict[str, str] = {}
    contents: dict[tuple[str, frozenset[str]], str] = {}
    for row in read_rows(data, quarantine):
        place = f"{row.file}:{row.line}"
        try:
            item = _item(row)
            first = ids.get(item.id) or contents.get(_content(item))
            if first:
                raise BadRow("duplicate", f"the id '{item.id}', or the prompt with these answers, stands in {first}")
        except BadRow as fault:
            quarantine.add(row.file, row.line, str(fault), repr(row.fields))
            continue
        ids[item.id] = contents[_content(item)] = place
        found.append(item)
    quarantine.check(len(found) + quarantine.total, data.max_bad_share, f"data.path '{data.path}'")
    return found


def _content(item: Item) -> tuple[str, frozenset[str]]:
    """What makes two items the same, however it is spaced and in whichever order the answers stand."""
    return " ".join(str(item.prompt).split()).lower(), frozenset(item.choices)


def _item(row: Row) -> Item:
    fields = {name: value for name, value in row.fields.items() if value is not None}
    category = _text(fields.get("category", _named_by(Path(row.file))), "'category'")
    if "targets" in fields:
        prompt, choices, correct = fields.get("input"), *_labelled(fields["targets"])
    elif "corrects" in fields or "incorrects" in fields:
        right, wrong = (_texts(fields.get(column), f"'{column}'") for column in ("corrects", "incorrects"))
        prompt, choices, correct = fields.get("prompt"), (*right, *wrong), list(range(len(right)))
    elif "good" in fields or "bad" in fields:
        prompt, choices, correct = fields.get("prompt"), *_ordered(fields)
    else:
        raise BadRow("missing column", f"none of targets, corrects and good; the row has {', '.join(fields) or 'none'}")
    if len(set(choices)) < len(choices):
        raise BadRow("identical", "two of the answers are the same")
    if not 0 < len(correct) < len(choices):
        raise BadRow("nothing to choose", f"{len(correct)} of {len(choices)} answers are right")
    given = fields.get("id")
    name = given if isinstance(given, str) else f"{category}-{row.line if given is None else given}"
    return Item(name, category, _prompt(prompt), choices, frozenset(correct))


def _named_by(file: Path) -> str:
    """helpful.jsonl, or helpful/task.json as the public set has it."""
    return file.parent.name if file.stem == "task" else file.name.partition(".")[0]


def _labelled(targets: Any) -> tuple[tuple[str, ...], list[int]]:
    if not isinstance(targets, dict):
        raise BadRow("wrong type", f"'targets' is {type(targets).__name__}, expected 'choices' and 'labels'")
    choices, labels = _texts(targets.get("choices"), "'targets.choices'"), targets.get("labels")
    if not isinstance(labels, list) or len(labels) != len(choices) or any(label not in (0, 1) for label in labels):
        raise BadRow("wrong value", f"'targets.labels' is {labels!r}, expected {len(choices)} labels of 0 or 1")
    return choices, [place for place, label in enumerate(labels) if label]


def _ordered(fields: dict[str, Any]) -> tuple[tuple[str, ...], list[int]]:
    good, bad = (_text(fields.get(column), f"'{column}'") for column in ("good", "bad"))
    if fields.get("a") not in ("good", "bad"):
        raise BadRow("wrong value", f"'a' is {fields.get('a')!r}, expected which answer stands first, good or bad")
    return ((good, bad), [0]) if fields["a"] == "good" else ((bad, good), [1])


def _prompt(value: Any) -> Turns:
    if not isinstance(value, list):
        text = _text(value, "the prompt")
        return split_dialogue(text) if text.startswith("\n\nHuman:") else text
    turns = [turn if isinstance(turn, dict) else {} for turn in value]
    if not turns or turns[-1].get("role") != "user":
        raise BadRow("wrong value", "the prompt is a list, expected messages of 'role' and 'content', the user's last")
    return [
        {
            "role": _text(turn.get("role"), f"prompt[{place}].role"),
            "content": _text(turn.get("content"), f"prompt[{place}]"),
        }
        for place, turn in enumerate(turns)
    ]


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise BadRow("wrong type", f"{where} is {type(value).__name__}, expected a list of texts")
    return tuple(_text(text, f"{where}[{place}]") for place, text in enumerate(value))


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{where} is {type(value).__name__}, expected text")
    if not value.strip():
        raise BadRow("empty", f"{where} has no text")
    return value
