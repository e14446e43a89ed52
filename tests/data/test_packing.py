import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.data.packing import balanced, micro_batches

LENGTHS = st.lists(st.integers(0, 40), max_size=60)


def test_longest_rows_are_placed_first_and_small_ones_fill_the_gaps():
    # 7 opens bin 0 (3 free), 6 opens bin 1 (4 free), 4 fills bin 1, 3 fills bin 0
    assert micro_batches([3, 6, 4, 7], 10) == [[3, 0], [1, 2]]


def test_a_row_longer_than_the_budget_is_named():
    with pytest.raises(ValueError, match=r"row 1 has 11 tokens, more than the micro-batch budget of 10"):
        micro_batches([3, 11], 10)


def test_a_row_of_exactly_the_budget_fits():
    assert micro_batches([10, 10], 10) == [[0], [1]]


@given(LENGTHS, st.integers(40, 100))
def test_every_row_is_in_one_micro_batch_and_none_is_over_budget(lengths, budget):
    bins = micro_batches(lengths, budget)
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    assert all(rows and sum(lengths[row] for row in rows) <= budget for rows in bins)


@given(LENGTHS, st.integers(40, 100))
def test_no_two_micro_batches_would_fit_into_one(lengths, budget):
    weights = sorted(sum(lengths[row] for row in rows) for rows in micro_batches(lengths, budget))
    assert len(weights) < 2 or weights[0] + weights[1] > budget


def test_parts_are_of_similar_weight():
    # 8 -> a, 7 -> b, 6 -> b (13), 5 -> a (13), 4 -> a (17): the classic example of longest first
    assert balanced([8, 7, 6, 5, 4], 2) == [[0, 3, 4], [1, 2]]


def test_there_are_as_many_parts_as_asked_for_even_if_rows_are_few():
    assert balanced([5], 3) == [[0], [], []]
    assert balanced([], 2) == [[], []]


def test_no_parts_cannot_be_asked_for():
    with pytest.raises(ValueError, match="0 parts"):
        balanced([1], 0)


@given(LENGTHS, st.integers(1, 7))
def test_every_row_is_in_one_part_and_parts_differ_by_at_most_a_row(lengths, parts):
    lists = balanced(lengths, parts)
    weights = [sum(lengths[row] for row in rows) for rows in lists]
    assert len(lists) == parts
    assert sorted(row for rows in lists for row in rows) == list(range(len(lengths)))
    assert max(weights) - min(weights) <= max(lengths, default=0)


@given(LENGTHS)
def test_the_same_lengths_give_the_same_partition(lengths):
    assert balanced(lengths, 3) == balanced(list(lengths), 3)
    assert micro_batches(lengths, 40) == micro_batches(list(lengths), 40)
