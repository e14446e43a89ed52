"""Rows into checked, tokenised examples, the four shapes that training wants.

Every row becomes an example or an entry in the quarantine; none is truncated, because an answer cut short teaches the
model to stop short. Prompts of all shapes go through `templates.prompt_ids`, so the same row has the same prompt
ids for SFT, for the reward model, for DPO and for PPO.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from sys import float_info
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.config.common import DataConfig, MixedDataConfig
from rlhf_ray.data import columns
from rlhf_ray.data.columns import Fields, Turns
from rlhf_ray.data.quarantine import BadRow, Quarantine
from rlhf_ray.data.reading import read_rows
from rlhf_ray.data.templates import answer_ids, chat_ids_and_mask, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Int32 = NDArray[np.int32]
Example = TypeVar("Example")
AnyData = DataConfig | MixedDataConfig


@dataclass(frozen=True)
class SFTExample:
    """A dialogue to imitate."""

    ids: Int32
    """[T], EOS last."""
    loss_mask: NDArray[np.bool_]
    """[T], True on tokens to learn: answers and their EOS."""
    source: str = ""
    """Name of the source it came from; empty where there is only one."""


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt, of which people prefer the first."""

    prompt: Int32
    """[P]"""
    chosen: Int32
    """[C] ids after the prompt, EOS last."""
    rejected: Int32
    """[R] ids after the prompt, EOS last."""
    margin: float | None = None
    """By how much the chosen one is better, in units of reward."""
    p: float | None = None
    """Probability that the chosen one is better; none: certain."""
    source: str = ""
    """Name of the source it came from; empty where there is only one."""


@dataclass(frozen=True)
class BenchmarkPair:
    """A pair to measure on, one of a subset."""

    pair: PreferencePair
    subset: str
    id: str = ""
    """Its own name, where it has one."""


@dataclass(frozen=True)
class JudgedAnswer:
    """One answer that people find good or bad by itself."""

    prompt: Int32
    """[P]"""
    answer: Int32
    """[A] ids after the prompt, EOS last."""
    desirable: bool
    source: str = ""
    """Name of the source it came from; empty where there is only one."""


@dataclass(frozen=True)
class RewardedAnswer:
    """One answer and what it earned."""

    prompt: Int32
    """[P]"""
    answer: Int32
    """[A] ids after the prompt, EOS last."""
    reward: float
    source: str = ""
    """Name of the source it came from; empty where there is only one."""


@dataclass(frozen=True)
class Prompt:
    """What an answer is sampled for."""

    ids: Int32
    """[P], generation prompt included."""
    turns: Turns
    text: str
    """What a reward function or a person sees: the last user turn, or the text of the prompt."""


@dataclass(frozen=True)
class Candidates:
    """Answers to one prompt that are to be compared, as text: who compares them may have another tokenizer."""

    turns: Turns
    responses: tuple[str, ...]
    p: float | None = None
    """Of a pair: probability that the first is the better one; none: unknown."""


def sft_examples(data: AnyData, tokenizer: "PreTrainedTokenizerBase", quarantine: Quarantine) -> list[SFTExample]:
    """Rows of `messages`, or of `prompt` and `completion`. Raises DataError if too few rows are usable."""
    rows = _load_all(data, quarantine, lambda fields: _sft_example(fields, tokenizer, data.max_tokens))
    return [replace(example, source=source) for source, examples in rows.items() for example in examples]


def preference_pairs(
    data: AnyData, tokenizer: "PreTrainedTokenizerBase", quarantine: Quarantine
) -> list[PreferencePair]:
    """Rows of `prompt`, `chosen` and `rejected`, or of two whole dialogues `chosen` and `rejected`.

    Optional are `margin` and `p`. Raises DataError if too few rows are usable.
    """
    rows = _load_all(data, quarantine, lambda fields: _preference_pair(fields, tokenizer, data.max_tokens))
    return [replace(pair, source=source) for source, pairs in rows.items() for pair in pairs]


def benchmark_pairs(
    data: DataConfig, tokenizer: "PreTrainedTokenizerBase", quarantine: Quarantine
) -> list[BenchmarkPair]:
    """Rows of pairs with `subset`, and optionally `id`. Raises DataError if too few rows are usable."""
    return _load(data, quarantine, lambda fields: _benchmark_pair(fields, tokenizer, data.max_tokens))


