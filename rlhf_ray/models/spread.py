"""A frozen model over several GPUs: its layers one after the other, in order, about as many bytes on each.

The GPUs take turns, nothing is computed in two places at once: what is won is memory, not time. Embedding and head both
lie on the first GPU, where tokens arrive and log-probabilities are taken. So tied weights are never in two places and
logits never travel; hidden states come back to it once (`packed.hidden_states`). For frozen models only: ranks that
train shard by ZeRO, which knows nothing of this.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING

from rlhf_ray.errors import ModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def device_map(model: "PreTrainedModel", devices: int) -> dict[str, int]:
    """Number of the device of every part of `model`, by its dotted name; weights may be without memory ("meta").

    Raises ModelError when the body is no single stack of layers, or has fewer layers than there are devices.
    """
    from torch import nn

    body, prefix = model.base_model, model.base_model_prefix
    stacks = [name for name, part in body.named_children() if isinstance(part, nn.ModuleList)]
    if len(stacks) != 1:
        raise ModelError(
            f"{type(model).__name__} cannot be spread over {devices} GPUs: expected one list of layers, found "
            f"{', '.join(stacks) or 'none'}; give its role 1 GPU"
        )
    parts = [name for name, _ in body.named_children()]
    after = [
        name for name in parts[parts.index(stacks[0]) + 1 :] if any(True for _ in body.get_submodule(name).parameters())
    ]
    layers = list(body.get_submodule(stacks[0]))
    sizes = [_bytes(layer) for layer in layers]
    last = sum(_bytes(body.get_submodule(name)) for name in after)
    places = shares(sizes, _bytes(model) - sum(sizes) - last, last, devices)

    found = {name: 0 for name, part in model.named_children() if part is not body}
    found |= {f"{prefix}.{name}": devices - 1 if name in after else 0 for name in parts if name != stacks[0]}
    return found | {f"{prefix}.{stacks[0]}.{number}": place for number, place in enumerate(places)}


def shares(sizes: Sequence[int], first: int, last: int, devices: int) -> list[int]:
    """Device of each layer of so many bytes: in order, every device used, the fullest as empty as can be.

    `first` and `last` bytes lie on the first and the last device beside their layers. Raises ModelError when there are
    fewer layers than devices.

    >>> shares([10, 10, 10, 10], first=10, last=0, devices=2)
    [0, 0, 1, 1]
    >>> shares([10, 10, 10, 10], first=30, last=0, devices=2)
    [0, 1, 1, 1]
    """
    if len(sizes) < devices:
        raise ModelError(
            f"a model of {len(sizes)} layers cannot be spread over {devices} GPUs; give its role {len(sizes)} or fewer"
        )
    sums = [0, *accumulate(sizes)]

    @cache
    def best(start: int, device: int) -> tuple[int, tuple[int, ...]]:
        """Of `device` and all after it, with the layers from `start` on: bytes of the fullest, and where each ends."""
        beside = (first if device == 0 else 0) + (last if device == devices - 1 else 0)
        if device == devices - 1:
            return sums[-1] - sums[start] + beside, (len(sizes),)
        ends = range(start + 1, len(sizes) - (devices - device - 1) + 1)
        fullest, end = min((max(sums[end] - sums[start] + beside, best(end, device + 1)[0]), end) for end in ends)
        return fullest, (end, *best(end, device + 1)[1])

    ends = best(0, 0)[1]
    return [sum(end <= layer for end in ends) for layer in range(len(sizes))]


def _bytes(module: "nn.Module") -> int:
    """Of all its weights, tied ones once."""
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())
