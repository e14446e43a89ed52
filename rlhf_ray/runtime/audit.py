"""Was every sample accounted for? A verdict from a run's history alone, by rules of its own.

Nothing of the code that wrote the history is used to read it: the same mistake in both would not be seen.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_ray.errors import DataError

SHOWN = 10
"""Faults that a verdict lists."""
AT = {
    "sent": "admitted",
    "returned": "generating",
    "finished": "generating",
    "scored": "finished",
    "training": "scored",
}
"""Event -> where a group must be in its life for it."""
BECOMES = {"sent": "generating", "returned": "admitted", "finished": "finished", "scored": "scored"}


@dataclass
class Verdict:
    """What the history comes to."""

    faults: list[str] = field(default_factory=list)
    admitted: int = 0
    trained: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """By cause."""
    under_way: int = 0
    """Neither trained nor dropped at the end of the history."""
    updates: int = 0
    complete: bool = False
    """Whether the run says that it reached its end."""
    staleness: Counter[int] = field(default_factory=Counter)
    """Updates by which the oldest token of a group was old when it was trained -> groups."""

    @property
    def good(self) -> bool:
        return not self.faults

    def __str__(self) -> str:
        gone = ", ".join(f"{count} dropped ({cause})" for cause, count in sorted(self.dropped.items()))
        ages = ", ".join(f"{age}: {count}" for age, count in sorted(self.staleness.items()))
        lines = [
            f"{self.admitted} groups admitted: {self.trained} trained in {self.updates} updates"
            + (f", {gone}" if gone else "")
            + (f", {self.under_way} under way when the history ends" if self.under_way else ""),
            f"groups by age of their oldest token, in updates: {ages or 'none trained'}",
            *self.faults[:SHOWN],
            *([f"... and {len(self.faults) - SHOWN} more"] if len(self.faults) > SHOWN else []),
            "verdict: " + self._judgement(),
        ]
        return "\n".join(lines)

    def _judgement(self) -> str:
        if self.faults:
            return f"{len(self.faults)} fault{'s' * (len(self.faults) > 1)}: this history is not one of a sound run"
        end = "the run is complete" if self.complete else "the run did not reach its end"
        return f"every sample is accounted for; {end}"


def read(run: Path) -> list[dict[str, Any]]:
    """The history of a run's folder. Raises DataError when there is none. A last line that was cut off is left out."""
    path = run / "history.jsonl" if run.is_dir() else run
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: no history can be read ({error.strerror}); give the folder of a PPO run") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise DataError(f"{path}, line {number}: not JSON; the history is damaged") from None
    return rows


def audit(history: Iterable[Mapping[str, Any]]) -> Verdict:
    """Goes through the events in their order."""
    auditor = _Auditor()
    for row in history:
        auditor.see(row)
    return auditor.finish()


@dataclass(frozen=True)
class Over:
    """How a group ended."""

    how: str
    update: int | None = None
    """That trained it; none: it was dropped."""
    age: int = 0
    cause: str = ""


