import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.algorithms.intervals import mcnemar, mean_and_se, wilson

Flag = st.sampled_from([0.0, 0.5, 1.0])
Pairs = st.lists(st.tuples(Flag, Flag), max_size=30)


def test_wilson_interval_worked_by_hand() -> None:
    # z = 2, n = 4, p = 1/2: (1/2 + 1/2 ± 2 sqrt(1/16 + 1/16)) / 2 = (1 ± sqrt(1/2)) / 2.
    assert wilson(2, 4, z=2) == pytest.approx(((1 - math.sqrt(0.5)) / 2, (1 + math.sqrt(0.5)) / 2))
    # All of n right: from n / (n + z²) to 1.
    assert wilson(12, 12, z=2) == pytest.approx((12 / 16, 1))
    assert wilson(0, 12, z=2) == pytest.approx((0, 4 / 16))


def test_of_160_items_half_of_them_right_the_share_is_known_to_eight_points() -> None:
    low, high = wilson(80, 160)
    assert (high - low) / 2 == pytest.approx(0.0766, abs=5e-5)


@given(n=st.integers(1, 400), share=st.floats(0, 1))
def test_wilson_bounds_are_where_the_score_test_is_just_at_z(n: int, share: float) -> None:
    # The definition: shares q for which |p - q| = z sqrt(q (1 - q) / n).
    low, high = wilson(share * n, n)
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1
    for q in (low, high):
        assert (share - q) ** 2 == pytest.approx(1.96**2 * q * (1 - q) / n, abs=1e-12)


@given(n=st.integers(1, 200), halves=st.integers(0, 400))
def test_wilson_of_the_failures_is_the_mirror_image(n: int, halves: int) -> None:
    successes = min(halves / 2, n)
    low, high = wilson(successes, n)
    assert wilson(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (3, 10), (50, 221), (160, 160)])
def test_wilson_agrees_with_scipy(successes: int, n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    theirs = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson(successes, n, z=stats.norm.ppf(0.975)) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize(("successes", "n", "message"), [(0, 0, "at least one"), (5, 4, "5"), (-1, 4, "-1")])
def test_an_interval_of_impossible_counts_is_refused(successes: float, n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wilson(successes, n)


def test_mcnemar_worked_by_hand() -> None:
    # Five better, one worse: 2 (C(6,0) + C(6,1)) / 64 = 14 / 64. The two that did not change do not count.
    before, after = [0, 0, 0, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 0, 1, 0]
    assert mcnemar(before, after) == (5, 1, pytest.approx(14 / 64))


def test_a_step_to_a_tie_is_a_change_and_a_tie_twice_is_none() -> None:
    assert mcnemar([0.5, 0.5, 0.5], [0.5, 1, 0]) == (1, 1, 1.0)
    assert mcnemar([0, 0.5, 0, 0.5], [0.5, 1, 0.5, 1]) == (4, 0, pytest.approx(2 / 16))


def test_where_nothing_changed_p_is_one() -> None:
    assert mcnemar([1, 0, 0.5], [1, 0, 0.5]) == (0, 0, 1.0)
    assert mcnemar([], []) == (0, 0, 1.0)


@given(Pairs)
def test_p_is_the_share_of_coin_throws_at_least_as_lopsided(pairs: list[tuple[float, float]]) -> None:
    changed = [pair for pair in pairs if pair[0] != pair[1]][:8]
    result = mcnemar([before for before, _ in changed], [after for _, after in changed])
    lean = abs(result.better - result.worse)
    throws = [abs(sum(throw)) >= lean for throw in product([-1, 1], repeat=len(changed))]
    assert result.p == pytest.approx(sum(throws) / len(throws))


@given(Pairs)
def test_before_and_after_exchanged_exchange_better_and_worse(pairs: list[tuple[float, float]]) -> None:
    before, after = [b for b, _ in pairs], [a for _, a in pairs]
    there, back = mcnemar(before, after), mcnemar(after, before)
    assert (there.better, there.worse, there.p) == (back.worse, back.better, back.p)


@pytest.mark.parametrize(("better", "worse"), [(9, 2), (0, 7), (30, 41), (700, 820)])
def test_mcnemar_agrees_with_scipy_also_where_powers_of_two_overflow(better: int, worse: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    result = mcnemar([0] * better + [1] * worse, [1] * better + [0] * worse)
    assert result.p == pytest.approx(stats.binomtest(better, better + worse).pvalue, rel=1e-9)


def test_different_items_are_refused() -> None:
    with pytest.raises(ValueError, match="before has 1, after has 2"):
        mcnemar([1], [1, 0])


def test_mean_and_standard_error_by_hand() -> None:
    # Mean 3, squared deviations 4, 0, 4: variance 8 / 2, standard error sqrt(4 / 3).
    assert mean_and_se([1, 3, 5]) == pytest.approx((3, math.sqrt(4 / 3)))


def test_a_single_value_has_no_standard_error_and_no_value_has_no_mean() -> None:
    mean, se = mean_and_se([2.0])
    assert mean == 2.0 and math.isnan(se)
    with pytest.raises(ValueError, match="at least one"):
        mean_and_se([])
