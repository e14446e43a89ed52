"""Actors on machines: what is asked is compared with what the cluster has before anything is waited for.

An RLHF job whose bundles do not fit otherwise waits for ever without a word.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rlhf_ray.config.layout import Group
from rlhf_ray.errors import ResourceError
from rlhf_ray.runtime.deadlines import fetch

Resources = dict[str, float]


def shortage(wanted: Sequence[Group], machines: Sequence[Resources]) -> str | None:
    """Why `wanted` cannot be placed on `machines`, or None when it can. Bundles are tried largest first."""
    free = [dict(machine) for machine in machines]
    bundles = [(bundle, group) for group in wanted for bundle in group.bundles]
    for resource in ("GPU", "CPU"):
        asked = sum(bundle.get(resource, 0) for bundle, _ in bundles)
        there = sum(machine.get(resource, 0) for machine in machines)
        if asked > there:
            shares = ", ".join(
                f"{group.name} {sum(bundle.get(resource, 0) for bundle in group.bundles):g}" for group in wanted
            )
            return f"{asked:g} {resource}s are asked for ({shares}), and the cluster has {there:g}"
    for bundle, group in sorted(bundles, key=lambda pair: (-pair[0].get("GPU", 0), -pair[0].get("CPU", 0))):
        home = next((m for m in free if all(m.get(name, 0) >= amount for name, amount in bundle.items())), None)
        if home is None:
            return f"a worker of {group.name} needs {_said(bundle)} on one machine, and no machine has that left"
        for name, amount in bundle.items():
            home[name] -= amount
    return None


def check(wanted: Sequence[Group], where: str = "the configuration") -> None:
    """Raises ResourceError when the cluster is too small for all of `wanted`, which stands in `where`."""
    import ray

    lacking = shortage(wanted, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    if lacking:
        raise ResourceError(f"{lacking}. Ask for less in {where}, or add machines")


@dataclass
class Placement:
    """Placement groups of a run and the actors in them."""

    wanted: Sequence[Group]
    needs: Mapping[str, Resources]
    """Role -> what one worker of it takes of its bundle."""
    deadline_s: float
    section: str = "the configuration"
    """Where the person can ask for less."""
    where: dict[str, Any] = field(default_factory=dict)
    placed: list[Any] = field(default_factory=list)
    actors: list[Any] = field(default_factory=list)

    def reserve(self) -> None:
        """Raises ResourceError at once when the cluster is too small, or when it stays too busy."""
        from ray.util.placement_group import placement_group

        check(self.wanted, self.section)
        for group in self.wanted:
            place = placement_group([dict(bundle) for bundle in group.bundles], strategy="PACK")
            self.placed.append(place)
            for role in group.roles:
                self.where[role] = place
        fetch(
            [place.ready() for place in self.placed],
            min(self.deadline_s, 60.0),
            "free places on the cluster",
            "others may hold the resources: see `ray status`",
        )

    def start(self, role: str, worker: int, kind: type, *arguments: Any, env: dict[str, str], **options: Any) -> Any:
        """Worker number `worker` of `role`, an actor of class `kind`, in its bundle."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        place = self.where[role]
        resources = self.needs[role]
        handle = (
            ray.remote(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0), **options)(kind)
            .options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(place, placement_group_bundle_index=worker),
                runtime_env={"env_vars": env},
            )
            .remote(*arguments)
        )
        self.actors.append(handle)
        return handle

    def machines(self, role: str, workers: int) -> list[str]:
        """Ids of the machines on which the first `workers` workers of `role` sit."""
        from ray.util.placement_group import placement_group_table

        homes = placement_group_table(self.where[role])["bundles_to_node_id"]
        return [homes[worker] for worker in range(workers)]

    def release(self) -> None:
        """Ends every actor and gives the places back."""
        import ray
        from ray.util.placement_group import remove_placement_group

        for actor in self.actors:
            with suppress(ValueError, ray.exceptions.RayError):  # one that is gone already
                ray.kill(actor)
        for place in self.placed:
            with suppress(ray.exceptions.RayError):
                remove_placement_group(place)
        self.actors.clear()
        self.placed.clear()


def _said(bundle: Resources) -> str:
    return " and ".join(f"{amount:g} {name}s" for name, amount in bundle.items() if amount)
