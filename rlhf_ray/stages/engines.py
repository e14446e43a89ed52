"""Engines that serve one frozen model to a stage: turns in, text out, and log-probabilities of options.

The same rollout actors, placement and deadlines as in PPO. An answer depends on model, turns, seed and its sample id
alone, so neither how requests are batched nor how many engines there are changes a word of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import numpy as np

from rlhf_ray.actors import rollout
from rlhf_ray.config.common import StageConfig
from rlhf_ray.config.feedback import EnginesConfig
from rlhf_ray.config.layout import Group
from rlhf_ray.data.columns import Turns
from rlhf_ray.data.quarantine import BadRow
from rlhf_ray.data.templates import answer_ids, ensure_chat_template, prompt_ids
from rlhf_ray.errors import ModelError
from rlhf_ray.feedback.critique import Said
from rlhf_ray.models import load
from rlhf_ray.records import Finish, Float32, Ragged, Trajectories
from rlhf_ray.runtime.deadlines import arrivals, fetch
from rlhf_ray.runtime.environment import cache_folder
from rlhf_ray.runtime.placement import Placement
from rlhf_ray.runtime.pools import shares

CHUNK_TOKENS = 4096
"""Answers travel back from an engine as soon as so many tokens of them are finished."""


@dataclass(frozen=True)
class Answer:
    """One sampled answer."""

    text: str
    tokens: int
    """Generated, EOS included."""
    logprob: float
    """Sum over the tokens, at the sampling temperature."""
    finish: Literal["eos", "length"]
    ids: list[int]
    """[tokens]"""

    @property
    def said(self) -> Said:
        """What is kept of it."""
        return Said(self.text, self.tokens, self.logprob, self.finish)


class Reader:
    """What turns text into an engine's tokens and back, and knows what fits; made before any engine is started."""

    def __init__(self, section: EnginesConfig, where: str, trust_remote_code: bool) -> None:
        """`where` names the section in messages. Raises ModelError for what is no model or has too short a context."""
        description = load.model_config(section.model, f"{where}.model", trust_remote_code)
        self.tokenizer = ensure_chat_template(load.tokenizer(section.model, f"{where}.model", trust_remote_code))
        load.check_vocabulary(self.tokenizer, description, section.model, f"{where}.model")
        context = getattr(description, "max_position_embeddings", section.max_tokens)
        if section.max_tokens > context:
            raise ModelError(
                f"{where}.model '{section.model}' has a context of {context} tokens, but {where}.max_tokens is "
                f"{section.max_tokens}; lower it"
            )
        if section.decode_beta is not None:
            from rlhf_ray.models.q_heads import check_values

            check_values(description, section.model, f"{where}.model")
        self.eos_ids = load.eos_ids(section.model, self.tokenizer)
        self.section = section

    def ids(self, turns: Turns, answer: int | None = None) -> list[int]:
        """Ids that an answer of `answer` tokens goes on from; none: of `max_new_tokens`.

        Raises BadRow when they are too long or the template refuses them.
        """
        ids = prompt_ids(self.tokenizer, turns)
        room = self.section.max_tokens - (self.section.max_new_tokens if answer is None else answer)
        if len(ids) > room:
            raise BadRow("too long", f"{len(ids)} tokens of context, there is room for {room}")
        return ids

    def option_ids(self, turns: Turns, text: str) -> list[int]:
        """Ids of `text` as an answer to `turns`, without the EOS that would end it."""
        ids = answer_ids(self.tokenizer, turns, text)
        return ids[:-1] if ids[-1] == self.tokenizer.eos_token_id else ids


