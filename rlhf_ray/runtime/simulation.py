"""The real controller over simulated actors: seeded latencies with long tails, stragglers, failures, and a clock.

Everything that can happen on a cluster happens here in microseconds, in an order that the seed alone decides, so a
schedule that breaks an invariant can be played again.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rlhf_ray.errors import DeadlineError
from rlhf_ray.runtime.admission import Terms
from rlhf_ray.runtime.controller import Controller, Done, Ended, Event, Finished, Joined, Lost, Scored
from rlhf_ray.runtime.ledger import Landed, Ledger


@dataclass(frozen=True)
class World:
    """How long things take, in seconds, and what goes wrong."""

    engines: int = 2
    kv_tokens: float = 1e9
    """Room of an engine."""
    prompt_tokens: int = 10
    answer_tokens: float = 100.0
    """Median; lengths are lognormal."""
    sigma: float = 1.0
    token_s: float = 0.01
    """Of decoding one token; the answers of an engine are decoded at the same time."""
    score_s: float = 0.1
    learn_s: float = 1.0
    publish_s: float = 0.02
    failures_per_s: float = 0.0
    """Of each engine."""
    restart_s: float = 5.0
    late_share: float = 0.0
    """Share of chunks of an engine that died which arrive after its death."""
    dull_share: float = 0.0
    """Share of groups whose answers are all paid alike."""
    notice_s: float = 0.5
    """Until a death is known."""
    patience_s: float = 1e5
    """Longest run, after which the schedule is taken to be stuck."""


@dataclass(frozen=True)
class Request:
    version: int
    """Of the weights when it was sent."""
    sent: float
    due: float


@dataclass
class Outcome:
    """What a simulated run comes to."""

    history: list[dict[str, Any]]
    seconds: float
    learner_busy_s: float
    engine_busy_s: float
    """Seconds in which an engine had something to do, a mean over engines."""
    trained: int
    """Groups; those that a killed process trained included."""


class SimulatedFleet:
    """A heap of things that will happen. Implements `controller.Fleet`."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.random = world, np.random.default_rng(seed)
        self.now = 0.0
        self.version = 0
        self.under_way: dict[int, dict[int, Request]] = {engine: {} for engine in range(world.engines)}
        self.incarnation = dict.fromkeys(range(world.engines), 0)
        self.alive = dict.fromkeys(range(world.engines), True)
        self.calls: dict[int, bool] = {}
        self.engine_busy_s = 0.0
        self.learner_busy_s = 0.0
        self._busy_since: dict[int, float] = {}
        self._heap: list[tuple[float, int, Any]] = []
        self._count = 0
        self._waiting_to_join: list[int] = []
        self._publishing = False
        for engine in range(world.engines):
            self._at(0.0, Joined(engine, 0, world.kv_tokens))
            self._plan_failure(engine)

    def generate(self, engine: int, groups: Sequence[int]) -> None:
        if not self.alive[engine]:
            return  # the news of its death is on the way
        for group in groups:
            took = self.world.token_s * self.world.answer_tokens * self.random.lognormal(0.0, self.world.sigma)
            if not self.under_way[engine]:
                self._busy_since[engine] = self.now
            self.under_way[engine][group] = Request(self.version, self.now, self.now + took)
            self._at(self.now + took, ("land", engine, self.incarnation[engine], group))

    def abort(self) -> None:
        for engine, groups in self.under_way.items():
            if groups and self.alive[engine]:
                self._at(self.now, Ended(engine, self.incarnation[engine], tuple(groups)))
                self._idle(engine)
                groups.clear()

    def learn(self) -> int:
        took = self.world.learn_s * self.random.uniform(0.8, 1.2)
        self.learner_busy_s += took
        return self._call(took)

    def publish(self) -> int:
        """Engines have the new weights somewhere within the call; those that start meanwhile wait for its end."""
        took = self.world.publish_s * self.random.uniform(0.5, 2.0)
        self._publishing = True
        self._at(self.now + took * self.random.uniform(), ("switch",))
        return self._call(took)

    def next(self, call: int | None) -> Event:
        while True:
            if call is not None and self.calls.get(call):
                del self.calls[call]
                return Done(None)
            if not self._heap:
                raise DeadlineError("nothing will ever happen again, and the controller waits")
            self.now, _, what = heapq.heappop(self._heap)
            if self.now > self.world.patience_s:
                raise DeadlineError(f"after {self.now:g} simulated seconds the controller still waits")
            event = what if isinstance(what, Event) else self._happen(*what)
            if event is not None:
                return event

    def _happen(self, what: str, *details: Any) -> Event | None:
        return getattr(self, f"_{what}")(*details)

    def _land(self, engine: int, incarnation: int, group: int) -> Event | None:
        if incarnation != self.incarnation[engine] or group not in self.under_way[engine]:
            return None
        request = self.under_way[engine][group]
        if request.due != self.now:  # of an earlier time that it was sent here
            return None
        del self.under_way[engine][group]
        if not self.under_way[engine]:
            self._idle(engine)
        return self._arrive(engine, incarnation, group, request)

    def _arrive(self, engine: int, incarnation: int, group: int, request: Request) -> Event:
        chunk = object()
        dull = frozenset({group} if self.random.uniform() < self.world.dull_share else ())
        self._at(self.now + self.world.score_s * self.random.lognormal(0.0, 0.5), Scored((group,), chunk, dull))
        tokens = int((request.due - request.sent) / self.world.token_s) + 1
        landed = Landed(group, request.version, max(request.version, self.version), tokens)
        return Finished(engine, incarnation, (landed,), chunk)

    def _fail(self, engine: int, incarnation: int) -> None:
        if incarnation != self.incarnation[engine]:
            return
        self.alive[engine] = False
        lost = self.under_way[engine]
        for group, request in lost.items():
            if self.random.uniform() < self.world.late_share:
                late = self.now + self.random.exponential(self.world.restart_s)
                self._at(late, ("arrive", engine, incarnation, group, request))
        if lost:
            self._idle(engine)
        lost.clear()
        self.incarnation[engine] += 1
        noticed = self.now + self.world.notice_s * self.random.uniform()
        self._at(noticed, Lost(engine, incarnation, "simulated failure"))
        self._at(noticed + self.world.restart_s * self.random.uniform(0.5, 2.0), ("restart", engine))

    def _restart(self, engine: int) -> Event | None:
        if self._publishing:
            self._waiting_to_join.append(engine)
            return None
        self.alive[engine] = True
        self._plan_failure(engine)
        return Joined(engine, self.incarnation[engine], self.world.kv_tokens)

    def _switch(self) -> None:
        self.version += 1

    def _end(self, call: int) -> None:
        self.calls[call] = True
        if self._publishing:
            self._publishing = False
            for engine in self._waiting_to_join:
                self._at(self.now, ("restart", engine))
            self._waiting_to_join.clear()

    def _call(self, took: float) -> int:
        self._count += 1
        call = self._count
        self.calls[call] = False
        self._at(self.now + took, ("end", call))
        return call

    def _idle(self, engine: int) -> None:
        self.engine_busy_s += self.now - self._busy_since.pop(engine)

    def _plan_failure(self, engine: int) -> None:
        if self.world.failures_per_s:
            when = self.now + self.random.exponential(1 / self.world.failures_per_s)
            self._at(when, ("fail", engine, self.incarnation[engine]))

    def _at(self, when: float, what: Any) -> None:
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, what))


