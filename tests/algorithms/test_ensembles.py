import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.algorithms import ensembles

Columns = st.lists(st.lists(st.floats(-50, 50), min_size=3, max_size=3), min_size=1, max_size=8)
"""Of each answer, three members' scores."""


@given(Columns, st.floats(0, 10))
def test_every_combination_is_what_loops_over_members_give(columns: list[list[float]], coefficient: float) -> None:
    scores = torch.tensor(columns, dtype=torch.float64).T
    means = [sum(column) / 3 for column in columns]
    variances = [sum((x - mean) ** 2 for x in column) / 3 for column, mean in zip(columns, means, strict=True)]
    assert ensembles.mean(scores).tolist() == pytest.approx(means, abs=1e-9)
    assert ensembles.worst(scores).tolist() == [min(column) for column in columns]
    paid = [mean - coefficient * variance for mean, variance in zip(means, variances, strict=True)]
    assert ensembles.uncertainty(scores, coefficient).tolist() == pytest.approx(paid, abs=1e-6)
    assert ensembles.disagreement(scores).tolist() == pytest.approx([math.sqrt(v) for v in variances], abs=1e-6)


def test_numbers_worked_by_hand() -> None:
    scores = torch.tensor([[1.0, 0.0], [3.0, 0.0]])  # two members, two answers; they agree on the second
    assert ensembles.mean(scores).tolist() == [2, 0]
    assert ensembles.worst(scores).tolist() == [1, 0]
    assert ensembles.uncertainty(scores, 0.5).tolist() == [1.5, 0]
    assert ensembles.disagreement(scores).tolist() == [1, 0]


@given(Columns)
def test_an_answer_that_one_member_alone_likes_more_gains_nothing_from_the_worst(columns: list[list[float]]) -> None:
    scores = torch.tensor(columns, dtype=torch.float64).T
    liked = scores.clone()
    liked[0] += 10
    others = scores[1:].amin(0)
    assert (ensembles.worst(liked) <= others).all()
    assert (ensembles.mean(liked) > ensembles.mean(scores)).all()
