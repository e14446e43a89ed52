import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.evaluation.duels import duels

P = st.integers(0, 64).map(lambda n: n / 64)
Pairs = st.lists(st.tuples(P, P), min_size=1, max_size=30).map(np.array)


def test_a_win_needs_both_orders() -> None:
    # win, loss, flip to (A), flip to (B), one order undecided
    found = duels(np.array([[0.9, 0.6], [0.2, 0.4], [0.8, 0.3], [0.1, 0.7], [0.5, 0.9]]))
    assert (found.wins, found.ties, found.losses) == (1, 3, 1)
    assert found.win_rate == pytest.approx(2.5 / 5)
    assert found.flips == pytest.approx(2 / 5)
    # p of "(A)" is the first of each pair and one less the second: 0.9 0.4 0.2 0.6 0.8 0.7 0.1 0.3 0.5 0.1, mean 0.46.
    assert found.position_bias == pytest.approx(-0.04)
    # Wilson's interval of 1/2 is 1/2 ± 1/2 sqrt(z² / (n + z²)): its score equation at p = 1/2.
    reach = 0.5 * (1.96**2 / (5 + 1.96**2)) ** 0.5
    assert (found.low, found.high) == pytest.approx((0.5 - reach, 0.5 + reach))


def test_a_judge_that_always_answers_the_same_letter_finds_no_winner() -> None:
    found = duels(np.array([[0.9, 0.1]] * 7))
    assert (found.wins, found.ties, found.losses, found.win_rate) == (0, 7, 0, 0.5)
    assert (found.position_bias, found.flips) == (pytest.approx(0.4), 1)


@given(Pairs)
def test_who_is_called_ours_changes_wins_into_losses_and_no_bias(p: np.ndarray) -> None:
    ours, theirs = duels(p), duels(1 - p[:, ::-1])
    assert (ours.wins, ours.ties, ours.losses) == (theirs.losses, theirs.ties, theirs.wins)
    assert ours.win_rate == pytest.approx(1 - theirs.win_rate)
    assert ours.position_bias == pytest.approx(theirs.position_bias)
    assert ours.flips == theirs.flips
    assert ours.wins + ours.ties + ours.losses == len(p)


@pytest.mark.parametrize(
    ("p", "message"),
    [
        (np.zeros((0, 2)), r"got \(0, 2\)"),
        (np.zeros(2), r"got \(2,\)"),
        (np.array([[0.5, 1.5]]), "from 0 to 1"),
        (np.array([[np.nan, 0.5]]), "from 0 to 1"),
    ],
)
def test_what_are_no_probabilities_of_pairs_is_refused(p: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        duels(p)
