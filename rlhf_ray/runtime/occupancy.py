"""Who had something to do, and when: from the events of a history, for metrics as they come and for a trace of all."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

LEARNER, SCORING = "learner", "reference and reward"
ROLES = ("rollout", "scoring", "learner")


class Occupancy:
    """Busy seconds of each actor since the last `finish`. An actor is busy while anything is under way there."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._began = now()
        self._engines: set[str] = set()
        self._under_way: dict[str, set[Any]] = {}
        self._since: dict[str, float] = {}
        self._busy: dict[str, float] = {}

    def see(self, row: Mapping[str, Any]) -> None:
        """The next event."""
        at = row["time"]
        match row["event"]:
            case "joined":
                self._engines.add(row["actor"])
            case "sent":
                self._add(row["actor"], row["groups"], at)
            case "returned":
                self._remove(row["actor"], row["groups"], at)
            case "finished":
                self._remove(row["actor"], row["groups"], at)
                self._add(SCORING, row["groups"], at)
            case "scored":
                self._remove(SCORING, row["groups"], at)
            case "training" | "publishing":
                self._add(LEARNER, [row["event"]], at)
            case "trained":
                self._remove(LEARNER, ["training"], at)
            case "published":
                self._remove(LEARNER, ["publishing"], at)

    def finish(self) -> dict[str, float]:
        """`busy/*` as shares of the time since the last call; that of engines is their mean."""
        now = self._now()
        for actor in self._since:
            self._count(actor, now)
            self._since[actor] = now
        wall = max(now - self._began, 1e-9)
        engines = sum(self._busy.get(engine, 0.0) for engine in self._engines) / max(1, len(self._engines))
        seconds = (engines, self._busy.get(SCORING, 0.0), self._busy.get(LEARNER, 0.0))
        self._busy.clear()
        self._began = now
        return {f"busy/{role}": min(1.0, spent / wall) for role, spent in zip(ROLES, seconds, strict=True)}

    def _add(self, actor: str, what: Iterable[Any], at: float) -> None:
        under_way = self._under_way.setdefault(actor, set())
        if not under_way:
            self._since[actor] = at
        under_way.update(what)

    def _remove(self, actor: str, what: Iterable[Any], at: float) -> None:
        under_way = self._under_way[actor]
        under_way.difference_update(what)
        if not under_way and actor in self._since:
            self._count(actor, at)
            del self._since[actor]

    def _count(self, actor: str, until: float) -> None:
        self._busy[actor] = self._busy.get(actor, 0.0) + max(0.0, until - self._since[actor])


def trace(history: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """A Chrome trace, as Perfetto reads it: a row for each actor, a span for each group or step that it had."""
    lanes: dict[str, int] = {}
    events: list[dict[str, Any]] = []

    def mark(row: Mapping[str, Any], phase: str, actor: str, name: str, number: Any) -> None:
        lane = lanes.setdefault(actor, len(lanes) + 1)
        events.append(
            {
                "ph": phase,
                "cat": "rlhf-ray",
                "name": name,
                "id": f"{name} {number}",
                "pid": lane,
                "tid": lane,
                "ts": round(row["time"] * 1e6),
                "args": {"number": number},
            }
        )

    steps = {
        "training": ("b", "update", "update"),
        "trained": ("e", "update", "update"),
        "publishing": ("b", "publish", "version"),
        "published": ("e", "publish", "version"),
    }
    for row in history:
        event = row["event"]
        if event in steps:
            phase, name, key = steps[event]
            mark(row, phase, LEARNER, name, row[key])
        for group in row.get("groups", ()):
            if event in ("sent", "returned", "finished"):
                mark(row, "b" if event == "sent" else "e", row["actor"], "generate", group)
            if event in ("finished", "scored"):
                mark(row, "b" if event == "finished" else "e", SCORING, "score", group)
        if event in ("lost", "joined", "dropped"):
            lane = lanes.setdefault(row["actor"], len(lanes) + 1)
            events.append(
                {"ph": "i", "s": "p", "name": event, "pid": lane, "tid": lane, "ts": round(row["time"] * 1e6)}
            )
    names = [
        {"ph": "M", "name": "process_name", "pid": lane, "tid": lane, "args": {"name": actor}}
        for actor, lane in lanes.items()
    ]
    return {"traceEvents": names + events, "displayTimeUnit": "ms"}
