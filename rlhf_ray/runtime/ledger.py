"""The life of every group of samples: one state at a time, legal steps only, every step written down.

A group is a prompt with all its answers: one request, scored together, trained in the same update. Its number is the
prompt's place in the data order, so its samples are known by it: number * samples a prompt, and so on. What is over is
forgotten here, so memory holds what is under way and not what has been; the history has all of it. What must never
happen: a group trained twice, a group gone without a cause.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from rlhf_ray.errors import TrainingError

Write = Callable[[Mapping[str, Any]], None]


class State(StrEnum):
    ADMITTED = "admitted"
    GENERATING = "generating"
    FINISHED = "finished"
    SCORED = "scored"


@dataclass(frozen=True)
class Landed:
    """A group that is generated to its end."""

    number: int
    oldest: int
    """Version of the weights that sampled its oldest token, and its newest."""
    newest: int
    tokens: int
    """Generated, all its answers together."""


@dataclass
class Group:
    """One that is under way."""

    number: int
    deadline: int
    """The last update that may train it."""
    refill: int = 0
    """How many groups before it in its place were dropped."""
    state: State = State.ADMITTED
    engine: int = -1
    """Where it was sent, if it was, to which start of that engine, and at which version of the weights."""
    incarnation: int = -1
    version: int = -1
    oldest: int = -1
    """Version of the weights that its oldest token was sampled by, once it is finished, and how many tokens it has."""
    tokens: int = 0


class Ledger:
    """Groups under way, and the history of all. `write` is given each event as it happens; `now` is the clock."""

    def __init__(self, write: Write, now: Callable[[], float] = time.time) -> None:
        self._write, self._now = write, now
        self.groups: dict[int, Group] = {}

    def note(self, event: str, actor: str, **facts: Any) -> None:
        """An event that changes no group."""
        self._write({"time": round(self._now(), 6), "event": event, "actor": actor, **facts})

    def admit(self, groups: Iterable[Group], version: int) -> None:
        added = list(groups)
        for group in added:
            if group.number in self.groups:
                raise TrainingError(f"group {group.number} was admitted twice: a defect of the controller")
            self.groups[group.number] = group
        if added:
            self.note("admitted", "controller", version=version, groups=[group.number for group in added])

    def under_way(self) -> list[tuple[int, int]]:
        """Number of each group, ascending, and how many were dropped before it in its place."""
        return [(number, group.refill) for number, group in sorted(self.groups.items())]

    def resume(self, groups: Iterable[Group], version: int, update: int, number: int) -> None:
        """A run goes on before `update`, with `groups` under way and `number` as the next group's."""
        self.groups = {group.number: group for group in groups}
        self.note("resumed", "controller", version=version, update=update, number=number, groups=list(self.groups))

    def sent(self, numbers: Iterable[int], engine: int, incarnation: int, version: int) -> None:
        sent = self._step(numbers, State.ADMITTED, State.GENERATING)
        for group in sent:
            group.engine, group.incarnation, group.version = engine, incarnation, version
        self._of_engine("sent", engine, incarnation, version=version, groups=_numbers(sent))

    def returned(self, numbers: Iterable[int], why: str) -> None:
        """Of what was being generated nothing is left: it waits to be sent anew."""
        back = self._step(numbers, State.GENERATING, State.ADMITTED)
        if back:
            self._of_engine("returned", back[0].engine, back[0].incarnation, groups=_numbers(back), cause=why)

    def finished(self, landed: Sequence[Landed], engine: int, incarnation: int) -> None:
        done = self._step([group.number for group in landed], State.GENERATING, State.FINISHED)
        for group, how in zip(done, landed, strict=True):
            group.oldest, group.tokens = how.oldest, how.tokens
        self._of_engine(
            "finished",
            engine,
            incarnation,
            groups=_numbers(done),
            oldest=[how.oldest for how in landed],
            newest=[how.newest for how in landed],
            tokens=[how.tokens for how in landed],
        )

    def scored(self, numbers: Iterable[int]) -> None:
        done = self._step(numbers, State.FINISHED, State.SCORED)
        self.note("scored", "reference and reward", groups=_numbers(done))

    def train(self, numbers: Iterable[int], update: int) -> None:
        """They are in the batch of `update`, and over."""
        taken = self._step(numbers, State.SCORED, State.SCORED)
        for group in taken:
            del self.groups[group.number]
        self.note("training", "learner", update=update, groups=_numbers(taken))

    def drop(self, numbers: Iterable[int], cause: str) -> list[Group]:
        """They will not be trained, whatever state they are in."""
        gone = [self.groups.pop(number) for number in numbers]
        if gone:
            self.note("dropped", "controller", groups=_numbers(gone), cause=cause)
        return gone

    def _step(self, numbers: Iterable[int], before: State, after: State) -> list[Group]:
        found = []
        for number in numbers:
            group = self.groups.get(number)
            if group is None or group.state != before:
                what = "over or was never admitted" if group is None else group.state
                raise TrainingError(f"group {number} should be {before} to become {after}, but it is {what}")
            group.state = after
            found.append(group)
        return found

    def _of_engine(self, event: str, engine: int, incarnation: int, **facts: Any) -> None:
        self.note(event, f"rollout {engine}", incarnation=incarnation, **facts)


def _numbers(groups: Iterable[Group]) -> list[int]:
    return [group.number for group in groups]
