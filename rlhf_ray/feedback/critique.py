"""Critique and revision (Bai et al. 2022, section 3): what is said to the model in each step, and what is kept.

Which principle a round follows, and which random numbers its texts are sampled with, are functions of seed, prompt and
round alone: the same on every run, however prompts are batched and wherever a run was interrupted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any, Literal

from rlhf_ray.data.templates import Message
from rlhf_ray.feedback.constitution import Constitution, Principle

MOST_STEPS = 64
"""Sample ids that belong to one prompt."""


@dataclass(frozen=True)
class Step:
    """One text that the model is asked for."""

    kind: Literal["response", "critique", "revision"]
    round: int
    """From 1; 0 is before the first."""

    @property
    def number(self) -> int:
        """The same for a step whatever steps there are besides it."""
        return 2 * self.round - (self.kind == "critique")


def steps(rounds: int, critique: bool) -> list[Step]:
    """All steps of a prompt: its answer, then for each round a critique, where one is asked for, and a revision."""
    found = [Step("response", 0)]
    for number in range(1, rounds + 1):
        found += [Step("critique", number)] if critique else []
        found.append(Step("revision", number))
    return found


@dataclass(frozen=True)
class Said:
    """One sampled text."""

    text: str
    tokens: int
    logprob: float
    """Sum over its tokens, in nats, at the sampling temperature."""
    finish: Literal["eos", "length"]

    @property
    def fault(self) -> str | None:
        """Why it is not fit to be used; None when it is."""
        if self.finish == "length":
            return f"truncated at {self.tokens} tokens"
        return None if self.text else "empty"


@dataclass
class Round:
    """One revision, and the critique before it where one is asked for."""

    principle_id: str
    critique: Said | None = None
    revision: Said | None = None


@dataclass
class Transcript:
    """What became of one prompt."""

    prompt_id: int
    """The row's place among the usable ones."""
    prompt: list[Message]
    response: Said | None = None
    rounds: list[Round] = field(default_factory=list)
    dropped: str | None = None
    """Why it goes no further, such as "critique 2: empty". What was revised before stays good."""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Transcript":
        """From what `row` made of it."""
        rounds = [Round(r["principle_id"], _said(r["critique"]), _said(r["revision"])) for r in row["rounds"]]
        return cls(row["prompt_id"], row["prompt"], _said(row["response"]), rounds, row["dropped"])

    def row(self) -> dict[str, Any]:
        return asdict(self)

    def revisions(self) -> list[tuple[int, Round, str]]:
        """(number from 1, round, text) of every revision that is fit to be used."""
        found = [(number, each, each.revision) for number, each in enumerate(self.rounds, 1)]
        return [(number, each, said.text) for number, each, said in found if said is not None and not said.fault]

    def ask(self, constitution: Constitution, seed: int, step: Step) -> list[Message]:
        """The turns to which the text of `step` is the answer. The first step of a round draws its principle."""
        if step.kind == "response":
            return self.prompt
        if len(self.rounds) < step.round:
            self.rounds.append(Round(drawn(constitution.principles, seed, self.prompt_id, step.round).id))
        principle, critique = constitution.of(self.rounds[-1].principle_id), self.rounds[-1].critique
        asked = [(principle.critique, critique.text)] if critique else []
        request = principle.critique if step.kind == "critique" else principle.revision
        return [
            *_examples(constitution, with_critique=step.kind == "critique" or bool(critique)),
            *self.prompt,
            {"role": "assistant", "content": self._answer()},
            *(turn for request, reply in asked for turn in _exchange(request, reply)),
            {"role": "user", "content": request},
        ]

    def hear(self, step: Step, said: Said) -> None:
        """Takes the text of `step`; one that is cut short or empty ends the transcript."""
        if step.kind == "response":
            self.response = said
        else:
            setattr(self.rounds[-1], step.kind, said)
        if said.fault:
            self.drop(step, said.fault)

    def drop(self, step: Step, cause: str) -> None:
        self.dropped = f"{step.kind} {step.round}: {cause}" if step.round else f"{step.kind}: {cause}"

    def _answer(self) -> str:
        """What the present round works on."""
        answers = [self.response, *(each.revision for each in self.rounds)]
        return [answer.text for answer in answers if answer is not None][-1]


def drawn(principles: Sequence[Principle], seed: int, prompt_id: int, round_number: int) -> Principle:
    """The principle of a round, drawn with replacement."""
    return Random(f"{seed} {prompt_id} {round_number}").choice(principles)


def sft_rows(transcript: Transcript, keep: Literal["all", "last"]) -> list[dict[str, Any]]:
    """Rows of `messages` for fine-tuning, one a revision."""
    revisions = transcript.revisions()
    return [
        {
            "messages": [*transcript.prompt, {"role": "assistant", "content": text}],
            "prompt_id": transcript.prompt_id,
            "round": number,
            "principle_id": each.principle_id,
        }
        for number, each, text in (revisions if keep == "all" else revisions[-1:])
    ]


def _examples(constitution: Constitution, with_critique: bool) -> list[Message]:
    """The constitution's examples as earlier turns, in the form that is asked for."""
    turns: list[Message] = []
    for example in constitution.examples:
        principle = constitution.of(example.principle)
        turns += _exchange(example.prompt, example.response)
        turns += _exchange(principle.critique, example.critique) if with_critique else []
        turns += _exchange(principle.revision, example.revision)
    return turns


def _exchange(user: str, assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _said(fields: Mapping[str, Any] | None) -> Said | None:
    return None if fields is None else Said(**fields)
