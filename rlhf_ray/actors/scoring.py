"""What the frozen roles share: a chunk of trajectories as packed forward passes of bounded size."""

from collections.abc import Iterator

import torch

from rlhf_ray.data.packing import micro_batches
from rlhf_ray.models.packed import Packed
from rlhf_ray.records import Trajectories


def packs_of(
    trajectories: Trajectories, tokens_per_pass: int, device: torch.device
) -> Iterator[tuple[list[int], Packed]]:
    """Rows and their packed sequences, at most `tokens_per_pass` tokens at a time; every row once."""
    lengths = trajectories.prompt_lengths + trajectories.responses.lengths
    for rows in micro_batches(lengths.tolist(), tokens_per_pass):
        sequences = [trajectories.sequence(row) for row in rows]
        yield rows, Packed.of(sequences, [len(trajectories.prompt(row)) for row in rows], device)
