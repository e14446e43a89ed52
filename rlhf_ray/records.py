"""The columns that cross process boundaries: flat, typed, ragged, never padded.

Trajectories of a chunk lie one after the other in one array; offsets say where each begins. Padding whole batches
costs tens of times these bytes at realistic answer lengths. A prompt is stored once for all its samples.

Arrays that come out of Ray's object store are read-only: copy before writing.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]


class Finish(IntEnum):
    """Why an answer ended."""

    EOS = 0
    """The policy sampled an end-of-sequence token; it is the last token of the answer."""
    LENGTH = 1
    """`max_new_tokens` was reached."""


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths in one array.

    >>> r = Ragged.of([[1, 2, 3], [4, 5]], np.int32)
    >>> r.offsets
    array([0, 3, 5], dtype=int32)
    >>> r[1]
    array([4, 5], dtype=int32)
    """

    values: NDArray
    """[N], all rows one after the other."""
    offsets: Int32
    """[B + 1]; row i is values[offsets[i]:offsets[i + 1]]."""

    @classmethod
    def of(cls, rows: Iterable[Sequence | NDArray], dtype: type) -> "Ragged":
        arrays: list[NDArray] = [np.asarray(row, dtype=dtype) for row in rows]
        values = np.concatenate(arrays) if arrays else np.empty(0, dtype)
        return cls.with_lengths(values, np.array([len(array) for array in arrays], np.int32))

    @classmethod
    def with_lengths(cls, values: NDArray, lengths: NDArray) -> "Ragged":
        """values [N], lengths [B]."""
        offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
        np.cumsum(lengths, out=offsets[1:])
        return cls(values, offsets)

    def __reduce__(self) -> tuple[Any, ...]:
        """On the wire, lengths in the smallest type stand for the offsets: a byte or two instead of four."""
        longest = int(self.lengths.max(initial=0))
        return Ragged.with_lengths, (self.values, self.lengths.astype(np.min_scalar_type(longest)))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[NDArray]:
        return (self[row] for row in range(len(self)))

    @property
    def lengths(self) -> Int32:
        """[B]"""
        return np.diff(self.offsets)


def id_type(vocabulary: int) -> type[np.integer]:
    """The smallest type that holds every token id: ids are half of what crosses the wire, and most vocabularies of
    small models fit two bytes."""
    return np.uint16 if vocabulary <= 2**16 else np.int32


@dataclass(frozen=True)
class Trajectories:
    """A chunk of B finished answers to G prompts, as a rollout engine hands them on. N tokens were generated."""

    prompts: Ragged
    """Token ids of G prompts, each stored once."""
    prompt_of: Int32
    """[B] which of the chunk's prompts an answer belongs to."""
    responses: Ragged
    """Token ids of B answers, N in all; the EOS token included where it was sampled."""
    sampler_logprobs: Float32
    """[N] log-probability of each token as the engine sampled it, at the sampling temperature."""
    finish: NDArray[np.uint8]
    """[B] of Finish."""
    sample_ids: NDArray[np.int64]
    """[B] unique in a run: prompt position in the data order times samples per prompt, plus the sample's number."""
    weight_version: Int32
    """[B] version of the weights that produced the answer."""
    top_ids: NDArray
    """[N, k] ids of the k likeliest tokens at each place, by the sampler; k is 0 where nobody asks for them."""

    @classmethod
    def given(cls, prompts: Sequence[Sequence | NDArray], answers: Sequence[Sequence | NDArray]) -> "Trajectories":
        """Answers [B] that no engine sampled, each with its prompt [B]: to be scored, not trained on."""
        responses = Ragged.of(answers, np.int32)
        rows, tokens = len(responses), len(responses.values)
        return cls(
            prompts=Ragged.of(prompts, np.int32),
            prompt_of=np.arange(rows, dtype=np.int32),
            responses=responses,
            sampler_logprobs=np.full(tokens, np.nan, np.float32),
            finish=np.full(rows, Finish.EOS, np.uint8),
            sample_ids=np.arange(rows, dtype=np.int64),
            weight_version=np.zeros(rows, np.int32),
            top_ids=no_columns(tokens),
        )

    def __len__(self) -> int:
        return len(self.responses)

    def prompt(self, row: int) -> Int32:
        """Prompt ids of answer `row`."""
        return self.prompts[self.prompt_of[row]]

    def sequence(self, row: int) -> Int32:
        """Prompt and answer ids of answer `row`, in one new array."""
        return np.concatenate([self.prompt(row), self.responses[row]])

    @property
    def prompt_lengths(self) -> Int32:
        """[B]"""
        return self.prompts.lengths[self.prompt_of]

    @property
    def tokens(self) -> int:
        """Generated tokens, N."""
        return len(self.responses.values)

    def take(self, rows: NDArray) -> "Trajectories":
        """The answers `rows`, in that order; all prompts stay."""
        places = token_places(self.responses.offsets, rows)
        offsets = np.concatenate([[0], np.cumsum(self.responses.lengths[rows])]).astype(np.int32)
        return Trajectories(
            prompts=self.prompts,
            prompt_of=self.prompt_of[rows],
            responses=Ragged(self.responses.values[places], offsets),
            sampler_logprobs=self.sampler_logprobs[places],
            finish=self.finish[rows],
            sample_ids=self.sample_ids[rows],
            weight_version=self.weight_version[rows],
            top_ids=self.top_ids[places],
        )

    @classmethod
    def concatenate(cls, chunks: Sequence["Trajectories"]) -> "Trajectories":
        """One chunk of all; answers keep their order."""
        first_prompt = np.cumsum([0, *(len(chunk.prompts) for chunk in chunks)])
        return cls(
            prompts=_join([chunk.prompts for chunk in chunks]),
            prompt_of=np.concatenate(
                [chunk.prompt_of + start for chunk, start in zip(chunks, first_prompt, strict=False)]
            ).astype(np.int32),
            responses=_join([chunk.responses for chunk in chunks]),
            **{
                name: np.concatenate([getattr(chunk, name) for chunk in chunks])
                for name in ("sampler_logprobs", "finish", "sample_ids", "weight_version", "top_ids")
            },
        )