class _Auditor:
    def __init__(self) -> None:
        self.verdict = Verdict()
        self.terms: Mapping[str, Any] = {}
        self.at: dict[int, str] = {}
        """Group under way -> where it is in its life."""
        self.sent: dict[int, tuple[str, int, int]] = {}
        """Group -> engine, its incarnation, and the version published when it was sent."""
        self.oldest: dict[int, int] = {}
        self.over: dict[int, Over] = {}
        self.serving: dict[str, int] = {}
        """Engine -> the incarnation that serves."""
        self.published = -1
        self.newest = -1
        """Version that a publication has begun of: an engine may have it already."""
        self.next_group = 0
        self.next_update = 0
        self.training = False

    def see(self, row: Mapping[str, Any]) -> None:
        event = row["event"]
        if not self.terms and event != "began":
            self.fault(row, "the history does not begin with its terms")
            self.terms = {"max_staleness": 0, "groups_per_update": 0, "updates": 0}
        handler: Callable[[Mapping[str, Any]], None] | None = getattr(self, f"_{event}", None)
        if handler is None:
            self.fault(row, f"unknown event '{event}'")
        else:
            handler(row)

    def finish(self) -> Verdict:
        verdict = self.verdict
        verdict.under_way = len(self.at)
        verdict.admitted = len(self.at) + len(self.over)
        ended = list(self.over.values())
        verdict.trained = sum(over.update is not None for over in ended)
        verdict.staleness.update(over.age for over in ended if over.update is not None)
        verdict.dropped.update(over.cause for over in ended if over.update is None)
        verdict.updates = self.next_update - self.training
        if verdict.complete and self.at:
            some = ", ".join(map(str, sorted(self.at)[:5]))
            verdict.faults.append(f"the run is complete, but {len(self.at)} groups were lost without a word: {some}")
        if verdict.complete and verdict.updates != self.terms["updates"]:
            verdict.faults.append(f"{verdict.updates} of {self.terms['updates']} updates were trained")
        return verdict

    def fault(self, row: Mapping[str, Any], what: str) -> None:
        self.verdict.faults.append(f"at {row['time']}: {what}")

    def _began(self, row: Mapping[str, Any]) -> None:
        if self.terms:
            self.fault(row, "it begins twice")
        self.terms = row
        self.published = self.newest = row["version"]

    def _resumed(self, row: Mapping[str, Any]) -> None:
        """From a checkpoint: what came after it has not been, and what was under way is begun anew."""
        update, number, under_way = row["update"], row["number"], set(row["groups"])
        kept = {
            group: over
            for group, over in self.over.items()
            if group not in under_way and group < number and (over.update is None or over.update < update)
        }
        for group in under_way:
            over = self.over.get(group)
            if over and over.update is not None and over.update < update:
                self.fault(row, f"group {group} is to be trained again, but it is {over.how}")
        lost = [group for group in range(min(number, self.next_group)) if group not in kept and group not in under_way]
        if lost:
            self.fault(row, f"{len(lost)} groups were forgotten, group {lost[0]} among them")
        if update > self.next_update - self.training:
            self.fault(row, f"goes on before update {update}, and only {self.next_update} were trained")
        self.over, self.at = kept, dict.fromkeys(sorted(under_way), "admitted")
        self.sent.clear()
        self.oldest.clear()
        self.serving.clear()
        self.published = self.newest = row["version"]
        self.next_update, self.next_group, self.training = update, number, False

    def _ended(self, row: Mapping[str, Any]) -> None:
        self.verdict.complete = True

    def _joined(self, row: Mapping[str, Any]) -> None:
        self.serving[row["actor"]] = row["incarnation"]

    def _lost(self, row: Mapping[str, Any]) -> None:
        self.serving.pop(row["actor"], None)

    def _publishing(self, row: Mapping[str, Any]) -> None:
        if self.training:
            self.fault(row, "weights are published while an update is under way")
        if row["version"] != self.published + 1:
            self.fault(row, f"weights {row['version']} follow weights {self.published}")
        self.newest = row["version"]

    def _published(self, row: Mapping[str, Any]) -> None:
        if row["version"] != self.newest:
            self.fault(row, f"weights {row['version']} were published, but {self.newest} were on their way")
        self.published = row["version"]

    def _admitted(self, row: Mapping[str, Any]) -> None:
        for group in row["groups"]:
            if group != self.next_group:
                self.fault(row, f"group {group} was admitted where {self.next_group} was next")
            self.next_group = group + 1
            self.at[group] = "admitted"

    def _sent(self, row: Mapping[str, Any]) -> None:
        self._of_serving(row)
        if row["version"] != self.published:
            self.fault(row, f"sent as with weights {row['version']}, but {self.published} were published")
        for group in self._step(row):
            self.sent[group] = (row["actor"], row["incarnation"], row["version"])

    def _returned(self, row: Mapping[str, Any]) -> None:
        self._step(row)

    def _finished(self, row: Mapping[str, Any]) -> None:
        self._of_serving(row)
        stepped = set(self._step(row))
        for group, oldest, newest in zip(row["groups"], row["oldest"], row["newest"], strict=True):
            if group not in stepped:
                continue
            actor, incarnation, version = self.sent[group]
            if (actor, incarnation) != (row["actor"], row["incarnation"]):
                self.fault(row, f"group {group} was sent to {actor} ({incarnation}) and came from {row['actor']}")
            if not version <= oldest <= newest <= self.newest:
                self.fault(
                    row,
                    f"group {group} has tokens of weights {oldest} to {newest}; sent with {version}, the newest then "
                    f"are {self.newest}",
                )
            self.oldest[group] = oldest

    def _scored(self, row: Mapping[str, Any]) -> None:
        self._step(row)

    def _training(self, row: Mapping[str, Any]) -> None:
        update = row["update"]
        if update != self.next_update:
            self.fault(row, f"update {update} where {self.next_update} was next")
        if update != self.published:
            self.fault(row, f"update {update} began with weights {self.published} published")
        if len(row["groups"]) > self.terms["groups_per_update"]:
            self.fault(row, f"update {update} trains {len(row['groups'])} groups")
        for group in self._step(row):
            age = update - self.oldest.pop(group)
            if age > self.terms["max_staleness"]:
                self.fault(
                    row, f"group {group} is {age} updates old, at most {self.terms['max_staleness']} were agreed"
                )
            self._end(group, Over(f"trained in update {update}", update, age))
        self.next_update = update + 1
        self.training = True

    def _trained(self, row: Mapping[str, Any]) -> None:
        if not self.training or row["update"] != self.next_update - 1:
            self.fault(row, f"update {row['update']} ended, which was not under way")
        self.training = False

    def _dropped(self, row: Mapping[str, Any]) -> None:
        for group in row["groups"]:
            if group not in self.at:
                self.fault(row, f"group {group} was dropped, but it is {self._whereabouts(group)}")
                continue
            self._end(group, Over(f"dropped ({row['cause']})", cause=row["cause"]))

    def _step(self, row: Mapping[str, Any]) -> list[int]:
        """Groups for which the event was due."""
        event, found = row["event"], []
        for group in row["groups"]:
            where = self.at.get(group)
            if where != AT[event]:
                self.fault(row, f"group {group}: {event}, but it is {self._whereabouts(group)}")
                continue
            if event in BECOMES:
                self.at[group] = BECOMES[event]
            found.append(group)
        return found

    def _whereabouts(self, group: int) -> str:
        return self.at.get(group) or (self.over[group].how if group in self.over else "unknown")

    def _end(self, group: int, how: Over) -> None:
        del self.at[group]
        self.sent.pop(group, None)
        self.over[group] = how

    def _of_serving(self, row: Mapping[str, Any]) -> None:
        if self.serving.get(row["actor"]) != row["incarnation"]:
            self.fault(row, f"{row['event']}: {row['actor']} ({row['incarnation']}) does not serve")
