from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.runtime.admission import Admission, Terms
from rlhf_ray.runtime.ledger import Group


def numbers(groups: list[Group]) -> list[int]:
    return [group.number for group in groups]


def test_as_many_groups_are_admitted_as_the_updates_up_to_the_bound_train() -> None:
    admission = Admission(Terms(updates=10, groups_per_update=3, max_staleness=1))
    first = admission.admit(0)
    assert numbers(first) == [0, 1, 2, 3, 4, 5] and {group.deadline for group in first} == {1}
    assert admission.admit(0) == []
    second = admission.admit(1)
    assert numbers(second) == [6, 7, 8] and {group.deadline for group in second} == {2}


def test_the_last_updates_admit_nothing_that_no_update_would_train() -> None:
    admission = Admission(Terms(updates=2, groups_per_update=3, max_staleness=4))
    assert len(admission.admit(0)) == 6 and admission.admit(1) == []


def test_without_staleness_an_update_waits_for_every_group_of_its_own() -> None:
    admission = Admission(Terms(updates=2, groups_per_update=3))
    groups = admission.admit(0)
    for group in groups[:2]:
        admission.is_ready(group)
    assert admission.take(0) is None
    admission.is_ready(groups[2])
    assert admission.take(0) == [0, 1, 2]


def test_a_straggler_holds_up_no_update_before_it_must() -> None:
    """Two updates of two may go by with four groups under way: any two can be the first, the others are the second."""
    admission = Admission(Terms(updates=3, groups_per_update=2, max_staleness=1))
    groups = admission.admit(0)
    admission.is_ready(groups[1])
    admission.is_ready(groups[3])
    assert admission.take(0) == [1, 3]
    later = admission.admit(1)
    for group in [*later, groups[0]]:
        admission.is_ready(group)
    # Group 2 is due now; with a later one in its place it would be trained too late.
    assert admission.take(1) is None
    admission.is_ready(groups[2])
    assert admission.take(1) == [0, 2]
    assert admission.take(2) == [4, 5]


def test_the_age_of_what_waited_to_be_sent_begins_when_it_is_sent() -> None:
    admission = Admission(Terms(updates=5, groups_per_update=1, max_staleness=1))
    one, other = admission.admit(0)
    admission.is_ready(one)
    assert admission.take(0) == [0]
    [new] = admission.admit(1)
    admission.sent(other, 1)
    assert other.deadline == 2
    admission.is_ready(new)
    assert admission.take(1) == [2]


def test_a_place_whose_groups_teach_nothing_is_given_away_so_often_and_then_stays_empty() -> None:
    admission = Admission(Terms(updates=1, groups_per_update=2, max_refills=1))
    first, second = admission.admit(0)
    admission.is_ready(second)
    admission.dropped(first)
    assert admission.take(0) is None
    [refill] = admission.admit(0)
    assert (refill.number, refill.refill) == (2, 1)
    admission.dropped(refill)
    assert admission.admit(0) == []
    assert admission.take(0) == [1]


@given(
    st.integers(0, 2**32),
    st.builds(Terms, st.integers(1, 6), st.integers(1, 5), st.integers(0, 4), st.integers(0, 2)),
)
def test_whatever_finishes_when_every_group_is_trained_once_by_its_deadline(seed: int, terms: Terms) -> None:
    random = np.random.default_rng(seed)
    admission = Admission(terms)
    under_way: list[Group] = []
    unsent: list[Group] = []
    sampled: dict[int, int] = {}
    trained: Counter[int] = Counter()
    dropped = 0
    for update in range(terms.updates):
        for _ in range(1000):
            unsent += admission.admit(update)
            chosen = admission.take(update)
            if chosen is not None:
                break
            while unsent and (random.uniform() < 0.5 or not under_way):
                group = unsent.pop(0)
                admission.sent(group, update)
                sampled[group.number] = update
                under_way.append(group)
            group = under_way.pop(random.integers(len(under_way)))
            if terms.max_refills and random.uniform() < 0.2:
                admission.dropped(group)
                dropped += 1
            else:
                admission.is_ready(group)
        else:
            pytest.fail("an update never came")
        assert len(chosen) <= terms.groups_per_update
        if not dropped:
            assert len(chosen) == terms.groups_per_update
        trained.update(chosen)
        assert all(update - sampled[number] <= terms.max_staleness for number in chosen)
    assert set(trained.values()) <= {1}
    assert len(trained) + dropped == admission.number and not under_way and not unsent


def test_a_state_brings_back_empty_places_and_refills_that_are_due() -> None:
    """One place of update 0 is empty for good and one waits for its refill: the other two groups are under way."""
    terms = Terms(updates=2, groups_per_update=4, max_refills=1)
    admission = Admission(terms)
    first, second, *others = admission.admit(0)
    admission.dropped(first)
    [refill] = admission.admit(0)
    admission.dropped(refill)
    admission.dropped(second)
    again = Admission(terms)
    groups = again.restore(admission.state(), [(group.number, group.refill) for group in others], version=0)
    assert numbers(groups) == [2, 3] and [group.deadline for group in groups] == [0, 0]
    [late] = again.admit(0)
    assert (late.number, late.refill) == (5, 1)
    for group in groups:
        again.is_ready(group)
    assert again.take(0) is None
    again.is_ready(late)
    assert again.take(0) == [2, 3, 5]
    assert numbers(again.admit(1)) == [6, 7, 8, 9]