@dataclass(frozen=True)
class Arrived:
    """What is in a chunk of trajectories, for who only routes it: G prompts, each with all its answers."""

    groups: NDArray[np.int64]
    """[G] the prompts' places in the data order."""
    oldest: Int32
    """[G] version of the weights of the oldest of a prompt's generated tokens, and of the newest."""
    newest: Int32
    tokens: Int32
    """[G] generated for each prompt."""


def no_columns(tokens: int) -> Float32:
    """[N, 0]: a column that nobody asks for."""
    return np.empty((tokens, 0), np.float32)


@dataclass(frozen=True)
class ReferenceColumns:
    """What the reference says of the N response tokens of a chunk. A form that the KL does not need has width 0."""

    logprobs: Float32
    """[N] log-probability of each token, at the sampling temperature."""
    top_logprobs: Float32
    """[N, k] log-probabilities of the trajectories' `top_ids`."""
    hidden: NDArray
    """[N, H] final hidden states that predict each token, after the last norm; float32, or bf16 as its raw uint16."""

    @classmethod
    def sampled(cls, logprobs: Float32) -> "ReferenceColumns":
        """Log-probabilities [N] of the sampled tokens and nothing else."""
        return cls(logprobs, no_columns(len(logprobs)), no_columns(len(logprobs)))

    def __len__(self) -> int:
        """Tokens, N."""
        return len(self.logprobs)

    def take(self, places: NDArray) -> "ReferenceColumns":
        return ReferenceColumns(self.logprobs[places], self.top_logprobs[places], self.hidden[places])

    @classmethod
    def concatenate(cls, chunks: Sequence["ReferenceColumns"]) -> "ReferenceColumns":
        return cls(*(np.concatenate([getattr(chunk, field.name) for chunk in chunks]) for field in fields(cls)))


def token_places(offsets: NDArray, rows: NDArray) -> NDArray[np.int64]:
    """Places in a flat [N] column of the tokens of `rows`, in the order of `rows`.

    >>> token_places(np.array([0, 2, 5]), np.array([1, 0])).tolist()
    [2, 3, 4, 0, 1]
    """
    pieces = [np.arange(offsets[row], offsets[row + 1]) for row in rows]
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)


def nbytes(record: object) -> int:
    """Bytes of the arrays in a record of this module, or of one array."""
    if isinstance(record, np.ndarray):
        return record.nbytes
    return sum(nbytes(getattr(record, field.name)) for field in fields(record))  # type: ignore[arg-type, misc]


def _join(parts: Sequence[Ragged]) -> Ragged:
    starts = np.cumsum([0, *(len(part.values) for part in parts)])
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts, strict=False)]
    return Ragged(
        np.concatenate([part.values for part in parts]),
        np.concatenate([*offsets, starts[-1:]]).astype(np.int32),
    )
