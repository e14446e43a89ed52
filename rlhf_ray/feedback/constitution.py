"""Principles in plain language, and the sentences by which a model is asked to follow them.

A constitution is data: which words are used decides what is measured, so everything that is put before a model stands
in the file, none of it in code. Its SHA-256, which comments and layout do not change, goes into every artefact made
with it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from rlhf_ray.config.base import Config, readable
from rlhf_ray.errors import ConfigError

OWN = Path(__file__).with_name("constitution.yaml")
"""The one that comes with the package."""

Text = Annotated[str, Field(min_length=1)]


class Principle(Config):
    """One thing that an answer should be, asked for in three ways."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    critique: Text
    """Asks what is wrong with the last answer."""
    revision: Text
    """Asks for a better last answer."""
    comparison: Text
    """Asks which of two answers is better."""
    tags: list[str] = []
    """Such as helpful, honest, harmless, not_preachy."""
    source: str = ""
    """Where the idea comes from."""


class Example(Config):
    """A dialogue shown before the one to work on, so that the form of critiques and revisions is clear."""

    principle: Text
    """Id of the principle it follows."""
    prompt: Text
    response: Text
    critique: Text
    revision: Text


def _has(*fields: str) -> AfterValidator:
    """The template has each of these places and no other."""

    def check(template: str) -> str:
        try:
            template.format(**dict.fromkeys(fields, ""))
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"has a place that is none of {', '.join(fields)}: {error}") from None
        missing = [field for field in fields if f"{{{field}}}" not in template]
        if missing:
            raise ValueError(f"lacks {{{missing[0]}}}")
        return template

    return AfterValidator(check)


class Templates(Config):
    """What surrounds principle and answers in a comparison."""

    comparison: Annotated[str, _has("conversation", "principle", "a", "b")] = (
        "Consider this conversation:\n\n{conversation}\n\n{principle}\n\n(A) {a}\n\n(B) {b}\n\n"
        "Reply with (A) or (B) and nothing else."
    )
    reasoning: Annotated[str, _has("conversation", "principle", "a", "b")] = (
        "Consider this conversation:\n\n{conversation}\n\n{principle}\n\n(A) {a}\n\n(B) {b}\n\n"
        "First say in a few sentences how each of the two does by this principle. Do not choose yet."
    )
    """Asks for a rationale."""
    decision: Text = "So which is the better one? Reply with (A) or (B) and nothing else."
    """Asks for the choice after the rationale."""
    turn: Annotated[str, _has("role", "content")] = "{role}: {content}"
    """How a turn of the conversation is written inside a comparison."""

    def fill(self, template: str, conversation: Sequence[Mapping[str, str]], principle: str, a: str, b: str) -> str:
        """`comparison` or `reasoning` with everything in its place."""
        turns = "\n\n".join(self.turn.format(**turn) for turn in conversation)
        return template.format(conversation=turns, principle=principle, a=a, b=b)


class Constitution(Config):
    """Principles with everything that is said to a model about them."""

    name: Text
    principles: Annotated[list[Principle], Field(min_length=1)]
    examples: list[Example] = []
    """Shown before each critique and revision, in this order."""
    templates: Templates = Templates()

    @model_validator(mode="after")
    def no_principle_twice(self) -> "Constitution":
        for what, values in (
            ("id", [principle.id for principle in self.principles]),
            ("comparison", [_plain(principle.comparison) for principle in self.principles]),
            ("critique", [_plain(principle.critique) + _plain(principle.revision) for principle in self.principles]),
        ):
            twice = [place for place, value in enumerate(values) if value in values[:place]]
            if twice:
                first = self.principles[values.index(values[twice[0]])].id
                raise ValueError(f"principles '{first}' and '{self.principles[twice[0]].id}' have the same {what}")
        known = {principle.id for principle in self.principles}
        for example in self.examples:
            if example.principle not in known:
                raise ValueError(f"an example follows principle '{example.principle}', which is not among principles")
        return self

    @property
    def sha(self) -> str:
        """SHA-256 of the content, in hexadecimal."""
        content = json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    def of(self, principle: str) -> Principle:
        """The principle with this id."""
        return next(each for each in self.principles if each.id == principle)

    def only(self, names: Sequence[str]) -> "Constitution":
        """The same with the principles that `names` has by id or by tag; all of them for no names.

        Raises ConfigError for a name that is neither.
        """
        if not names:
            return self
        known = {principle.id for principle in self.principles} | {t for p in self.principles for t in p.tags}
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"constitution '{self.name}': no principle has the id or the tag '{name}'; it has "
                    f"{', '.join(sorted(known))}"
                )
        kept = [each for each in self.principles if {each.id, *each.tags} & set(names)]
        examples = [each for each in self.examples if any(each.principle == principle.id for principle in kept)]
        return self.model_copy(update={"principles": kept, "examples": examples})


def load(path: str | Path | None = None) -> Constitution:
    """The constitution at `path`, or our own. Raises ConfigError with one line for each fault.

    Besides our own form: `{prompt, edit_request}` records, as a list or by name (critique and revision requests), and
    plain sentences, as a YAML or JSON list or one a line in a .txt file.
    """
    path = Path(path or OWN)
    tree = _read(path)
    if not _is_own_form(tree):
        tree = {"name": path.stem, "principles": _principles(tree, path)}
    try:
        return Constitution.model_validate(tree)
    except ValidationError as error:
        raise readable(error, Constitution, str(path)) from None


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"constitution {path}: cannot be read: {error}") from None
    if path.suffix == ".txt":
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        return yaml.safe_load(text)  # JSON is YAML
    except yaml.YAMLError as error:
        raise ConfigError(f"constitution {path}: is neither YAML nor JSON: {' '.join(str(error).split())}") from None


def _is_own_form(tree: Any) -> bool:
    return isinstance(tree, dict) and ("principles" in tree or not all(isinstance(v, dict) for v in tree.values()))


def _principles(tree: Any, path: Path) -> list[dict[str, Any]]:
    entries = list(tree.items()) if isinstance(tree, dict) else [(f"p{n}", entry) for n, entry in enumerate(tree or [])]
    if not isinstance(tree, dict | list) or not entries:
        raise ConfigError(f"constitution {path}: expected `principles`, a list of records, or a list of sentences")
    return [_principle(str(name), entry, path) for name, entry in entries]


def _principle(name: str, entry: Any, path: Path) -> dict[str, Any]:
    if isinstance(entry, str) and entry.strip():
        return {
            "id": name,
            "critique": f"Say where your last answer falls short of this principle: {entry}",
            "revision": f"Write your last answer again so that it follows this principle: {entry}",
            "comparison": f"Which of the two answers follows this principle better: {entry}",
        }
    if isinstance(entry, dict) and {"prompt", "edit_request"} <= set(entry):
        request = str(entry["prompt"])
        return {
            "id": name,
            "critique": request,
            "revision": str(entry["edit_request"]),
            "comparison": f"Which of the two answers gives less reason for this criticism: {request}",
        }
    raise ConfigError(
        f"constitution {path}: entry '{name}' is neither a sentence nor a record with 'prompt' and 'edit_request'"
    )


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
