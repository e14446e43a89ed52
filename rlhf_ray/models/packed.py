"""Sequences lie one after the other in one row, and attention never leaks from one to the next.

Padding wastes the longest row's length on every row. Instead all tokens of a micro-batch form one row [S]; positions
restart at each sequence, and attention is computed sequence by sequence, bit-equal to running each alone on CPU.
`use_cache=False` is not a saving but a need: with a cache, packed sequences are silently wrong.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

ATTENTION = "rlhf_ray_packed"


@dataclass(frozen=True)
class Packed:
    """B sequences of prompt and response as one row of S tokens; R of the tokens are responses."""

    ids: Tensor
    """[S] int64"""
    positions: Tensor
    """[S] position of each token in its own sequence."""
    offsets: list[int]
    """B + 1 places at which sequences begin in the row, and S."""
    predictors: Tensor
    """[R] places whose hidden state predicts each response token: the token's own place minus one."""

    @classmethod
    def of(cls, sequences: Sequence[np.ndarray], prompt_lengths: Sequence[int], device: torch.device) -> "Packed":
        """Sequences hold prompt and response; a response is everything after `prompt_lengths` (>= 1) tokens.

        >>> p = Packed.of([np.array([7, 8, 9]), np.array([5, 6])], [1, 1], torch.device("cpu"))
        >>> p.positions.tolist(), p.offsets, p.predictors.tolist(), p.targets.tolist()
        ([0, 1, 2, 0, 1], [0, 3, 5], [0, 1, 3], [8, 9, 6])
        """
        masks = [np.arange(len(sequence)) >= prompt for sequence, prompt in zip(sequences, prompt_lengths, strict=True)]
        return cls.masked(sequences, masks, device)

    @classmethod
    def masked(cls, sequences: Sequence[np.ndarray], masks: Sequence[np.ndarray], device: torch.device) -> "Packed":
        """Responses are the tokens whose `masks` are true, as in dialogues of several turns.

        A sequence's first token is never one: nothing predicts it.

        >>> s, m = [np.array([7, 8, 9]), np.array([5, 6])], [np.array([1, 0, 1], bool), np.array([0, 1], bool)]
        >>> Packed.masked(s, m, torch.device("cpu")).predictors.tolist()
        [1, 3]
        """
        offsets = [0, *np.cumsum([len(sequence) for sequence in sequences]).tolist()]
        positions = np.concatenate([np.arange(len(sequence)) for sequence in sequences])
        responses = np.concatenate(masks) & (positions > 0)
        ids = np.concatenate(sequences).astype(np.int64)
        return cls(
            torch.from_numpy(ids).to(device),
            torch.from_numpy(positions).to(device),
            offsets,
            torch.from_numpy(np.flatnonzero(responses) - 1).to(device),
        )

    @property
    def targets(self) -> Tensor:
        """[R] the response tokens."""
        return self.ids[self.predictors + 1]

    @property
    def last_places(self) -> Tensor:
        """[B] place of the last token of each sequence."""
        return torch.tensor(self.offsets[1:], device=self.ids.device) - 1


def hidden_states(body: torch.nn.Module, packed: Packed) -> Tensor:
    """[S, H] final hidden states (after the last norm) of a Hugging Face decoder without its head.

    On the device of the ids, though a body that is spread over several ends on the last of them.
    """
    output = body(
        input_ids=packed.ids[None],
        position_ids=packed.positions[None],
        packed_offsets=packed.offsets,
        use_cache=False,
    )
    return output.last_hidden_state[0].to(packed.ids.device)


def register_attention() -> None:
    """Makes `attn_implementation=ATTENTION` known to transformers; a second call changes nothing."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_offsets: list[int] | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, S, D], key and value [1, kv heads, S, D] -> [1, S, heads, D]."""
    offsets = packed_offsets or [0, query.shape[2]]
    longest = max(end - start for start, end in itertools.pairwise(offsets))
    if sliding_window is not None and longest > sliding_window:
        raise NotImplementedError(f"sequences of {longest} tokens exceed this model's sliding window {sliding_window}")
    if query.is_cuda:
        return _varlen_attention(query, key, value, offsets, longest, scaling), None
    return _each_alone(query, key, value, offsets, scaling), None


def _each_alone(query: Tensor, key: Tensor, value: Tensor, offsets: list[int], scaling: float | None) -> Tensor:
    outputs = [
        functional.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            is_causal=True,
            scale=scaling,
            enable_gqa=True,
        )
        for start, end in itertools.pairwise(offsets)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, offsets: list[int], longest: int, scaling: float | None
) -> Tensor:
    """torch's own variable-length flash attention, which needs no further package."""
    from torch.nn.attention.varlen import varlen_attn

    places = torch.tensor(offsets, dtype=torch.int32, device=query.device)
    flat = [x[0].transpose(0, 1).contiguous() for x in (query, key, value)]
    output = varlen_attn(*flat, places, places, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=True)
    return output[None]
