"""Which of two answers a model prefers, as a probability (Bai et al. 2022, section 4.1; Lee et al. 2023, section 3).

Judges lean towards a position, so each principle asks twice, either answer standing as (A) once, and counts only where
both questions were answered. What must never happen: a label made of one order alone, or of a number that stands in for
an answer that did not come. Principles and random numbers are functions of seed, prompt and pair alone: the same on
every run, however prompts are batched and wherever a run was interrupted.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from random import Random
from statistics import fmean
from typing import Any, Protocol

from rlhf_ray.config.feedback import MOST_PRINCIPLES, MOST_RESPONSES
from rlhf_ray.data.columns import Turns
from rlhf_ray.data.templates import Message, as_messages
from rlhf_ray.errors import JudgeError
from rlhf_ray.feedback.constitution import Constitution, Principle
from rlhf_ray.feedback.critique import Said

OPTIONS = ("(A)", "(B)")
"""What a judge answers, by the constitution's templates."""

SAMPLES = MOST_RESPONSES * (1 + (MOST_RESPONSES - 1) * MOST_PRINCIPLES)
"""Sample ids that belong to one prompt: of its answers, and of a rationale for each pair, principle and order."""

LATEST = 20
"""So many questions at least decide whether a judge is to be asked further."""


@dataclass(frozen=True)
class Reply:
    """What came of one request to a judge: a rationale, log-probabilities, or why there is neither."""

    said: Said | None = None
    logprobs: tuple[float, float] | None = None
    """Of OPTIONS, in nats."""
    failed: str | None = None
    """Such as "option missing: ..."; requests are counted by the part before the colon."""
    tokens_in: int = 0
    tokens_out: int = 0


class Judge(Protocol):
    """Who answers. Failures come back as replies; an error means that asking on is of no use."""

    def rationales(self, dialogues: Sequence[list[Message]], sample_ids: Sequence[int]) -> list[Reply]:
        """One text to each dialogue; a sample's id decides its random numbers."""

    def choices(self, dialogues: Sequence[list[Message]]) -> list[Reply]:
        """Log-probabilities of the options after each dialogue."""


@dataclass
class Question:
    """A pair before the judge, by one principle, in one order."""

    principle_id: str
    swapped: bool
    """Whether the pair's second answer stands as (A)."""
    rationale: Said | None = None
    logprobs: tuple[float, float] | None = None
    """Of (A) and of (B), in nats."""
    p: float | None = None
    """Probability that the pair's first answer is the better one, wherever it stands."""
    failed: str | None = None
    tokens_in: int = 0
    """Of all requests that this question took."""
    tokens_out: int = 0

    def hear(self, reply: Reply) -> None:
        """Takes a rationale or a choice. A rationale that was cut short or is empty answers nothing."""
        self.tokens_in += reply.tokens_in
        self.tokens_out += reply.tokens_out
        self.failed = reply.failed
        if reply.said is not None:
            self.rationale = reply.said
            self.failed = f"rationale {reply.said.fault}" if reply.said.fault else None
        if reply.logprobs is not None:
            self.logprobs = reply.logprobs
            self.p = 1 - self.prefers_a if self.swapped else self.prefers_a

    @property
    def prefers_a(self) -> float:
        """p((A)) = s(l_A - l_B) of a question that was answered: the options' probabilities, normalised."""
        assert self.logprobs is not None
        return _sigmoid(self.logprobs[0] - self.logprobs[1])


@dataclass
class Pair:
    """Two answers to one prompt, by their places among its answers."""

    first: int
    second: int
    questions: list[Question]
    """Principle after principle; of each the pair as it is, then swapped."""
    p: float | None = None
    """Probability that the first is the better one, before any bounds; none: no principle was answered both ways."""

    @property
    def number(self) -> int:
        """Of all pairs of the prompt's answers, the same whatever their number is."""
        return self.second * (self.second - 1) // 2 + self.first

    def answered(self) -> list[tuple[Question, Question]]:
        """As it is and swapped, of each principle that was answered both ways."""
        both = zip(self.questions[::2], self.questions[1::2], strict=True)
        return [(one, other) for one, other in both if one.logprobs and other.logprobs]

    def by_principle(self) -> dict[str, float]:
        """Principle -> probability that the first is better, the mean over both orders."""
        return {one.principle_id: (one.prefers_a + 1 - other.prefers_a) / 2 for one, other in self.answered()}

    def conclude(self) -> None:
        """Makes p of what was answered."""
        found = self.by_principle()
        self.p = fmean(found.values()) if found else None


@dataclass
class Response:
    """An answer that may be compared. What only a sampler knows is None where the row brought the answer."""

    text: str
    dropped: str | None = None
    """Why it is not compared: truncated, empty or identical."""
    tokens: int | None = None
    logprob: float | None = None
    finish: str | None = None


