import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.data.order import MixedOrder, SampleOrder, held_out_by_source, held_out_split, proportional
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


# Several sources

NAMES = st.lists(st.sampled_from(["a", "b", "c"]), min_size=3, max_size=40)


def mixed(counts, weights, seed=0):
    """An order over `counts` samples of each source, source after source."""
    return MixedOrder(np.repeat(list(counts), list(counts.values())), weights, seed)


def test_an_epoch_has_each_sources_share_whatever_its_size():
    order = mixed({"people": 3, "ai": 9}, {"people": 3, "ai": 1})
    # 12 samples an epoch, 9 of 3 people's: all of them three times. 3 of the 9 others: all of them in three epochs.
    epochs = [order.take(12) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch[epoch < 3]) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert sorted(place for epoch in epochs for place in epoch[epoch >= 3]) == list(range(3, 12))


def test_every_pass_over_a_source_is_shuffled_differently_and_sources_lie_mixed():
    order = mixed({"a": 20, "b": 20}, {"a": 1, "b": 3})
    epochs = [order.take(40) for _ in range(3)]
    # Of the first source ten an epoch: two epochs are a pass, and the next begins with others.
    first, second, third = ({*epoch[epoch < 20]} for epoch in epochs)
    assert not first & second and first | second == set(range(20))
    assert third not in (first, second)
    assert 0 < (epochs[0][:10] < 20).sum() < 10


@given(NAMES, SEED, st.lists(st.integers(0, 50), max_size=6), st.lists(st.floats(0.1, 10), min_size=3, max_size=3))
def test_a_mix_depends_on_the_seed_alone_and_draws_no_sample_of_a_pass_twice(names, seed, takes, weights):
    sources = np.array([*"abc", *names])
    weights = dict(zip("abc", weights, strict=True))
    try:
        one, other = (MixedOrder(sources, weights, seed) for _ in range(2))
    except DataError:
        return
    total = sum(takes)
    taken = np.concatenate([np.empty(0, np.int64), *(one.take(n) for n in takes)])
    assert taken.tolist() == other.take(total).tolist()
    epochs = -(-total // len(sources))
    whole = MixedOrder(sources, weights, seed).take(epochs * len(sources))
    for name, count in one.counts.items():
        times = np.bincount(whole[sources[whole] == name], minlength=len(sources))[sources == name]
        assert times.sum() == epochs * count
        assert np.ptp(times) <= 1


@given(st.integers(0, 1000), st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_shares_are_whole_add_up_and_are_off_by_less_than_one(total, weights):
    counts = proportional(total, weights)
    assert sum(counts) == total
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - total * weight / sum(weights)) < 1


def test_a_source_that_would_be_given_no_sample_or_has_none_is_refused():
    with pytest.raises(DataError, match=r"data.sources.b: 0 of the 10 rows of an epoch .* it has 1 to train on"):
        mixed({"a": 9, "b": 1}, {"a": 1000, "b": 1})
    with pytest.raises(DataError, match=r"data.sources.b: 5 of the 10 rows of an epoch .* it has 0 to train on"):
        mixed({"a": 10}, {"a": 1, "b": 1})


def test_every_source_is_held_out_in_part_and_one_source_as_if_it_had_no_name():
    sources = np.array(["large"] * 50 + ["small"] * 4)
    train, held_out = held_out_by_source(sources, 0.1, 7)
    assert sorted([*train, *held_out]) == list(range(54))
    assert (sources[held_out] == "large").sum() == 5 and (sources[held_out] == "small").sum() == 1
    alone = held_out_by_source(np.full(30, ""), 0.1, 7)
    assert [part.tolist() for part in alone] == [part.tolist() for part in held_out_split(30, 0.1, 7)]