def judged_answers(data: AnyData, tokenizer: "PreTrainedTokenizerBase", quarantine: Quarantine) -> list[JudgedAnswer]:
    """Rows of `prompt`, `completion` and `label`, true or false; or rows of pairs, each of which becomes two answers.

    Of a pair the likelier better answer by `p` is desirable and the other is not. Raises DataError if too few rows are
    usable.
    """
    rows = _load_all(data, quarantine, lambda fields: _judged(fields, tokenizer, data.max_tokens))
    return [replace(one, source=source) for source, some in rows.items() for answers in some for one in answers]


def rewarded_answers(
    data: AnyData, tokenizer: "PreTrainedTokenizerBase", quarantine: Quarantine
) -> list[RewardedAnswer]:
    """Rows of `prompt`, `completion` and `reward`; a run's samples, `prompt`, `response` and `score`; or rows of pairs.

    Of a pair each answer is a row, whose reward is its chance to be the better one less that to be the worse, 2 p - 1:
    1 and -1 without `p`. Raises DataError if too few rows are usable.
    """
    rows = _load_all(data, quarantine, lambda fields: _rewarded(fields, tokenizer, data.max_tokens))
    return [replace(one, source=source) for source, some in rows.items() for answers in some for one in answers]


def prompts(data: DataConfig, tokenizer: "PreTrainedTokenizerBase", quarantine: Quarantine) -> list[Prompt]:
    """Rows of `prompt`, of `messages` (a last answer is left away), or of a whole dialogue `chosen`.

    `data.max_tokens` bounds the prompt alone. Raises DataError if too few rows are usable.
    """
    return _load(data, quarantine, lambda fields: _prompt(fields, tokenizer, data.max_tokens))


def candidates(data: DataConfig, quarantine: Quarantine, most: int) -> list[Candidates]:
    """Rows of `prompt` and `responses`, 2 to `most` texts, or of pairs, whose label is left away.

    Nothing is tokenised, so `data.max_tokens` bounds nothing. Raises DataError if too few rows are usable.
    """
    return _load(data, quarantine, lambda fields: _candidates(fields, most))


def labelled_pairs(data: DataConfig, quarantine: Quarantine) -> list[Candidates]:
    """Rows as of `preference_pairs`, as text: chosen before rejected, and p, 1 where a row has none.

    Raises DataError if too few rows are usable.
    """
    return _load(data, quarantine, _labelled_pair)


def _load_all(data: AnyData, quarantine: Quarantine, build: Callable[[Fields], Example]) -> dict[str, list[Example]]:
    """By name of the source, each judged by itself."""
    found = {}
    for name, part in data.parts.items():
        found[name] = _load(part, quarantine, build)
        quarantine = quarantine.another()
    return found


def _load(data: DataConfig, quarantine: Quarantine, build: Callable[[Fields], Example]) -> list[Example]:
    usable = []
    for row in read_rows(data, quarantine):
        try:
            usable.append(build({name: value for name, value in row.fields.items() if value is not None}))
        except BadRow as fault:
            quarantine.add(row.file, row.line, str(fault), repr(row.fields))
    quarantine.check(len(usable) + quarantine.total, data.max_bad_share, f"data.path '{data.path}'")
    return usable