def simulate(
    terms: Terms,
    world: World,
    seed: int,
    in_flight: Literal["keep", "wait", "abort"] = "keep",
    answers: int = 1,
    kills: Sequence[tuple[int, int]] = (),
) -> Outcome:
    """A whole run: every update collected, learned from and published. Raises what the controller raises.

    Each of `kills` (saved, killed) ends the process in update `killed`, once it has its batch; the next one goes on
    from the checkpoint after `saved` updates.
    """
    history: list[dict[str, Any]] = []
    states: dict[int, dict[str, Any]] = {}
    first, began, trained = 0, 0.0, 0
    for start in range(len(kills) + 1):
        fleet = SimulatedFleet(world, seed + 1_000_003 * start)
        fleet.now, fleet.version = began, first - 1 if start else 0
        controller = Controller(
            terms,
            fleet,
            Ledger(lambda row: history.append(dict(row)), lambda: fleet.now),  # noqa: B023
            lambda _: (world.prompt_tokens, answers),
            longest=round(4 * world.answer_tokens),
            in_flight=in_flight,
            version=fleet.version,
        )
        if start:
            controller.resume(states[first])
            controller.publish(first, fleet.publish)
        else:
            controller.begin()
        for update in range(first, terms.updates):
            batch = controller.collect(update)
            if start < len(kills) and update == kills[start][1]:
                first, began = kills[start][0], fleet.now
                break
            trained += len(batch.groups)
            controller.learn(update, fleet.learn())
            controller.publish(update + 1, fleet.publish)
            states[update + 1] = controller.state()
    controller.end()
    return Outcome(history, fleet.now, fleet.learner_busy_s, fleet.engine_busy_s / world.engines, trained)
