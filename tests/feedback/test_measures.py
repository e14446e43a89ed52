import math

import pytest

from rlhf_ray.feedback.measures import calibration, leanings
from tests.feedback.test_judging import LN3, LN4, LN9, judged_of, odds, pair_of


def test_leanings_by_hand() -> None:
    # p((A)) 3/4 and 1/10: the same answer both times. Then 3/4 and 3/4: (A) whatever stands there.
    steady, fickle = pair_of(odds(0.6, 0.2), odds(0.05, 0.45)), pair_of(odds(0.3, 0.1), odds(0.03, 0.01))
    found = leanings([judged_of(steady, fickle)])
    assert found == {
        "position_bias": pytest.approx((0.75 + 0.1 + 0.75 + 0.75) / 4 - 0.5),
        "flip_rate": 0.5,
        "option_mass": pytest.approx((0.8 + 0.5 + 0.4 + 0.04) / 4),
        "low_mass_share": 0.5,
    }


def test_a_judge_that_sees_no_position_has_no_bias() -> None:
    found = leanings([judged_of(pair_of((0.0, -2.0), (-2.0, 0.0)))])
    assert found["position_bias"] == pytest.approx(0)
    assert found["flip_rate"] == 0


def test_undecided_in_one_order_is_half_a_flip() -> None:
    assert leanings([judged_of(pair_of((0.0, 0.0), (0.0, LN3)))])["flip_rate"] == 0.5


def test_spread_is_the_deviation_over_the_principles_of_a_pair() -> None:
    # 0.825 and 0.35 by two principles: |difference| / sqrt 2. The second pair has one principle and no spread.
    several, one = pair_of((LN3, 0.0), (0.0, LN9), (0.0, LN4), (0.0, 0.0)), pair_of((0.0, 0.0), (0.0, 0.0))
    assert leanings([judged_of(several, one)])["spread"] == pytest.approx(0.475 / math.sqrt(2))


def test_what_was_answered_in_one_order_alone_says_nothing_of_positions() -> None:
    half = pair_of((LN9, 0.0), None)
    assert leanings([judged_of(half)]) == {}
    assert leanings([judged_of(half, pair_of((0.0, 0.0), (0.0, 0.0)))])["position_bias"] == 0


def test_calibration_by_hand() -> None:
    # p = 0.825 and 0.825 for the better answer, 0.175 for it, and one that was not answered
    right, wrong = pair_of((LN3, 0.0), (0.0, LN9)), pair_of((0.0, LN3), (LN9, 0.0))
    found = calibration([judged_of(pair, label=1.0) for pair in (right, right, wrong, pair_of((LN3, 0.0), None))])
    assert found["pairs"] == 3 and found["unlabelled"] == 1
    assert found["accuracy"] == pytest.approx(2 / 3)
    # Wilson, z = 1.96: (2/3 + 0.6403 ± 1.96 sqrt(2/27 + 0.1067)) / 2.2805
    assert found["accuracy_interval"] == pytest.approx((0.2077, 0.9385), abs=1e-3)
    assert found["ece"] == pytest.approx(0.825 - 2 / 3)
    assert found["brier"] == pytest.approx((2 * 0.175**2 + 0.825**2) / 3)
    assert found["reliability"] == [{"confidence": pytest.approx(0.825), "agreement": pytest.approx(2 / 3), "pairs": 3}]


def test_without_an_answer_there_is_nothing_to_measure() -> None:
    assert calibration([]) == {"pairs": 0, "unlabelled": 0}
    assert leanings([]) == {}