def _sft_example(fields: Fields, tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> SFTExample:
    if "messages" in fields:
        ids, mask = chat_ids_and_mask(tokenizer, columns.messages(fields, "messages"))
    else:
        columns.require(fields, "prompt", "completion", instead="messages")
        turns = columns.turns(fields, "prompt")
        before = _prompt_ids(tokenizer, turns)
        answer = answer_ids(tokenizer, turns, columns.answer(fields, "completion", turns))
        ids, mask = before + answer, [False] * len(before) + [True] * len(answer)
    _fits(len(ids), max_tokens)
    return SFTExample(np.array(ids, np.int32), np.array(mask, np.bool_))


def _preference_pair(fields: Fields, tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> PreferencePair:
    turns, chosen_text, rejected_text = columns.pair(fields)
    margin, p = columns.number(fields, "margin", -float_info.max, float_info.max), columns.number(fields, "p", 0, 1)
    before = _prompt_ids(tokenizer, turns)
    chosen, rejected = answer_ids(tokenizer, turns, chosen_text), answer_ids(tokenizer, turns, rejected_text)
    _fits(len(before) + max(len(chosen), len(rejected)), max_tokens)
    if chosen == rejected:
        raise BadRow("identical", f"'chosen' and 'rejected' are the same {len(chosen)} tokens")
    return PreferencePair(
        np.array(before, np.int32), np.array(chosen, np.int32), np.array(rejected, np.int32), margin, p
    )


def _benchmark_pair(fields: Fields, tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> BenchmarkPair:
    columns.require(fields, "subset")
    subset = columns.text(fields["subset"], "'subset'", "text")
    return BenchmarkPair(_preference_pair(fields, tokenizer, max_tokens), subset, str(fields.get("id", "")))


def _judged(fields: Fields, tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> list[JudgedAnswer]:
    if "chosen" in fields:
        return _judged_pair(_preference_pair(fields, tokenizer, max_tokens))
    columns.require(fields, "prompt", "completion", "label", instead="chosen' and 'rejected")
    if not isinstance(fields["label"], bool):
        raise BadRow("wrong type", f"'label' is {columns.kind(fields['label'])}, expected true or false")
    return [JudgedAnswer(*_prompt_and_answer(fields, "completion", tokenizer, max_tokens), fields["label"])]


def _rewarded(fields: Fields, tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> list[RewardedAnswer]:
    if "chosen" in fields:
        pair = _preference_pair(fields, tokenizer, max_tokens)
        reward = 2 * (1.0 if pair.p is None else pair.p) - 1
        return [RewardedAnswer(pair.prompt, pair.chosen, reward), RewardedAnswer(pair.prompt, pair.rejected, -reward)]
    answer, reward_column = ("response", "score") if "response" in fields else ("completion", "reward")
    columns.require(fields, "prompt", answer, reward_column, instead="chosen' and 'rejected")
    given = columns.number(fields, reward_column, -float_info.max, float_info.max)
    assert given is not None
    return [RewardedAnswer(*_prompt_and_answer(fields, answer, tokenizer, max_tokens), given)]


def _prompt_and_answer(
    fields: Fields, column: str, tokenizer: "PreTrainedTokenizerBase", max_tokens: int
) -> tuple[Int32, Int32]:
    turns = columns.turns(fields, "prompt")
    before = _prompt_ids(tokenizer, turns)
    answer = answer_ids(tokenizer, turns, columns.answer(fields, column, turns))
    _fits(len(before) + len(answer), max_tokens)
    return np.array(before, np.int32), np.array(answer, np.int32)


def _judged_pair(pair: PreferencePair) -> list[JudgedAnswer]:
    p = 1.0 if pair.p is None else pair.p
    if p == 0.5:
        raise BadRow("undecided", "'p' is 0.5, so neither answer is the desirable one")
    return [JudgedAnswer(pair.prompt, pair.chosen, p > 0.5), JudgedAnswer(pair.prompt, pair.rejected, p < 0.5)]


def _candidates(fields: Fields, most: int) -> Candidates:
    if "responses" not in fields:
        columns.require(fields, "chosen", "rejected", instead="responses")
        turns, chosen, rejected = columns.pair(fields)
        return Candidates(turns, (chosen.strip(), rejected.strip()))
    columns.require(fields, "prompt")
    given = fields["responses"]
    if not isinstance(given, list):
        raise BadRow("wrong type", f"'responses' is {columns.kind(given)}, expected a list of texts")
    if not 2 <= len(given) <= most:
        raise BadRow("wrong value", f"'responses' has {len(given)} texts, expected 2 to {most}")
    texts = [columns.text(text, f"'responses'[{place}]", "text").strip() for place, text in enumerate(given)]
    return Candidates(columns.turns(fields, "prompt"), tuple(texts))


def _labelled_pair(fields: Fields) -> Candidates:
    turns, chosen, rejected = columns.pair(fields)
    p = columns.number(fields, "p", 0, 1)
    return Candidates(turns, (chosen.strip(), rejected.strip()), 1.0 if p is None else p)


def _prompt(fields: Fields, tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> Prompt:
    turns = columns.prompt_turns(fields)
    ids = _prompt_ids(tokenizer, turns)
    _fits(len(ids), max_tokens)
    return Prompt(np.array(ids, np.int32), turns, columns.seen(turns))


def _prompt_ids(tokenizer: "PreTrainedTokenizerBase", turns: Turns) -> list[int]:
    ids = prompt_ids(tokenizer, turns)
    if not ids:
        raise BadRow("empty", "the tokenizer makes no tokens of the prompt")
    return ids


def _fits(tokens: int, max_tokens: int) -> None:
    if tokens > max_tokens:
        raise BadRow("too long", f"{tokens} tokens, data.max_tokens is {max_tokens}")
