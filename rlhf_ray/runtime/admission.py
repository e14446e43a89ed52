"""Which prompts may begin to be answered, and which answers an update trains: where staleness is bounded.

An update trains N groups. While the engines have the weights of version v (the policy after v updates), there is room
for the groups of v + S + 1 updates in all, S being `max_staleness`; a group that is sent at v has the deadline v + S,
the last update that may train it. So of all groups ever sent, no more than (d + 1) N have a deadline up to d, and the
updates up to d train as many: each can be trained by its deadline, none is thrown away for its age, and no token is
older than S updates when it is trained.

An update takes what is ready, the nearest deadlines first, as soon as what it leaves can still be trained in time: for
every d, at most (d - update) N groups that are due by d. A straggler holds up an update only if it must. At S = 0 this
is the synchronous algorithm.
"""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rlhf_ray.runtime.ledger import Group


@dataclass(frozen=True)
class Terms:
    """What the run has agreed to."""

    updates: int
    groups_per_update: int
    max_staleness: int = 0
    max_refills: int = 0
    """How often a group that is dropped for lack of signal is replaced in its place."""

    def deadline(self, version: int) -> int:
        """The last update that may train what was sampled by `version`."""
        return min(version + self.max_staleness, self.updates - 1)


@dataclass
class Admission:
    """Pure: numbers only."""

    terms: Terms
    number: int = 0
    """Of the next group."""
    places: int = 0
    """Places in updates that a group was admitted for; a refill takes none."""
    due: Counter[int] = field(default_factory=Counter)
    """Deadline -> groups to be trained by then, ready or not; a place that stays empty counts as one."""
    ready: dict[int, set[int]] = field(default_factory=dict)
    """Deadline -> numbers of those that could be trained now."""
    empty: Counter[int] = field(default_factory=Counter)
    """Deadline -> places whose every group was dropped: they are filled with nothing."""
    refills: deque[int] = field(default_factory=deque)
    """Of places whose group was dropped and is to be replaced: how many groups they have had."""

    def admit(self, version: int) -> list[Group]:
        """Groups that may begin at `version`."""
        deadline = self.terms.deadline(version)
        refills = [self.refills.popleft() for _ in range(len(self.refills))]
        new = max(0, (deadline + 1) * self.terms.groups_per_update - self.places)
        self.places += new
        found = [
            Group(number, deadline, refill) for number, refill in enumerate(refills + [0] * new, start=self.number)
        ]
        self.number += len(found)
        self.due[deadline] += len(found)
        return found

    def sent(self, group: Group, version: int) -> None:
        """`group` is sampled by weights `version` at the earliest: the clock of its age starts here."""
        self.due[group.deadline] -= 1
        group.deadline = self.terms.deadline(version)
        self.due[group.deadline] += 1

    def is_ready(self, group: Group) -> None:
        """`group` can be trained."""
        self.ready.setdefault(group.deadline, set()).add(group.number)

    def dropped(self, group: Group) -> None:
        """`group` teaches nothing: its place is given to another one, or stays empty."""
        if group.refill < self.terms.max_refills:
            self.due[group.deadline] -= 1
            self.refills.append(group.refill + 1)
        else:
            self.empty[group.deadline] += 1

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides the groups under way."""
        empty = {str(deadline): count for deadline, count in self.empty.items() if count}
        return {"number": self.number, "places": self.places, "refills": list(self.refills), "empty": empty}

    def restore(self, state: dict[str, Any], under_way: Iterable[tuple[int, int]], version: int) -> list[Group]:
        """Goes on from `state` with groups (number, refill), which will be sampled by `version` at the earliest."""
        self.number, self.places, self.refills = state["number"], state["places"], deque(state["refills"])
        self.empty = Counter({int(deadline): count for deadline, count in state["empty"].items()})
        self.due = Counter(self.empty)
        groups = [Group(number, self.terms.deadline(version), refill) for number, refill in under_way]
        self.due.update(group.deadline for group in groups)
        return groups

    def take(self, update: int) -> list[int] | None:
        """Numbers of the groups that `update` trains, ascending; none while it has to wait."""
        size = self.terms.groups_per_update
        shares: dict[int, tuple[int, int]] = {}
        taken = owed = 0
        for deadline in range(update, self.terms.deadline(update) + 1):
            empty = min(size - taken, self.empty[deadline])
            groups = min(size - taken - empty, len(self.ready.get(deadline, ())))
            shares[deadline] = empty, groups
            taken += empty + groups
            owed += self.due[deadline]
            if taken < owed - (deadline - update) * size:
                return None
        return self._withdraw(shares) if taken == size else None

    def _withdraw(self, shares: dict[int, tuple[int, int]]) -> list[int]:
        """Of each deadline so many empty places and so many groups, those that were admitted first."""
        chosen: list[int] = []
        for deadline, (empty, groups) in shares.items():
            there = sorted(self.ready.pop(deadline, ()))
            chosen += there[:groups]
            self.ready[deadline] = set(there[groups:])
            self.empty[deadline] -= empty
            self.due[deadline] -= empty + groups
        return sorted(chosen)
