"""What overlaps with what: generation and scoring go on while the learner trains and weights travel.

The controller decides from events alone and acts through a `Fleet`. On a cluster that is Ray's actors; in a simulation
it is a heap of seeded latencies and failures under the very same code. It holds numbers and handles, no columns, no
clock, no randomness.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from rlhf_ray.errors import GenerationError, PublicationError
from rlhf_ray.runtime.admission import Admission, Terms
from rlhf_ray.runtime.ledger import Landed, Ledger, State
from rlhf_ray.runtime.pools import Router


@dataclass(frozen=True)
class Finished:
    """A chunk of groups has come from an engine; scoring of it has begun."""

    engine: int
    incarnation: int
    groups: Sequence[Landed]
    chunk: Any
    """The fleet's handle of it."""


@dataclass(frozen=True)
class Ended:
    """An engine is done with what one `generate` asked of it; what it has not handed on was aborted."""

    engine: int
    incarnation: int
    groups: Sequence[int]


@dataclass(frozen=True)
class Scored:
    """Reference and reward have said what they have to say of a chunk's groups."""

    groups: Sequence[int]
    chunk: Any
    dull: frozenset[int] = frozenset()
    """Those among them whose answers are all paid alike, where that matters."""


@dataclass(frozen=True)
class Lost:
    """An engine is gone, with whatever it was generating."""

    engine: int
    incarnation: int
    why: str


@dataclass(frozen=True)
class Joined:
    """An engine serves, with the weights that were published last."""

    engine: int
    incarnation: int
    kv_tokens: float


@dataclass(frozen=True)
class Done:
    """The call that was waited for is over."""

    result: Any


Event = Finished | Ended | Scored | Lost | Joined | Done


class Fleet(Protocol):
    """What the controller acts through."""

    def generate(self, engine: int, groups: Sequence[int]) -> None:
        """Begins to answer these groups' prompts."""
        ...

    def abort(self) -> None:
        """Every engine gives up what it is generating; what that was is told by `Ended`."""
        ...

    def next(self, call: Any | None) -> Event:
        """Waits for what happens next, the end of `call` included. Raises DeadlineError when nothing does."""
        ...


@dataclass(frozen=True)
class Batch:
    """What an update trains on."""

    groups: list[int]
    """Ascending."""
    chunks: list[Any]
    """Handles of the chunks that they lie in, in order of their first group; other groups may lie there too."""
    staleness: list[int]
    """Of each group: updates between its oldest token's weights and those that it trains."""
    refills: int
    """Most groups that were dropped before one of these in its place."""
    dropped: int
    """Groups that were dropped since the last batch."""
    tokens: int
    """Generated for it: these groups' and the dropped ones'."""


