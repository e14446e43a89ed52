import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.data.order import SampleOrder, held_out_split
from rlhf_ray.errors import DataError

SIZE = st.integers(1, 30)
SEED = st.integers(0, 2**40)


@given(SIZE, SEED, st.lists(st.integers(0, 50), max_size=8))
def test_every_index_comes_exactly_once_an_epoch_however_it_is_taken(size, seed, takes):
    order = SampleOrder(size, seed)
    taken = np.concatenate([np.empty(0, np.int64), *(order.take(n) for n in takes)])
    assert len(taken) == sum(takes) == order.position
    for start in range(0, len(taken) - size + 1, size):
        assert sorted(taken[start : start + size]) == list(range(size))


@given(SIZE, SEED, st.integers(0, 80), st.integers(0, 80))
def test_a_restored_order_goes_on_as_the_uninterrupted_one(size, seed, before, after):
    order = SampleOrder(size, seed)
    order.take(before)
    resumed = SampleOrder(size, seed)
    resumed.restore(order.state())
    assert resumed.take(after).tolist() == order.take(after).tolist()


def test_epochs_and_seeds_are_shuffled_differently():
    order = SampleOrder(50, seed=0)
    first, second, other = order.take(50), order.take(50), SampleOrder(50, seed=1).take(50)
    assert first.tolist() != second.tolist()
    assert first.tolist() != other.tolist()
    assert second.tolist() != other.tolist()
    assert first.dtype == np.int64


def test_a_taken_array_may_be_changed_without_changing_the_order():
    order = SampleOrder(5, seed=0)
    order.take(5)[:] = -1
    again = SampleOrder(5, seed=0)
    again.take(2)[:] = -1
    assert again.take(3).min() >= 0


@pytest.mark.parametrize("other", [SampleOrder(7, 0), SampleOrder(6, 1)])
def test_a_state_over_other_data_or_seed_is_refused(other):
    with pytest.raises(DataError, match="resume with the same data and seed"):
        other.restore(SampleOrder(6, 0).state())


def test_an_order_over_nothing_is_refused():
    with pytest.raises(ValueError, match="size 0"):
        SampleOrder(0, 0)


@given(st.integers(0, 200), st.floats(0, 1), SEED)
def test_train_and_held_out_are_disjoint_and_complete(size, share, seed):
    train, held_out = held_out_split(size, share, seed)
    assert sorted([*train, *held_out]) == list(range(size))
    assert len(train) >= min(size, 1)
    if share > 0 and size > 1:
        assert len(held_out) >= 1


def test_held_out_share_is_rounded_and_drawn_by_the_seed():
    train, held_out = held_out_split(1000, 0.05, 0)
    assert (len(train), len(held_out)) == (950, 50)
    assert held_out.tolist() == held_out_split(1000, 0.05, 0)[1].tolist()
    assert held_out.tolist() != held_out_split(1000, 0.05, 1)[1].tolist()
    assert held_out_split(1000, 0.0, 0)[1].tolist() == []


def test_held_out_rows_are_not_the_first_of_the_first_epoch():
    """numpy takes [seed] and [seed, 0] for the same entropy; one stream for both would tie split and order."""
    _, held_out = held_out_split(1000, 0.05, 3)
    assert set(held_out.tolist()) != set(SampleOrder(1000, 3).take(50).tolist())
