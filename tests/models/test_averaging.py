"""Averaged reward models: what the average scores is known exactly where members differ in their heads alone."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification

from rlhf_ray.errors import ModelError
from rlhf_ray.models import load
from rlhf_ray.models.averaging import averaged_classifier, check_same_shapes

IDS = torch.tensor([[7, 8, 9, 10, 1]])


def member(folder: Path, base: str, seed: int, mean: float, sd: float, spread: float = 0.0) -> str:
    """`base` with a head of its own and, by `spread`, other weights; scores of mean and sd."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(base)
    torch.manual_seed(seed)
    with torch.no_grad():
        model.score.weight.normal_()
        for weight in model.base_model.parameters():
            weight.add_(spread * torch.randn_like(weight))
    setattr(model.config, load.NORMALISATION, {"mean": mean, "sd": sd})
    model.save_pretrained(folder)
    return str(folder)


def normalised(path: str) -> float:
    model: Any = AutoModelForSequenceClassification.from_pretrained(path)
    mean, sd = load.score_normalisation(model.config)
    with torch.no_grad():
        return (model(IDS).logits.item() - mean) / sd


def averaged(paths: list[str]) -> float:
    """By transformers' own forward pass."""
    model, offset = averaged_classifier(paths, "cpu", False)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(IDS).logits.item() - offset


@pytest.fixture
def three(reward_model: str, tmp_path: Path) -> list[str]:
    scales = [(0.5, 2.0), (-1.0, 0.25), (0.0, 1.0)]
    return [member(tmp_path / f"{seed}", reward_model, seed, *scale) for seed, scale in enumerate(scales)]


def test_members_that_differ_in_their_heads_alone_score_as_their_mean_in_equal_units(three: list[str]) -> None:
    expected = sum(map(normalised, three)) / 3
    assert averaged(three) == pytest.approx(expected, abs=1e-4)


def test_the_order_of_members_makes_no_difference(three: list[str]) -> None:
    assert averaged(three) == pytest.approx(averaged(three[::-1]), abs=1e-5)


def test_members_close_to_each_other_score_almost_as_their_mean(reward_model: str, tmp_path: Path) -> None:
    """To first order: a tenth of the distance, a hundredth of the difference."""
    apart = []
    for spread in (1e-2, 1e-3):
        paths = [member(tmp_path / f"{spread}{n}", reward_model, n, 0.0, 1.0, spread) for n in range(2)]
        for path in paths:  # one head for both, for the difference of heads is of first order too
            model: Any = AutoModelForSequenceClassification.from_pretrained(path)
            with torch.no_grad():
                model.score.weight.fill_(1.0)
            model.save_pretrained(path)
        apart.append(abs(averaged(paths) - sum(map(normalised, paths)) / 2))
    assert apart[1] < max(apart[0] / 20, 1e-4)


def test_members_of_other_shapes_are_refused_before_and_while_they_are_loaded(
    reward_model: str, policy: str, tmp_path: Path
) -> None:
    other = tiny.write_reward_model(tmp_path / "other", layers=3)
    said = r"cannot be averaged: 'model.layers.2.*' is absent in the first and \[.* in the other.*choose mean, worst"
    with pytest.raises(ModelError, match=said):
        check_same_shapes([reward_model, other])
    with pytest.raises(ModelError, match=said):
        averaged_classifier([reward_model, other], "cpu", False)
    check_same_shapes([reward_model, "owner/not-at-hand"])
