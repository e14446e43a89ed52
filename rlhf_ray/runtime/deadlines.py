"""No wait without a deadline, and no failure of an actor without its name and its own words."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray import exceptions

from rlhf_ray import errors
from rlhf_ray.errors import DeadlineError, RLHFError, TrainingError
from rlhf_ray.interrupts import Interrupt


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


def arrivals(streams: Sequence[Any], deadline_s: float, who: str, doing: str) -> Iterator[Any]:
    """References that streaming calls yield, as they come. Raises as `fetch` does, after `deadline_s` without any."""
    left = list(streams)
    waited = 0.0
    while left:
        Interrupt.check()
        ready, _ = ray.wait(left, num_returns=1, timeout=0.5, fetch_local=False)
        waited = 0.0 if ready else waited + 0.5
        if waited > deadline_s:
            raise late(who, doing, deadline_s)
        for stream in ready:
            try:
                yield next(stream)
            except StopIteration:
                left.remove(stream)
            except exceptions.RayError as error:
                raise explained(error, who, doing) from error


def late(who: str, doing: str, deadline_s: float) -> DeadlineError:
    return DeadlineError(
        f"waited {deadline_s:g} s for {who} ({doing}) and it did not answer. If it only needs longer, raise "
        "deadline_s (roles.deadline_s in PPO); else look at its log with `ray logs` or in the Ray session's folder"
    )


def explained(error: BaseException, who: str, doing: str) -> RLHFError:
    """The error a person can act on, inside the one that Ray raised.

    The actor that failed need not be the one that was asked: a learner that waits for a score fails with its scorer.
    """
    root = _root(error)
    if isinstance(root, RLHFError):
        return root
    if isinstance(root, exceptions.ActorDiedError) and root.actor_init_failed:
        return _in_own_words(_after_traceback(str(root)), who, doing)
    if isinstance(root, exceptions.RayActorError):
        return _died(str(root), who, doing)
    return TrainingError(f"{who} failed while {doing}: {type(root).__name__}: {_first_lines(root)}")


def _root(error: BaseException) -> BaseException:
    """The innermost cause; the first that is ours, if there is one."""
    while True:
        if isinstance(error, RLHFError) and not isinstance(error, exceptions.RayError):
            return error
        cause = getattr(error, "cause", None) or error.__cause__
        if not isinstance(cause, BaseException):
            return error
        error = cause


def _died(said: str, who: str, doing: str) -> TrainingError:
    """From Ray's list of facts about an actor that is no more, its class, process and machine first of all."""
    facts = dict(re.findall(r"^\t(class_name|pid|ip): (\S+)$", said, re.MULTILINE))
    actor = f"{facts['class_name']} (pid {facts.get('pid')} on {facts.get('ip')})" if "class_name" in facts else who
    why = said.strip().splitlines()[-1].partition(" Some common causes")[0]
    return TrainingError(
        f"{actor} died while {doing}: {why} Usual causes are memory that ran out (look into `dmesg`) and a crash (look "
        "into the logs of the Ray session)"
    )


def _after_traceback(said: str) -> str:
    """`package.Kind: message`, which ends a traceback; lines of the traceback itself are indented."""
    message: list[str] = []
    for line in reversed(said.strip().splitlines()):
        if line.startswith(" "):
            break
        message.insert(0, line)
    return "\n".join(message)


def _in_own_words(said: str, who: str, doing: str) -> RLHFError:
    """An error that an actor raised as it was made; Ray passes on its text alone."""
    kind, _, message = said.partition(": ")
    module, _, name = kind.rpartition(".")
    ours = getattr(errors, name, None) if module == errors.__name__ else None
    return ours(message) if ours else TrainingError(f"{who} failed while {doing}: {said}")


def _first_lines(error: BaseException, lines: int = 6) -> str:
    said: Sequence[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " | ".join(said[:lines]) or type(error).__name__
