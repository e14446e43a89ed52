"""The learner's view of the engines: vLLM's four weight-transfer calls, each to all engines, each with a deadline."""

from collections.abc import Callable, Sequence
from typing import Any

from rlhf_ray.actors.weight_transfer.buckets import Parameter
from rlhf_ray.errors import DeadlineError, RLHFError

CallAll = Callable[[Sequence[Any], str, Sequence[tuple], float], list[Any]]


def call_all(handles: Sequence[Any], method: str, arguments: Sequence[tuple], deadline_s: float) -> list[Any]:
    """Calls `method` of every Ray actor at once, the i-th with `arguments[i]`; answers in order.

    Raises DeadlineError, or the RLHFError that an actor raised. Of an actor that died Ray's own error goes on, in which
    the driver finds its name.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayTaskError

    refs = [getattr(handle, method).remote(*args) for handle, args in zip(handles, arguments, strict=True)]
    try:
        return ray.get(refs, timeout=deadline_s)
    except GetTimeoutError:
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        raise DeadlineError(
            f"the learner waited {deadline_s:g} s for rollout engines to answer {method}; {len(ready)} of "
            f"{len(refs)} did. Raise roles.deadline_s if the model is large"
        ) from None
    except RayTaskError as error:
        if isinstance(error.cause, RLHFError):
            raise error.cause from None
        raise


class Engines:
    """All engines as one. Has the methods of vLLM's `VLLMWeightSyncClient` protocol."""

    def __init__(self, handles: Sequence[Any], deadline_s: float, call: CallAll = call_all) -> None:
        self.handles = list(handles)
        self.deadline_s = deadline_s
        self.call = call
        self.version = 0
        """What `finish_weight_update` tells the engines when it is not given one."""
        self.ranks: list[int] = []
        """Workers of each engine."""

    def check(self, parameters: Sequence[Parameter]) -> None:
        """Every engine compares names and shapes with its model, before any connection and any update.

        Raises ModelError when they differ: a wrong shape found half-way would leave vLLM broken.
        """
        self.ranks = self._call("check_parameters", [parameter.to_wire() for parameter in parameters])

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Engines are told different ranks: with the same for all, a collective would wait for ever."""
        offset, arguments = init_info.get("rank_offset", 0), []
        for ranks in self.ranks:
            own = {**init_info, "rank_offset": offset} if "rank_offset" in init_info else init_info
            arguments.append((own,))
            offset += ranks
        self.call(self.handles, "init_weight_transfer_engine", arguments, self.deadline_s)

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._call("update_weights", update_info)

    def finish_weight_update(self, weight_version: int | None = None) -> None:
        self._call("finish_weight_update", self.version if weight_version is None else weight_version)

    def _call(self, method: str, *args: Any) -> list[Any]:
        return self.call(self.handles, method, [args] * len(self.handles), self.deadline_s)