class Controller:
    def __init__(
        self,
        terms: Terms,
        fleet: Fleet,
        ledger: Ledger,
        tokens: Callable[[int], tuple[int, int]],
        longest: int,
        in_flight: Literal["keep", "wait", "abort"] = "keep",
        version: int = 0,
    ) -> None:
        """`tokens` of a group: of its prompt, and how many answers it has; `longest` answer. `version` is served."""
        self.terms, self.fleet, self.ledger, self.in_flight = terms, fleet, ledger, in_flight
        self.version = version
        self.admission = Admission(terms)
        self._tokens = tokens
        self._answer_tokens = float(longest)
        """Expected length of an answer: the longest, until some have been seen."""
        self._router = Router()
        self._incarnations: dict[int, int] = {}
        self._to_send: deque[int] = deque()
        self._sent: dict[int, float] = {}
        """Group under way at an engine -> tokens that it was counted as."""
        self._chunks: dict[int, Any] = {}
        self._holding = False
        self._dropped: list[int] = []
        """Tokens of each group that was dropped since the last batch."""

    def begin(self) -> None:
        """The history begins with what was agreed."""
        self.ledger.note("began", "controller", version=self.version, **vars(self.terms))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: which prompts are under way, not what has become of them. They are begun anew."""
        return {
            **self.admission.state(),
            "under_way": self.ledger.under_way(),
            "dropped": self._dropped,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on from `state`, in place of `begin`; `version` is one before the weights that are published next."""
        groups = self.admission.restore(state, state["under_way"], self.version + 1)
        self.ledger.resume(groups, self.version, self.version + 1, self.admission.number)
        self._to_send.extend(group.number for group in groups)
        self._dropped = list(state["dropped"])

    def end(self) -> None:
        """Every update is trained."""
        self.ledger.note("ended", "controller")

    @property
    def generating(self) -> bool:
        return bool(self._sent)

    def collect(self, update: int) -> Batch:
        """Waits until there is what `update` trains on. Fewer groups than agreed if some places were left empty."""
        while True:
            self._dispatch()
            chosen = self.admission.take(update)
            if chosen is not None:
                return self._take(chosen, update)
            self._handle(self.fleet.next(None))

    def during(self, call: Any) -> Any:
        """The result of `call`, while everything else goes on."""
        while True:
            self._dispatch()
            event = self.fleet.next(call)
            if isinstance(event, Done):
                return event.result
            self._handle(event)

    def learn(self, update: int, call: Any) -> Any:
        """The result of `call`, which trains `update` on the batch that was collected for it."""
        result = self.during(call)
        self.ledger.note("trained", "learner", update=update)
        return result

    def publish(self, version: int, start: Callable[[], Any]) -> Any:
        """Publishes weights `version`: `start` begins to and returns the call. Its result.

        Meanwhile nothing new is sent. What is being generated goes on with the new weights (`keep`), is waited for
        (`wait`), or is given up and begun anew (`abort`).
        """
        self._holding = True
        if self.in_flight == "abort" and self.generating:
            self.fleet.abort()
        while self.in_flight != "keep" and self.generating:
            self._handle(self.fleet.next(None))
        self.ledger.note("publishing", "learner", version=version)
        result = self.during(start())
        self.version = version
        self._holding = False
        self.ledger.note("published", "learner", version=version)
        return result

    def _dispatch(self) -> None:
        """Admits and sends what may be."""
        admitted = self.admission.admit(self.version)
        self.ledger.admit(admitted, self.version)
        self._to_send.extend(group.number for group in admitted)
        lots: dict[int, list[int]] = {}
        while self._to_send and not self._holding:
            prompt, answers = self._tokens(self._to_send[0])
            cost = prompt + answers * self._answer_tokens
            engine = self._router.place(cost)
            if engine is None:
                break
            number = self._to_send.popleft()
            self._sent[number] = cost
            self.admission.sent(self.ledger.groups[number], self.version)
            lots.setdefault(engine, []).append(number)
        for engine, numbers in lots.items():
            self.ledger.sent(numbers, engine, self._incarnations[engine], self.version)
            self.fleet.generate(engine, numbers)

    def _handle(self, event: Event) -> None:
        match event:
            case Finished():
                self._finished(event)
            case Ended():
                self._give_back(self._still_at(event.groups, event.engine, event.incarnation), "aborted")
            case Scored():
                self._scored(event)
            case Lost():
                if self._incarnations.get(event.engine) == event.incarnation:
                    self._lose(event)
            case Joined():
                self.ledger.note("joined", f"rollout {event.engine}", incarnation=event.incarnation)
                self._incarnations[event.engine] = event.incarnation
                self._router.add(event.engine, event.kv_tokens)
            case Done():
                raise AssertionError("a call ended that nobody waits for")

    def _finished(self, event: Finished) -> None:
        """What an earlier start of an engine sends late is not taken: those groups were begun anew elsewhere."""
        here = self._still_at((group.number for group in event.groups), event.engine, event.incarnation)
        landed = [group for group in event.groups if group.number in here]
        for group in landed:
            self._check_version(group, event.engine)
            self._router.release(event.engine, self._sent.pop(group.number))
            self._chunks[group.number] = event.chunk
            # An average over the last few hundred groups, short ones no more than long ones.
            self._answer_tokens += 0.01 * (group.tokens / self._tokens(group.number)[1] - self._answer_tokens)
        if landed:
            self.ledger.finished(landed, event.engine, event.incarnation)

    def _check_version(self, group: Landed, engine: int) -> None:
        sent = self.ledger.groups[group.number].version
        if not sent <= group.oldest <= group.newest:
            raise PublicationError(
                f"rollout engine {engine} was sent group {group.number} with weights {sent} published, and sampled it "
                f"with weights {group.oldest} to {group.newest}: it served weights that it should no longer have"
            )

    def _scored(self, event: Scored) -> None:
        known = [
            number
            for number in event.groups
            if self._state(number) == State.FINISHED and self._chunks[number] is event.chunk
        ]
        self.ledger.scored(known)
        for number in known:
            if number not in event.dull:
                self.admission.is_ready(self.ledger.groups[number])
        for group in self.ledger.drop([number for number in known if number in event.dull], "no signal"):
            del self._chunks[group.number]
            self.admission.dropped(group)
            self._dropped.append(group.tokens)

    def _lose(self, event: Lost) -> None:
        self.ledger.note("lost", f"rollout {event.engine}", incarnation=event.incarnation, cause=event.why)
        self._give_back(self._still_at(list(self._sent), event.engine, event.incarnation), "engine lost")
        self._router.remove(event.engine)
        del self._incarnations[event.engine]

    def _give_back(self, numbers: set[int], why: str) -> None:
        """They are sent again before others: their deadlines are the nearest."""
        self.ledger.returned(sorted(numbers), why)
        for number in sorted(numbers, reverse=True):
            self._router.release(self.ledger.groups[number].engine, self._sent.pop(number))
            self._to_send.appendleft(number)

    def _still_at(self, numbers: Iterable[int], engine: int, incarnation: int) -> set[int]:
        groups = self.ledger.groups
        return {
            number
            for number in numbers
            if self._state(number) == State.GENERATING
            and (groups[number].engine, groups[number].incarnation) == (engine, incarnation)
        }

    def _state(self, number: int) -> State | None:
        group = self.ledger.groups.get(number)
        return group.state if group else None

    def _take(self, chosen: list[int], update: int) -> Batch:
        staleness = [update - self.ledger.groups[number].oldest for number in chosen]
        if staleness and max(staleness) > self.terms.max_staleness:
            raise GenerationError(
                f"update {update} would train on tokens {max(staleness)} updates old; ppo.max_staleness is "
                f"{self.terms.max_staleness}"
            )
        groups = [self.ledger.groups[number] for number in chosen]
        chunks = [self._chunks.pop(number) for number in chosen]
        self.ledger.train(chosen, update)
        dropped, self._dropped = self._dropped, []
        return Batch(
            chosen,
            list({id(chunk): chunk for chunk in chunks}.values()),
            staleness,
            refills=max((group.refill for group in groups), default=0),
            dropped=len(dropped),
            tokens=sum(group.tokens for group in groups) + sum(dropped),
        )
