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
from rlhf_ray.data import columns
from rlhf_ray.data.columns import Fields, Turns
from rlhf_ray.data.quarantine import BadRow, Quarantine
from rlhf_ray.data.reading import Row, read_rows

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
    category = columns.text(fields.get("category", _named_by(Path(row.file))), "'category'", "text")
    if "targets" in fields:
        column, choices, correct = "input", *_labelled(fields["targets"])
    elif "corrects" in fields or "incorrects" in fields:
        right, wrong = (_texts(fields.get(column), f"'{column}'") for column in ("corrects", "incorrects"))
        column, choices, correct = "prompt", (*right, *wrong), list(range(len(right)))
    elif "good" in fields or "bad" in fields:
        column, choices, correct = "prompt", *_ordered(fields)
    else:
        raise BadRow("missing column", f"none of targets, corrects and good; the row has {', '.join(fields) or 'none'}")
    if len(set(choices)) < len(choices):
        raise BadRow("identical", "two of the answers are the same")
    if not 0 < len(correct) < len(choices):
        raise BadRow("nothing to choose", f"{len(correct)} of {len(choices)} answers are right")
    given = fields.get("id")
    name = given if isinstance(given, str) else f"{category}-{row.line if given is None else given}"
    return Item(name, category, _prompt(fields, column), choices, frozenset(correct))


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
    good, bad = (columns.text(fields.get(column), f"'{column}'", "text") for column in ("good", "bad"))
    if fields.get("a") not in ("good", "bad"):
        raise BadRow("wrong value", f"'a' is {fields.get('a')!r}, expected which answer stands first, good or bad")
    return ((good, bad), [0]) if fields["a"] == "good" else ((bad, good), [1])


def _prompt(fields: Fields, column: str) -> Turns:
    columns.require(fields, column)
    turns = columns.turns(fields, column)
    if not isinstance(turns, str) and turns[-1]["role"] != "user":
        raise BadRow("wrong value", f"'{column}' ends with the {turns[-1]['role']}'s turn, expected the user's")
    return turns


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise BadRow("wrong type", f"{where} is {type(value).__name__}, expected a list of texts")
    return tuple(columns.text(text, f"{where}[{place}]", "text") for place, text in enumerate(value))
