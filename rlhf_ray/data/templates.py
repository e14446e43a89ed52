"""From turns to token ids: the one place that decides what a prompt's ids are.

SFT, reward model and PPO all come here, so a row has the same prompt ids in each; a reward model trained on other
prompt ids than the policy sees is silently wrong. Answers always end with the tokenizer's EOS, which PPO waits for and
the reward model is scored at. Which tokens are an answer's is found by rendering the dialogue up to the answer and
comparing token by token, never by searching text for markers.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_ray.data.quarantine import BadRow
from rlhf_ray.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""

# The generation prompt ends at the colon and the answer begins with the space: the other way round, most BPE
# tokenizers would merge a lone space at the end of the prompt with the first word of the answer.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    r"{% if message['role'] == 'system' %}{{ '\n\nSystem: ' + message['content'] | trim }}"
    r"{% elif message['role'] == 'user' %}{{ '\n\nHuman: ' + message['content'] | trim }}"
    r"{% elif message['role'] == 'assistant' %}{{ '\n\nAssistant: ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    r"{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLE = {"Human": "user", "Assistant": "assistant"}


def ensure_chat_template(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """Gives a tokenizer that has no chat template the plain one, in place, and returns it.

    Raises DataError if it has no EOS token, without which no answer can end.
    """
    _eos(tokenizer)
    if tokenizer.chat_template is None:
        adds_bos = tokenizer.bos_token is not None and tokenizer.encode("a")[0] == tokenizer.bos_token_id
        tokenizer.chat_template = ("{{ bos_token }}" if adds_bos else "") + PLAIN_TEMPLATE
    return tokenizer


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompt: str | Sequence[Message]) -> list[int]:
    """Ids of a prompt, generation prompt included: what the policy goes on from.

    Text is one user turn; only where the tokenizer has no chat template it is encoded as it stands.
    Raises BadRow if the template refuses the turns, and DataError if messages meet a tokenizer without a template.
    """
    if isinstance(prompt, str) and tokenizer.chat_template is None:
        return _raw_prompt_ids(tokenizer, prompt)
    return _encode(tokenizer, _render(tokenizer, _turns(tokenizer, prompt), generation=True))


def answer_ids(tokenizer: "PreTrainedTokenizerBase", prompt: str | Sequence[Message], answer: str) -> list[int]:
    """Ids of `answer` to `prompt`, EOS last: prompt_ids + answer_ids is the whole row.

    Raises as `chat_ids_and_mask` does.
    """
    if isinstance(prompt, str) and tokenizer.chat_template is None:
        return [*_encode(tokenizer, _without_eos(tokenizer, answer)), _eos(tokenizer)]
    turns = _turns(tokenizer, [*as_messages(prompt), {"role": "assistant", "content": answer}])
    ids, mask = _ids_and_mask(tokenizer, turns, answers=[len(turns) - 1])
    return [token for token, is_answer in zip(ids, mask, strict=True) if is_answer]


def chat_ids_and_mask(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]
) -> tuple[list[int], list[bool]]:
    """Ids [T] of a dialogue up to its last answer, and a mask [T], True on the assistant's tokens, their EOS included.

    Raises BadRow if no turn is the assistant's, if the template refuses the turns, or if a token runs across the border
    between prompt and answer. Raises DataError if the template rewrites earlier turns when later ones are added: then
    no generation prompt is a prefix of the dialogue, and training would show the model prompts it never meets.
    """
    turns = _turns(tokenizer, messages)
    answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        raise BadRow("no answer", "none of the messages is the assistant's")
    return _ids_and_mask(tokenizer, turns, answers)


def split_dialogue(text: str) -> list[Message]:
    """Turns of a dialogue written as hh-rlhf writes it: each begins with "\\n\\nHuman: " or "\\n\\nAssistant: ".

    Contents are stripped and may be empty. Raises BadRow if the text does not begin with a turn.

    >>> split_dialogue("\\n\\nHuman: Hi\\n\\nAssistant: Hello!")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello!'}]
    """
    before, *parts = _TURN.split(text)
    if before.strip() or not parts:
        start = text.strip()[:40]
        raise BadRow("not a dialogue", f"expected text that begins with 'Human: ' or 'Assistant: ', found {start!r}")
    return [
        {"role": _ROLE[speaker], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _ids_and_mask(
    tokenizer: "PreTrainedTokenizerBase", turns: list[Message], answers: list[int]
) -> tuple[list[int], list[bool]]:
    """As `chat_ids_and_mask`, for the answers at the places `answers`."""
    text = _render(tokenizer, turns, generation=False)
    ids = _encode(tokenizer, text)
    starts = [_prefix(tokenizer, _render(tokenizer, turns[:k], generation=True), text, ids) for k in answers]
    mask = [False] * len(ids)
    for place, start, bound in zip(answers, starts, [*starts[1:], len(ids)], strict=True):
        stop = _stop(tokenizer, turns[: place + 1], text, ids, start, bound)
        mask[start:stop] = [True] * (stop - start)
    ids, mask = ids[:stop], mask[:stop]  # what a template writes after the last answer, nobody learns or generates
    if ids[-1] != _eos(tokenizer):
        return [*ids, _eos(tokenizer)], [*mask, True]
    return ids, mask


def _stop(
    tokenizer: "PreTrainedTokenizerBase", turns: list[Message], text: str, ids: list[int], start: int, bound: int
) -> int:
    """Where the answer that starts at `start` ends: after its EOS, or after all the template closes its turn with."""
    try:
        return ids.index(_eos(tokenizer), start, bound) + 1
    except ValueError:
        return _prefix(tokenizer, _render(tokenizer, turns, generation=False), text, ids)


def _prefix(tokenizer: "PreTrainedTokenizerBase", head: str, text: str, ids: list[int]) -> int:
    """Number of tokens of `head`, verified to be how `text`, tokenised as `ids`, begins."""
    if not text.startswith(head):
        raise DataError(
            "the tokenizer's chat template rewrites earlier turns when later ones are added, so an answer's tokens "
            f"cannot be told from its prompt's: {head[-60:]!r} is not how the dialogue goes on. Give rows of `prompt` "
            "and `completion` with one answer each, or a chat template that only appends"
        )
    expected = _encode(tokenizer, head)
    if ids[: len(expected)] != expected:
        raise BadRow("no border", f"a token runs across the end of the prompt {head[-30:]!r}")
    return len(expected)


def _render(tokenizer: "PreTrainedTokenizerBase", turns: list[Message], generation: bool) -> str:
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise DataError(
            "rows hold messages, but the tokenizer has no chat template; give it one, or rows of plain text"
        )
    if not turns:
        raise BadRow("no prompt", "no turn comes before the assistant's first")
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation))
    except TemplateError as error:
        raise BadRow("refused by the chat template", str(error)) from None


def _turns(tokenizer: "PreTrainedTokenizerBase", prompt: str | Sequence[Message]) -> list[Message]:
    """Messages with the white space around them gone, and answers free of EOS: the template writes it."""
    turns = [{"role": turn["role"], "content": turn["content"].strip()} for turn in as_messages(prompt)]
    for turn in turns:
        if turn["role"] == "assistant":
            turn["content"] = _without_eos(tokenizer, turn["content"])
    return turns


def as_messages(prompt: str | Sequence[Message]) -> list[Message]:
    """Text is one user turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _raw_prompt_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Ids as the tokenizer makes them, with one BOS at most, and no EOS where the answer is to begin."""
    ids = list(tokenizer.encode(text))
    if ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]
    return ids[:-1] if ids[-1:] == [_eos(tokenizer)] else ids


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _eos(tokenizer: "PreTrainedTokenizerBase") -> int:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token, so no answer could end; set its eos_token")
    return int(tokenizer.eos_token_id)


def _without_eos(tokenizer: "PreTrainedTokenizerBase", answer: str) -> str:
    """`answer` without an EOS written out at its end. Raises BadRow if one stands inside."""
    _eos(tokenizer)
    answer = answer.removesuffix(str(tokenizer.eos_token))
    if str(tokenizer.eos_token) in answer:
        raise BadRow("end inside an answer", f"the text {tokenizer.eos_token!r} stands before the answer's end")
    return answer
