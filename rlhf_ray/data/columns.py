"""What may stand in a column of a row, and what is wrong when something else does.

Every fault is a BadRow that names the column: whoever reads rows sets that one aside with file and line. A prompt is
text or messages, and text that is written as an hh-rlhf dialogue is split into its turns.
"""

from typing import Any

from rlhf_ray.data.quarantine import BadRow
from rlhf_ray.data.templates import Message, split_dialogue

Fields = dict[str, Any]
Turns = str | list[Message]
"""A prompt: text as it stands in the row, or messages."""

ROLES = ("system", "user", "assistant")


def prompt_turns(fields: Fields) -> Turns:
    """The prompt of a row: `prompt`, `messages` without a last answer, or a whole dialogue `chosen` without it."""
    if "prompt" in fields:
        return turns(fields, "prompt")
    if "messages" in fields:
        found = messages(fields, "messages")
        return found[:-1] if found[-1]["role"] == "assistant" else found
    require(fields, "chosen", instead="prompt' or 'messages")
    return dialogue(fields, "chosen")[:-1]


def pair(fields: Fields) -> tuple[Turns, str, str]:
    """(prompt, chosen answer, rejected answer)"""
    require(fields, "chosen", "rejected")
    if "prompt" in fields:
        prompt = turns(fields, "prompt")
        return prompt, answer(fields, "chosen", prompt), answer(fields, "rejected", prompt)
    chosen, rejected = dialogue(fields, "chosen"), dialogue(fields, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("prompts differ", "'chosen' and 'rejected' part before their last answers")
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


def turns(fields: Fields, column: str) -> Turns:
    """A prompt: messages, or text; text that is written as an hh-rlhf dialogue is split into its turns."""
    if isinstance(fields[column], list):
        return messages(fields, column)
    plain = text(fields[column], f"'{column}'", "text or a list of messages")
    if not plain.startswith("\n\nHuman:"):
        return plain
    found = split_dialogue(plain)
    if found[-1] == {"role": "assistant", "content": ""}:  # ends in "\n\nAssistant:", as a prompt for completion does
        found.pop()
    return _not_empty(found, column)


def answer(fields: Fields, column: str, prompt: Turns) -> str:
    """The answer to `prompt`: text, or messages that hold the answer alone or the prompt before it too."""
    if not isinstance(fields[column], list):
        return text(fields[column], f"'{column}'", "text or a list of messages")
    *before, last = messages(fields, column)
    if last["role"] != "assistant":
        raise BadRow("no answer", f"the last message of '{column}' is the {last['role']}'s")
    if before and before != ([{"role": "user", "content": prompt.strip()}] if isinstance(prompt, str) else prompt):
        raise BadRow("prompts differ", f"'{column}' does not begin with the messages of 'prompt'")
    return last["content"]


def dialogue(fields: Fields, column: str) -> list[Message]:
    """A whole dialogue, prompt and answer: messages, or text as hh-rlhf writes it."""
    value = fields[column]
    if isinstance(value, list):
        found = messages(fields, column)
    else:
        plain = text(value, f"'{column}'", "a dialogue as text or a list of messages")
        found = _not_empty(split_dialogue(plain), column)
    if found[-1]["role"] != "assistant":
        raise BadRow("no answer", f"the last turn of '{column}' is the {found[-1]['role']}'s")
    if len(found) == 1:
        raise BadRow("no prompt", f"'{column}' has no turn before the answer")
    return found


def messages(fields: Fields, column: str) -> list[Message]:
    value = fields[column]
    if not isinstance(value, list):
        raise BadRow("wrong type", f"'{column}' is {kind(value)}, expected a list of messages")
    if not value:
        raise BadRow("empty", f"'{column}' has no messages")
    return [_message(message, f"'{column}'[{place}]") for place, message in enumerate(value)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        raise BadRow("wrong type", f"{where} is {kind(message)}, expected an object with 'role' and 'content'")
    if message["role"] not in ROLES:
        raise BadRow("wrong value", f"{where} has role {message['role']!r}, expected one of {', '.join(ROLES)}")
    return {"role": message["role"], "content": text(message["content"], f"{where}.content", "text").strip()}


def text(value: Any, where: str, expected: str) -> str:
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{where} is {kind(value)}, expected {expected}")
    if not value.strip():
        raise BadRow("empty", f"{where} has no text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair; no tokenizer takes it
        raise BadRow("not UTF-8", f"{where} has a lone surrogate at character {error.start}") from None
    return value


def _not_empty(turns: list[Message], column: str) -> list[Message]:
    for place, turn in enumerate(turns):
        if not turn["content"]:
            raise BadRow("empty", f"turn {place + 1} of {len(turns)} in '{column}', the {turn['role']}'s, has no text")
    return turns


def number(fields: Fields, column: str, low: float, high: float) -> float | None:
    if column not in fields:
        return None
    value = fields[column]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow("wrong type", f"'{column}' is {kind(value)}, expected a number")
    if not low <= value <= high:
        raise BadRow("wrong value", f"'{column}' is {value}, expected a number from {low} to {high}")
    return float(value)


def require(fields: Fields, *columns: str, instead: str | None = None) -> None:
    for column in columns:
        if column not in fields:
            found = ", ".join(map(str, fields)) or "none"
            alternative = f" (nor '{instead}')" if instead else ""
            raise BadRow("missing column", f"no '{column}'{alternative}; the row has {found}")


def seen(prompt: Turns) -> str:
    """What a reward function or a person sees of a prompt: the last user turn, or the text."""
    if isinstance(prompt, str):
        return prompt
    return next((turn["content"] for turn in reversed(prompt) if turn["role"] == "user"), prompt[-1]["content"])


def kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
