"""Ray's actors as the controller's fleet: what happens in them becomes one event after the other.

References go from actor to actor; of columns only a note of what is in a chunk is looked into here. Scoring of a chunk
begins as it arrives, while others are still being generated.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import ray
from ray import exceptions

from rlhf_ray import interrupts
from rlhf_ray.records import Arrived, Ragged
from rlhf_ray.runtime.controller import Done, Ended, Event, Finished, Joined, Scored
from rlhf_ray.runtime.deadlines import explained, late
from rlhf_ray.runtime.ledger import Landed
from rlhf_ray.runtime.pools import LeastLoaded
from rlhf_ray.stages.roles import Chunk, Roles
from rlhf_ray.telemetry.clock import PhaseClock

LOOK_UP_S = 0.5
"""A stop that was asked for is seen within this time."""


@dataclass
class Call:
    """Something that all of several actors do and the controller waits for."""

    refs: list[Any]
    who: str
    doing: str
    phase: Literal["learn", "publish"]
    results: dict[Any, Any] = field(default_factory=dict)


@dataclass
class Stream:
    """What one call to an engine sends."""

    engine: int
    groups: Sequence[int]
    note: Arrived | None = None
    """Of the chunk that comes next."""


@dataclass
class Scoring:
    """A chunk with the roles that score it."""

    groups: list[int]
    chunk: Chunk
    waiting: list[Any]
    dull: Any | None
    """Numbers of the prompts without signal, where that matters."""


class RayFleet:
    """Implements `runtime.controller.Fleet`. Waits count to the clock's phases."""

    def __init__(self, roles: Roles, prompt: Callable[[int], np.ndarray], clock: PhaseClock) -> None:
        """`prompt` of a group's number: its token ids."""
        self.roles, self.prompt, self.clock = roles, prompt, clock
        self.config = roles.config
        self._streams: list[tuple[Any, Stream]] = []
        self._scoring: list[Scoring] = []
        self._events: list[Event] = [
            # A chunk that is finished but not yet sent holds no cache.
            Joined(number, 0, kv_tokens + self.config.learner.tokens_per_micro_batch)
            for number, kv_tokens in enumerate(roles.kv_tokens)
        ]
        self._references = LeastLoaded(max(1, len(roles.references)))
        self._rewards = LeastLoaded(len(roles.rewards))

    def generate(self, engine: int, groups: Sequence[int]) -> None:
        samples = self.config.rollout.samples_per_prompt
        stream = self.roles.engines[engine].stream.options(num_returns="streaming")
        prompts = Ragged.of([self.prompt(number) for number in groups], np.int32)
        ids = np.array(groups, np.int64) * samples
        ref = stream.remote(prompts, ids, self.config.seed, self.config.learner.tokens_per_micro_batch)
        self._streams.append((ref, Stream(engine, groups)))

    def abort(self) -> None:
        self.roles.abort()

    def next(self, call: Call | None) -> Event:
        phase = call.phase if call else "generate" if self._streams else "score"
        with self.clock.phase(phase):
            waited_from = time.monotonic()
            while not self._events:
                interrupts.Interrupt.check()
                if not self._look(call) and time.monotonic() - waited_from > self.roles.deadline_s:
                    raise late(*self._outstanding(call), self.roles.deadline_s)
            return self._events.pop(0)

    def _look(self, call: Call | None) -> bool:
        """Turns what has happened into events; whether anything has."""
        streams = [ref for ref, _ in self._streams]
        scores = [ref for scoring in self._scoring for ref in scoring.waiting]
        calls = [ref for ref in call.refs if ref not in call.results] if call else []
        ready, _ = ray.wait([*calls, *streams, *scores], num_returns=1, timeout=LOOK_UP_S, fetch_local=False)
        for ref in ready:
            if ref in calls:
                assert call is not None
                self._answered(call, ref)
            elif any(ref is stream for stream in streams):
                self._arrived(ref)
            else:
                self._scored(ref)
        return bool(ready)

    def _answered(self, call: Call, ref: Any) -> None:
        call.results[ref] = _get(ref, call.who, call.doing)
        if len(call.results) == len(call.refs):
            self._events.append(Done([call.results[ref] for ref in call.refs]))

    def _arrived(self, ref: Any) -> None:
        """A note, then the chunk that it is of, and so on to the end."""
        stream = next(stream for other, stream in self._streams if other is ref)
        try:
            arrived = next(ref)
        except StopIteration:
            self._streams = [pair for pair in self._streams if pair[0] is not ref]
            self._events.append(Ended(stream.engine, 0, stream.groups))
            return
        except exceptions.RayError as error:
            raise explained(error, "rollout", "generating") from error
        if stream.note is None:
            stream.note = _get(arrived, "rollout", "generating")
            return
        note, stream.note = stream.note, None
        chunk = self._score(arrived, note.groups.tolist())
        columns = zip(note.groups, note.oldest, note.newest, note.tokens, strict=True)
        landed = [Landed(*(int(number) for number in row)) for row in columns]
        self._events.append(Finished(stream.engine, 0, landed, chunk))

    def _score(self, trajectories: Any, groups: list[int]) -> Chunk:
        roles = self.roles
        reference = None
        if roles.references:
            reference = roles.references[self._references.assign(1)].score.remote(trajectories)
        scores = roles.rewards[self._rewards.assign(1)].scores.remote(trajectories)
        chunk = Chunk(trajectories, reference, scores)
        dull = roles.without_signal(chunk) if self.config.ppo.algorithm.needs_signal else None
        waiting = [ref for ref in (reference, scores, dull) if ref is not None]
        self._scoring.append(Scoring(groups, chunk, waiting, dull))
        return chunk

    def _scored(self, ref: Any) -> None:
        """An error of a scorer shows in the learner, who reads the column."""
        scoring = next(one for one in self._scoring if ref in one.waiting)
        scoring.waiting.remove(ref)
        if scoring.waiting:
            return
        self._scoring.remove(scoring)
        dull = _get(scoring.dull, "learner rank 0", "looking for signal") if scoring.dull is not None else ()
        self._events.append(Scored(scoring.groups, scoring.chunk, frozenset(dull)))

    def _outstanding(self, call: Call | None) -> tuple[str, str]:
        if call:
            return call.who, call.doing
        return ("rollout", "generating") if self._streams else ("reference and reward", "scoring")


def _get(ref: Any, who: str, doing: str) -> Any:
    """Of what is there already."""
    try:
        return ray.get(ref, timeout=60)
    except exceptions.RayError as error:
        raise explained(error, who, doing) from error
