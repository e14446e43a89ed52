from random import Random
from statistics import mean

import pytest

from rlhf_ray.demo import gold
from rlhf_ray.demo.people import TEMPERATURE, label, preference_rows
from rlhf_ray.demo.world import World


def test_labels_follow_bradley_terry() -> None:
    """sigmoid(1) = 0.7311 when gold differs by one temperature; 20,000 labels have a standard error of 0.003."""
    rng = Random(0)
    assert mean(label(TEMPERATURE, 0.0, rng) for _ in range(20_000)) == pytest.approx(0.7311, abs=0.012)
    assert mean(label(0.0, TEMPERATURE, rng) for _ in range(20_000)) == pytest.approx(0.2689, abs=0.012)
    assert mean(label(0.3, 0.3, rng) for _ in range(20_000)) == pytest.approx(0.5, abs=0.014)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_about_a_quarter_of_the_labels_contradict_gold(seed: int) -> None:
    rows = preference_rows(World(seed), 3000)
    wrong = mean(gold.score(row["prompt"], row["chosen"]) < gold.score(row["prompt"], row["rejected"]) for row in rows)
    assert 0.2 < wrong < 0.3


def test_the_two_answers_of_a_pair_never_tie() -> None:
    for row in preference_rows(World(0), 500):
        assert gold.score(row["prompt"], row["chosen"]) != gold.score(row["prompt"], row["rejected"])


def test_held_out_pairs_are_about_held_out_prompts() -> None:
    world = World(0)
    train = {row["prompt"] for row in preference_rows(world, 500)}
    assert not train & {row["prompt"] for row in preference_rows(world, 500, "held_out")}
