"""Which roles sit together and what each of their places needs: arithmetic on the configuration alone."""

from dataclasses import dataclass

from rlhf_ray.config.ppo import ROLES, PPOConfig, Role


@dataclass(frozen=True)
class Group:
    """Roles that share machines. Worker i of each role sits in bundle i; a bundle never spans machines."""

    roles: tuple[str, ...]
    bundles: tuple[dict[str, float], ...]
    """Ray resources of each bundle, the sum of its workers' needs."""

    @property
    def name(self) -> str:
        return "+".join(self.roles)


def needs(config: PPOConfig, role: Role) -> dict[str, float]:
    """Ray resources of one worker of `role`. A reward that is not a model takes no GPU."""
    gpus = 0.0 if role == "reward" and not config.reward.members else getattr(config.roles, role).gpus
    return {"CPU": config.roles.cpus, "GPU": gpus} if gpus else {"CPU": config.roles.cpus}


def workers(config: PPOConfig, role: str) -> int:
    """None of a reference that the learner is itself."""
    if role == "reference" and config.shares_reference:
        return 0
    return getattr(config.roles, role).workers


def groups(config: PPOConfig) -> list[Group]:
    """All roles that have workers, each in exactly one group, shared ones first."""
    shared = [tuple(group) for group in config.roles.shared if group]
    alone = [(role,) for role in ROLES if not any(role in group for group in shared)]
    found = [_group(config, roles) for roles in [*shared, *alone]]
    return [group for group in found if group.bundles]


def _group(config: PPOConfig, roles: tuple[Role, ...]) -> Group:
    size = max(workers(config, role) for role in roles)
    bundles: list[dict[str, float]] = [{} for _ in range(size)]
    for role in roles:
        for bundle in bundles[: workers(config, role)]:
            for resource, amount in needs(config, role).items():
                bundle[resource] = bundle.get(resource, 0) + amount
    return Group(roles, tuple(bundles))
