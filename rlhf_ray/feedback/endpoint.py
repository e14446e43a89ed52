"""A judge behind an OpenAI-compatible server: its replies, or a cause for each that could not be had.

How the options are read: the reply is walked to its first token that is more than white space, brackets, quotes and
asterisks. There the probabilities of the listed tokens that come to A (or to B) without those marks are added up, and
multiplied by the probability of what stands before. So (A), A, "A" and **A) all count; an option that is not among the
likeliest tokens has no log-probability, and its question no answer.

What must never happen: a label where a request failed; a wait without an end; the key in a message or a file. What may
pass (no connection, time-outs, 429, 5xx) is tried again with growing pauses; a refused key or an unknown model ends the
run at once, and so does a server on which everything fails.
"""

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from rlhf_ray.config.feedback import EndpointJudge
from rlhf_ray.data.templates import Message
from rlhf_ray.errors import ConfigError, JudgeError
from rlhf_ray.feedback.critique import Said
from rlhf_ray.feedback.judging import LATEST, OPTIONS, Reply
from rlhf_ray.interrupts import Interrupt
from rlhf_ray.telemetry.secrets import bearer, redact

KEY = "RLHF_RAY_JUDGE_KEY"
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
LISTED = 20
"""Likeliest tokens asked for at each place, the most that servers commonly give."""
CHOICE_TOKENS = 3
"""Enough for a bracket and a letter, however they are cut into tokens."""

_MARKS = " \t\n\r()[]\"'*.:`"


class Endpoint:
    """Asks `concurrency` things at a time, at no more than `requests_per_minute`. A `feedback.judging.Judge`."""

    def __init__(self, section: EndpointJudge, seed: int) -> None:
        """Raises ConfigError for an address that is none, and for a key that cannot or must not be sent there."""
        self.section, self.seed = section, seed
        self.url = f"{section.base_url.rstrip('/')}/chat/completions"
        try:
            host = httpx.URL(self.url).host
        except httpx.InvalidURL:
            host = ""
        if not host:
            raise ConfigError(f"judge.base_url '{section.base_url}': expected something like https://host/v1")
        self.headers = bearer(KEY, self.url, "judge")
        self.pace = Pace(section.requests_per_minute)
        self.failed_in_a_row = 0

    def rationales(self, dialogues: Sequence[list[Message]], sample_ids: Sequence[int]) -> list[Reply]:
        """One text to each dialogue. The server gets the sample's id as its seed; whether it heeds it is its own."""
        asked = [
            {
                "messages": turns,
                "max_tokens": self.section.max_new_tokens,
                "temperature": 1.0,
                "seed": self.seed + number,
            }
            for turns, number in zip(dialogues, sample_ids, strict=True)
        ]
        return asyncio.run(self._ask_all(asked, read_text))

    def choices(self, dialogues: Sequence[list[Message]]) -> list[Reply]:
        """Log-probabilities of the options after each dialogue."""
        asked = [
            {"messages": turns, "max_tokens": CHOICE_TOKENS, "temperature": 0.0, "top_logprobs": LISTED}
            for turns in dialogues
        ]
        return asyncio.run(self._ask_all(asked, read_choice))

    async def _ask_all(self, asked: Sequence[dict[str, Any]], read: Callable[[Any], Reply]) -> list[Reply]:
        replies: dict[int, Reply] = {}
        places = iter(range(len(asked)))

        async def work(client: httpx.AsyncClient) -> None:
            for place in places:
                replies[place] = reply = await self._reply(client, asked[place], read)
                self._note(reply)

        async with httpx.AsyncClient(
            headers=self.headers, timeout=None
        ) as client:  # `_post` has the time-out of a whole try
            workers = [asyncio.create_task(work(client)) for _ in range(min(self.section.concurrency, len(asked)))]
            try:
                left = set(workers)
                while left:
                    done, left = await asyncio.wait(left, timeout=0.5, return_when=asyncio.FIRST_EXCEPTION)
                    for task in done:
                        task.result()
                    Interrupt.check()
            finally:
                for task in workers:
                    task.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        return [replies[place] for place in range(len(asked))]

    async def _reply(self, client: httpx.AsyncClient, asked: dict[str, Any], read: Callable[[Any], Reply]) -> Reply:
        answer, failed = await self._retried(client, {"model": self.section.model, "logprobs": True, **asked})
        if failed:
            return Reply(failed=redact(failed))
        try:
            return read(answer)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            return Reply(failed=redact(f"unexpected reply: {type(error).__name__} {error} in {str(answer)[:200]}"))

    async def _retried(self, client: httpx.AsyncClient, body: Mapping[str, Any]) -> tuple[Any, str]:
        """(the server's JSON, "") or (None, why there is none)."""
        pause, tries, end = FIRST_PAUSE_S, 0, math.inf
        while True:
            await asyncio.sleep(self.pace.slot(time.monotonic()))
            if not tries:
                end = time.monotonic() + self.section.retry_for_s
            tries += 1
            answer, fault, wait_s = await self._post(client, body)
            if not fault or wait_s is None:
                return answer, fault
            wait_s = max(pause, wait_s)
            if time.monotonic() + wait_s > end:
                return None, f"request failed: {fault} ({tries} tries in {self.section.retry_for_s:g} s)"
            await asyncio.sleep(wait_s)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _post(self, client: httpx.AsyncClient, body: Mapping[str, Any]) -> tuple[Any, str, float | None]:
        """(JSON, fault, seconds to wait before another try); none: another try is of no use."""
        try:
            async with asyncio.timeout(self.section.timeout_s):
                reply = await client.post(self.url, json=body)
        except TimeoutError:
            return None, f"no reply within {self.section.timeout_s:g} s", 0.0
        except httpx.TransportError as error:
            return None, f"{type(error).__name__}: {error}", 0.0
        if reply.status_code == 200:
            try:
                return reply.json(), "", None
            except ValueError:
                return None, f"unexpected reply: no JSON but {reply.text[:200]}", None
        said = f"HTTP {reply.status_code}: {' '.join(reply.text[:200].split())}"
        if reply.status_code in (401, 403):
            found = "is refused" if self.headers else "is not set"
            raise ConfigError(redact(f"judge {self.url}: the key, environment variable {KEY}, {found}: {said}"))
        if reply.status_code == 404 or "model_not_found" in reply.text:
            raise ConfigError(
                redact(f"judge {self.url}: no model '{self.section.model}' there, or no such page: {said}")
            )
        if reply.status_code == 429:
            wait_s = seconds_asked_for(reply.headers.get("retry-after"), time.time())
            if wait_s <= self.section.retry_for_s:  # else no request is worth waiting for
                self.pace.hold(time.monotonic() + wait_s)
            return None, said, wait_s
        return (None, said, 0.0) if reply.status_code >= 500 else (None, f"refused: {said}", None)

    def _note(self, reply: Reply) -> None:
        self.failed_in_a_row = self.failed_in_a_row + 1 if reply.failed else 0
        if self.failed_in_a_row >= max(LATEST, 2 * self.section.concurrency):
            raise JudgeError(
                redact(f"judge {self.url}: {self.failed_in_a_row} requests in a row failed; the last: {reply.failed}")
            )


