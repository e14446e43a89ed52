"""Several reward models' weights averaged into one model (Rame et al. 2024, "WARM", arXiv 2401.12187).

A score of the average is read in units of its own: the members' scores have different means and deviations, and the
deviation of the average was never measured, because no answers are at hand where it is made. So each member's
normalisation is put into its head before heads are averaged. The average then scores, to first order in how far members
are apart, what the mean of their normalised scores is; where they differ in heads alone, exactly that.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rlhf_ray.config.model_size import weight_shapes
from rlhf_ray.errors import ModelError
from rlhf_ray.models import load

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from rlhf_ray.models.device import Device

HEAD = "score."
"""What the names of a sequence classifier's head begin with."""


def averaged_classifier(
    paths: Sequence[str], device: "Device", trust_remote_code: bool
) -> tuple["PreTrainedModel", float]:
    """The average, and the offset that is to be subtracted from its raw scores.

    One member is loaded at a time, and the sum is kept in float32 in host memory. Raises ModelError when members have
    other weights or other shapes than the first.
    """
    import torch

    from rlhf_ray.models.device import torch_devices

    sums: dict[str, Tensor] = {}
    offset = 0.0
    for path in paths:
        model = load.classifier(path, device, trust_remote_code, torch_devices(device))
        mean, sd = load.score_normalisation(model.config)
        weights = {name: weight.detach().float().cpu() for name, weight in model.named_parameters()}
        if sums:
            _check(_shapes(sums), _shapes(weights), paths[0], path)
        for name, weight in weights.items():
            share = weight / (len(paths) * (sd if name.startswith(HEAD) else 1.0))
            sums[name] = sums[name] + share if name in sums else share
        offset += mean / sd / len(paths)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(sums[name])
    return model, offset


def check_same_shapes(paths: Sequence[str]) -> None:
    """Raises ModelError when weights cannot be averaged, as far as files at hand tell before any is loaded."""
    shapes = {path: weight_shapes(path) for path in paths}
    first, *others = [path for path in paths if shapes[path]] or [""]
    for other in others:
        _check(shapes[first], shapes[other], first, other)


def _shapes(weights: "Mapping[str, Tensor]") -> dict[str, list[int]]:
    return {name: list(weight.shape) for name, weight in weights.items()}


def _check(first: Mapping[str, list[int]], other: Mapping[str, list[int]], first_path: str, other_path: str) -> None:
    for name in dict.fromkeys([*first, *other]):
        if first.get(name) != other.get(name):
            raise ModelError(
                f"weights of '{first_path}' and '{other_path}' cannot be averaged: '{name}' is "
                f"{first.get(name, 'absent')} in the first and {other.get(name, 'absent')} in the other. Members of "
                "combine: weights are trained from the same model; choose mean, worst or uncertainty for others"
            )
