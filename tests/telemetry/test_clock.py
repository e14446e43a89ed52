import math
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.telemetry.catalogue import CATALOGUE
from rlhf_ray.telemetry.clock import PHASES, PhaseClock


class Hand:
    """A clock moved by hand."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def hand() -> Iterator[Hand]:
    yield Hand()


def test_a_phase_adds_up_over_its_visits_and_the_rest_is_other(hand: Hand) -> None:
    clock = PhaseClock(hand)
    with clock.phase("generate"):
        hand.time += 2
    hand.time += 0.5
    with clock.phase("learn"):
        hand.time += 4
    with clock.phase("generate"):
        hand.time += 1
    assert clock.finish() == {
        "time/generate": 3,
        "time/score": 0,
        "time/learn": 4,
        "time/publish": 0,
        "time/checkpoint": 0,
        "time/other": 0.5,
        "time/update": 7.5,
    }


def test_finish_starts_the_next_update(hand: Hand) -> None:
    clock = PhaseClock(hand)
    with clock.phase("learn"):
        hand.time += 4
    clock.finish()
    hand.time += 1
    assert clock.finish()["time/learn"] == 0
    hand.time += 3
    assert clock.finish()["time/update"] == 3


def test_a_phase_that_raises_is_counted_and_left(hand: Hand) -> None:
    clock = PhaseClock(hand)
    with pytest.raises(RuntimeError), clock.phase("score"):
        hand.time += 2
        raise RuntimeError
    with clock.phase("score"):
        hand.time += 1
    assert clock.finish()["time/score"] == 3


def test_phases_do_not_nest(hand: Hand) -> None:
    clock = PhaseClock(hand)
    with pytest.raises(ValueError, match="'learn' inside phase 'score'"), clock.phase("score"), clock.phase("learn"):
        pass


def test_an_update_does_not_finish_inside_a_phase(hand: Hand) -> None:
    clock = PhaseClock(hand)
    with pytest.raises(ValueError, match="inside phase 'score'"), clock.phase("score"):
        clock.finish()


def test_an_unknown_phase_is_refused(hand: Hand) -> None:
    with pytest.raises(ValueError, match="no phase 'training'"), PhaseClock(hand).phase("training"):
        pass


@given(st.lists(st.tuples(st.sampled_from([*PHASES, None]), st.floats(0, 1e4)), max_size=30))
def test_phases_and_other_sum_to_the_update(steps: list[tuple[str | None, float]]) -> None:
    hand = Hand()
    clock = PhaseClock(hand)
    for phase, seconds in steps:
        if phase is None:
            hand.time += seconds
            continue
        with clock.phase(phase):
            hand.time += seconds
    times = clock.finish()
    total = times.pop("time/update")
    assert math.isclose(sum(times.values()), total, abs_tol=1e-6)
    assert times["time/other"] >= -1e-6


def test_all_times_are_catalogued() -> None:
    assert PhaseClock().finish().keys() <= CATALOGUE.keys()