class Pace:
    """When requests may go: evenly, so many a minute. Pure: it is told the time, in seconds."""

    def __init__(self, per_minute: float) -> None:
        self.gap_s = 60 / per_minute
        self.next_s = -math.inf

    def slot(self, now_s: float) -> float:
        """Seconds from now to the next free slot, which is taken hereby."""
        at_s = max(now_s, self.next_s)
        self.next_s = at_s + self.gap_s
        return at_s - now_s

    def hold(self, until_s: float) -> None:
        """No slot before that."""
        self.next_s = max(self.next_s, until_s)


def read_text(answer: Any) -> Reply:
    """A sampled text. Raises what a reply of another shape leads to."""
    choice, tokens_in, tokens_out = answer["choices"][0], *_usage(answer)
    ended = choice["finish_reason"]
    if ended not in ("stop", "length"):
        return Reply(failed=f"rationale not finished: {ended}", tokens_in=tokens_in, tokens_out=tokens_out)
    logprob = math.fsum(float(token["logprob"]) for token in _tokens(choice))
    text = (choice["message"]["content"] or "").strip()
    text.encode()  # JSON can spell half a surrogate pair, which no file takes
    said = Said(text, tokens_out, logprob, "eos" if ended == "stop" else "length")
    return Reply(said, tokens_in=tokens_in, tokens_out=tokens_out)


def read_choice(answer: Any) -> Reply:
    """Log-probabilities of the options, by the rule above. Raises what a reply of another shape leads to."""
    choice, tokens_in, tokens_out = answer["choices"][0], *_usage(answer)
    before = 0.0
    for token in _tokens(choice):
        if not token["token"].strip(_MARKS):
            before += float(token["logprob"])
            continue
        listed = [(each["token"], float(each["logprob"])) for each in token["top_logprobs"]]
        if token["token"] not in dict(listed):
            listed.append((token["token"], float(token["logprob"])))
        sums = [
            sum(math.exp(value) for text, value in listed if text.strip(_MARKS) == option.strip(_MARKS))
            for option in OPTIONS
        ]
        missing = [option for option, mass in zip(OPTIONS, sums, strict=True) if not 0 < mass < math.inf]
        if missing:
            likeliest = ", ".join(repr(text) for text, _ in sorted(listed, key=lambda each: -each[1])[:5])
            failed = f"option missing: {' and '.join(missing)} not among the likeliest tokens {likeliest}, ..."
            return Reply(failed=failed, tokens_in=tokens_in, tokens_out=tokens_out)
        a, b = (before + math.log(mass) for mass in sums)
        return Reply(logprobs=(a, b), tokens_in=tokens_in, tokens_out=tokens_out)
    return Reply(failed="option missing: the reply has no word", tokens_in=tokens_in, tokens_out=tokens_out)


def seconds_asked_for(retry_after: str | None, now_s: float) -> float:
    """Of a Retry-After header, which holds seconds or a date (RFC 9110, 10.2.3); 0 for none or nonsense.

    `now_s` is Unix time.
    """
    try:
        return max(0.0, float(retry_after or 0))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after or "").timestamp() - now_s)
    except ValueError:
        return 0.0


def _tokens(choice: Any) -> Iterator[Any]:
    if not choice.get("logprobs"):
        raise ValueError("no log-probabilities")
    yield from choice["logprobs"]["content"] or []


def _usage(answer: Any) -> tuple[int, int]:
    """Prompt tokens, generated tokens."""
    return int(answer["usage"]["prompt_tokens"]), int(answer["usage"]["completion_tokens"])
