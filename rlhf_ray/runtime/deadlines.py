"""No wait without a deadline, and no failure of an actor without its name and its own words."""

from collections.abc import Sequence
from typing import Any

import ray
from ray import exceptions

from rlhf_ray.errors import DeadlineError, RLHFError, TrainingError
from rlhf_ray.runtime.interrupts import Interrupt


def fetch(refs: Any, deadline_s: float, who: str, doing: str) -> Any:
    """`ray.get` that ends. Raises DeadlineError, the actor's own RLHFError, or TrainingError for a dead actor.

    Looks up from the wait twice a second, so that a stop that was asked for is seen.
    """
    Interrupt.check()
    waited = 0.0
    while True:
        slice_s = min(0.5, deadline_s - waited)
        try:
            return ray.get(refs, timeout=slice_s)
        except exceptions.GetTimeoutError:
            waited += slice_s
            Interrupt.check()
            if waited >= deadline_s:
                raise late(who, doing, deadline_s) from None
        except (exceptions.RayTaskError, exceptions.RayActorError, exceptions.RayError) as error:
            raise explained(error, who, doing) from error


def late(who: str, doing: str, deadline_s: float) -> DeadlineError:
    return DeadlineError(
        f"waited {deadline_s:g} s for {who} ({doing}) and it did not answer. If it only needs longer, raise "
        "roles.deadline_s; else look at its log with `ray logs` or in the Ray session's folder"
    )


def explained(error: BaseException, who: str, doing: str) -> RLHFError:
    """The error a person can act on, inside the one that Ray raised."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, RLHFError) and not isinstance(cause, exceptions.RayError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    if isinstance(error, exceptions.RayActorError):
        return TrainingError(f"{who} died while {doing}: {_first_lines(error)}")
    inner = getattr(error, "cause", None) or error
    return TrainingError(f"{who} failed while {doing}: {type(inner).__name__}: {_first_lines(inner)}")


def _first_lines(error: BaseException, lines: int = 6) -> str:
    said: Sequence[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " | ".join(said[:lines]) or type(error).__name__