class Engines:
    """Use as a context: the engines are up within it and gone after it."""

    def __init__(self, section: EnginesConfig, reader: Reader, stage: StageConfig, deadline_s: float) -> None:
        self.section, self.reader, self.stage, self.deadline_s = section, reader, stage, deadline_s
        needs = {"CPU": section.cpus, "GPU": section.gpus} if section.gpus else {"CPU": section.cpus}
        group = Group(("engines",), tuple(needs for _ in range(section.engines)))
        self.placement = Placement([group], {"engines": needs}, deadline_s)

    def __enter__(self) -> "Engines":
        try:
            self.placement.reserve()
            environment = rollout.environment(self.stage.device, str(cache_folder()))
            self.actors = [
                self.placement.start("engines", number, rollout.RolloutEngine, self._settings(), env=environment)
                for number in range(self.section.engines)
            ]
            fetch([actor.__ray_ready__.remote() for actor in self.actors], self.deadline_s, self.name, "starting")
        except BaseException:
            self.placement.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.placement.release()

    @property
    def name(self) -> str:
        return f"engines of '{self.section.model}'"

    def sample(self, contexts: Sequence[Sequence[int]], sample_ids: Sequence[int]) -> list[Answer]:
        """One answer to each context, in order. A sample's id decides its random numbers."""
        if not contexts:
            return []
        numbers = np.asarray(sample_ids, np.int64)
        where = {int(number): place for place, number in enumerate(numbers)}
        if len(where) < len(numbers):
            raise ValueError("sample ids must differ: the same id draws the same random numbers")
        streams = [
            actor.generate.options(num_returns="streaming").remote(
                Ragged.of([contexts[row] for row in share], np.int32), numbers[share], self.stage.seed, CHUNK_TOKENS
            )
            for actor, share in self._shared(contexts, self.section.max_new_tokens)
        ]
        found: list[Answer | None] = [None] * len(contexts)
        for chunk in arrivals(streams, self.deadline_s, self.name, "generating"):
            trajectories = fetch(chunk, self.deadline_s, self.name, "generating")
            for row in range(len(trajectories)):
                found[where[int(trajectories.sample_ids[row])]] = self._answer(trajectories, row)
        return [answer for answer in found if answer is not None]  # engines raise when one is missing

    def option_logprobs(self, contexts: Sequence[Sequence[int]], options: Sequence[Sequence[int]]) -> Float32:
        """[R, K] summed log-probabilities of K options after each of R contexts."""
        texts = Ragged.of(options, np.int32)
        found = np.empty((len(contexts), len(options)), np.float32)
        shared = self._shared(contexts, int(texts.lengths.sum()))
        parts = [
            actor.option_logprobs.remote(Ragged.of([contexts[row] for row in share], np.int32), texts)
            for actor, share in shared
        ]
        for (_, share), part in zip(shared, fetch(parts, self.deadline_s, self.name, "scoring"), strict=True):
            found[share] = part
        return found

    def logprobs(self, contexts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[Float32]:
        """[len(answer)] log-probabilities of the tokens of each answer after its own context, at temperature 1."""
        both = [[*context, *answer] for context, answer in zip(contexts, answers, strict=True)]
        found: list[Float32] = [np.empty(0, np.float32)] * len(both)
        shared = self._shared(both, 0)
        parts = [
            actor.logprobs.remote(
                Ragged.of([both[row] for row in share], np.int32),
                np.array([len(contexts[row]) for row in share], np.int32),
                1.0,
            )
            for actor, share in shared
        ]
        for (_, share), part in zip(shared, fetch(parts, self.deadline_s, self.name, "scoring"), strict=True):
            ends = np.cumsum([len(answers[row]) for row in share])
            for row, values in zip(share, np.split(part, ends[:-1]), strict=True):
                found[row] = values
        return found

    def _shared(self, contexts: Sequence[Sequence[int]], more: int) -> list[tuple[Any, list[int]]]:
        """Engines that get something, and the rows that they get; `more` is each row's work besides its tokens."""
        work = [len(context) + more for context in contexts]
        return [pair for pair in zip(self.actors, shares(work, len(self.actors)), strict=True) if pair[1]]

    def _answer(self, trajectories: Trajectories, row: int) -> Answer:
        ids = trajectories.responses[row]
        start, stop = trajectories.responses.offsets[row : row + 2]
        return Answer(
            text=self.reader.tokenizer.decode(ids, skip_special_tokens=True).strip(),
            tokens=len(ids),
            logprob=float(trajectories.sampler_logprobs[start:stop].sum()),
            finish="eos" if trajectories.finish[row] == Finish.EOS else "length",
            ids=ids.tolist(),
        )

    def _settings(self) -> rollout.RolloutSettings:
        section, tensor_parallel = self.section, max(1, int(self.section.gpus))
        return rollout.RolloutSettings(
            model=section.model,
            max_model_len=section.max_tokens,
            max_new_tokens=section.max_new_tokens,
            temperature=section.temperature,
            samples_per_prompt=1,
            top_k=0,
            kv_cache_bytes=int(section.kv_cache_gib * 2**30 / tensor_parallel),
            dtype=self.stage.dtype,
            tensor_parallel=tensor_parallel,
            transfer_backend=None,
            eos_token_ids=self.reader.eos_ids,
            trust_remote_code=self.stage.trust_remote_code,
            decode_beta=section.decode_beta,
        )
