"""One vLLM engine for several calls at a time: whoever waits for an answer steps it, for all of them.

A step and anything else that touches the engine take turns, so between two steps nothing runs: requests are added
there, weights are exchanged, answers handed to the calls that asked for them. While it is paused no step begins, and
calls wait. What must never happen: an answer given to another call, or lost without a word.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from rlhf_ray.errors import GenerationError, PublicationError

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput


@dataclass
class Call:
    """What somebody waits for."""

    waiting: set[str] = field(default_factory=set)
    """Names of its requests that are under way."""
    finished: list["RequestOutput"] = field(default_factory=list)


class SharedEngine:
    def __init__(self, engine: Any, name: str, deadline_s: float) -> None:
        """`engine` is vLLM's in-process engine; `name` tells whose it is; `deadline_s` bounds a wait for weights."""
        self.engine, self.name, self.deadline_s = engine, name, deadline_s
        self.refusal: str | None = None
        """Why it must not generate."""
        self.turn = threading.Lock()
        """While it is held no step runs."""
        self._running = threading.Event()
        self._running.set()
        self._calls: dict[str, Call] = {}
        self._numbers = count()

    @property
    def busy(self) -> bool:
        return bool(self._calls)

    def serve(self, requests: Sequence[tuple[Iterable[int], Any]]) -> Iterator[tuple[int, "RequestOutput"]]:
        """Numbers of the requests, prompt ids and vLLM's sampling parameters each, with their outputs as they finish.

        What `abort` gave up does not come. Raises GenerationError when the engine fails or forgets one.
        """
        number, call = str(next(self._numbers)), Call()
        self.wait_for_weights()
        try:
            with self.turn:
                self._calls[number] = call
                for row, (ids, params) in enumerate(requests):
                    self._add(f"{number}/{row}", ids, params)
                    call.waiting.add(f"{number}/{row}")
            while call.waiting or call.finished:
                for output in self._advance(call):
                    yield int(output.request_id.partition("/")[2]), output
        finally:
            with self.turn:
                self.engine.abort_request(list(call.waiting))  # of what nobody waits for any more; usually nothing
                del self._calls[number]

    def pause(self) -> None:
        """No step begins from here on until `resume`, and none runs any more."""
        self._running.clear()
        with self.turn:
            pass

    def resume(self) -> None:
        self._running.set()

    def abort(self) -> None:
        """Gives up all that is under way; calls end with what they have."""
        with self.turn:
            for call in self._calls.values():
                self.engine.abort_request(list(call.waiting))
                call.waiting.clear()

    def wait_for_weights(self) -> None:
        """Until it is not paused. Raises PublicationError when it must not generate, or stays paused."""
        if not self._running.wait(self.deadline_s):
            raise PublicationError(
                f"{self.name} refuses to generate: a publication of weights began and has not ended within "
                f"{self.deadline_s:g} s"
            )
        if self.refusal:
            raise PublicationError(f"{self.name} refuses to generate: {self.refusal}")

    def _advance(self, call: Call) -> list["RequestOutput"]:
        """What has finished for `call`, after another step unless somebody else's has just brought something."""
        self.wait_for_weights()
        with self.turn:
            if call.waiting and not call.finished and self._running.is_set():
                if not self.engine.has_unfinished_requests():
                    raise GenerationError(f"{self.name}: {len(call.waiting)} requests were never answered")
                for output in self._step():
                    owner = self._calls[output.request_id.partition("/")[0]]
                    owner.waiting.remove(output.request_id)
                    owner.finished.append(output)
            found, call.finished = call.finished, []
            return found

    def _add(self, name: str, ids: Iterable[int], params: Any) -> None:
        prompt = list(map(int, ids))
        try:
            self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
        except Exception as error:
            raise GenerationError(f"{self.name}: vLLM refused a prompt of {len(prompt)} tokens: {error}") from error

    def _step(self) -> list["RequestOutput"]:
        try:
            outputs = self.engine.step()
        except Exception as error:
            self.refusal = f"vLLM failed while generating: {error}"
            raise GenerationError(
                f"{self.name}: vLLM failed while generating: {type(error).__name__}: {error}"
            ) from error
        return [output for output in outputs if output.finished]