@dataclass
class Judged:
    """What became of one prompt."""

    prompt_id: int
    """The row's place among the usable ones; rows of known labels are counted on from there."""
    prompt: Turns
    responses: list[Response] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    dropped: str | None = None
    """Why no answer could be sampled."""
    label: float | None = None
    """Known probability that the first answer is the better one, of a row that measures the judge."""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Judged":
        """From what `row` made of it."""
        return cls(
            row["prompt_id"],
            row["prompt"],
            [Response(**each) for each in row["responses"]],
            [Pair(**{**each, "questions": list(map(_question, each["questions"]))}) for each in row["pairs"]],
            row["dropped"],
            row["label"],
        )

    def row(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def questions(self) -> list[Question]:
        return [question for pair in self.pairs for question in pair.questions]

    def answer_id(self, number: int) -> int:
        """Sample id of an answer."""
        return self.prompt_id * SAMPLES + number

    def rationale_id(self, pair: Pair, number: int) -> int:
        """Sample id of the rationale of a pair's question number `number`."""
        return self.prompt_id * SAMPLES + MOST_RESPONSES + pair.number * 2 * MOST_PRINCIPLES + number

    def take(self, said: Said) -> None:
        """A sampled answer."""
        cause = "truncated" if said.finish == "length" else None if said.text else "empty"
        self.responses.append(Response(said.text, cause, said.tokens, said.logprob, said.finish))

    def make_pairs(self, principles: Sequence[Principle], each: int, seed: int) -> None:
        """Every pair of answers fit to be compared, with its questions by `each` principles."""
        texts: list[str] = []
        for response in self.responses:
            if response.dropped is None and response.text in texts:
                response.dropped = "identical"
            if response.dropped is None:
                texts.append(response.text)
        fit = [place for place, response in enumerate(self.responses) if response.dropped is None]
        for first, second in combinations(fit, 2):
            chosen = drawn(principles, each, seed, self.prompt_id, first, second)
            both = [Question(principle.id, swapped) for principle in chosen for swapped in (False, True)]
            self.pairs.append(Pair(first, second, both))

    def dialogue(self, pair: Pair, question: Question, constitution: Constitution, reasoned: bool) -> list[Message]:
        """The turns to which a question's next text is the answer: a choice, or where it is `reasoned` a rationale
        first."""
        templates = constitution.templates
        a, b = (self.responses[place].text for place in (pair.first, pair.second))
        a, b = (b, a) if question.swapped else (a, b)
        request = templates.fill(
            templates.reasoning if reasoned else templates.comparison,
            as_messages(self.prompt),
            constitution.of(question.principle_id).comparison,
            a,
            b,
        )
        turns = [{"role": "user", "content": request}]
        if question.rationale is not None:
            turns += [
                {"role": "assistant", "content": question.rationale.text},
                {"role": "user", "content": templates.decision},
            ]
        return turns


def drawn(
    principles: Sequence[Principle], count: int, seed: int, prompt_id: int, first: int, second: int
) -> list[Principle]:
    """Principles of one pair, without replacement."""
    return Random(f"{seed} {prompt_id} {first} {second}").sample(principles, count)


def preferences(judged: Judged, most: float, hard: bool) -> list[dict[str, Any]]:
    """Rows `prompt`, `chosen`, `rejected`, `p`, `principle_ids`, one for each pair with a label; p is at least 0.5.

    p is `most` at most; `hard`: it is 1, and where neither answer is preferred there is no label.
    """
    rows = []
    for pair in judged.pairs:
        if pair.p is None or (hard and pair.p == 0.5):
            continue
        first, second = judged.responses[pair.first].text, judged.responses[pair.second].text
        rows.append(
            {
                "prompt": judged.prompt,
                "chosen": first if pair.p >= 0.5 else second,
                "rejected": second if pair.p >= 0.5 else first,
                "p": 1.0 if hard else min(max(pair.p, 1 - pair.p), most),
                "principle_ids": list(pair.by_principle()),
            }
        )
    return rows


def check_answers(before: Sequence[Judged], block: Sequence[Judged]) -> None:
    """Raises JudgeError when more than half of the block's questions failed.

    Where the block has few, earlier ones are looked at too: a last block of one long prompt does not end a run.
    """
    latest = [question for each in block for question in each.questions]
    for each in reversed(before):
        if len(latest) >= LATEST:
            break
        latest += each.questions
    failed = [question.failed for question in latest if question.failed]
    if 2 * len(failed) > len(latest):
        raise JudgeError(
            f"the judge failed on {len(failed)} of the latest {len(latest)} questions; one of them: {failed[0]}. "
            "Nothing of this block was kept: mend the cause, and the same configuration goes on here when run again"
        )


def _question(fields: Mapping[str, Any]) -> Question:
    rationale, logprobs = fields["rationale"], fields["logprobs"]
    return Question(
        **{
            **fields,
            "rationale": Said(**rationale) if rationale else None,
            "logprobs": tuple(logprobs) if logprobs else None,
        }
    )


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
