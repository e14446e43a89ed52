import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_ray.algorithms.preference_loss import accuracy, bradley_terry, brier, expected_calibration_error

MEASURES = [accuracy, brier, expected_calibration_error]
Probability = st.floats(0, 1)


def gradient(d: float, p: float) -> float:
    chosen = torch.tensor([d], dtype=torch.float64, requires_grad=True)
    bradley_terry(chosen, torch.zeros(1), torch.tensor([p], dtype=torch.float64)).sum().backward()
    assert chosen.grad is not None
    return chosen.grad.item()


def test_loss_matches_numbers_worked_by_hand() -> None:
    # d = ln 3, so sigmoid(d) = 3/4.
    chosen, rejected = torch.tensor([math.log(3.0) + 1]), torch.tensor([1.0])
    assert bradley_terry(chosen, rejected).item() == pytest.approx(-math.log(0.75))
    soft = bradley_terry(chosen, rejected, torch.tensor([0.6]))
    assert soft.item() == pytest.approx(-0.6 * math.log(0.75) - 0.4 * math.log(0.25))


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_the_minimum_lies_at_the_logit_of_p(p: float) -> None:
    best = math.log(p / (1 - p))
    assert gradient(best, p) == pytest.approx(0, abs=1e-12)
    assert gradient(best - 0.1, p) < 0 < gradient(best + 0.1, p)


@given(st.floats(-8, 8), Probability)
def test_the_gradient_is_the_predicted_probability_minus_p(d: float, p: float) -> None:
    assert gradient(d, p) == pytest.approx(1 / (1 + math.exp(-d)) - p, abs=1e-12)


def test_certain_labels_give_the_usual_loss_one_way_or_the_other() -> None:
    chosen, rejected = torch.randn(2, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    usual = -logsigmoid(chosen - rejected)
    torch.testing.assert_close(bradley_terry(chosen, rejected), usual)
    torch.testing.assert_close(bradley_terry(chosen, rejected, torch.ones(20)), usual)
    torch.testing.assert_close(bradley_terry(rejected, chosen, torch.zeros(20)), usual)


@pytest.mark.parametrize("margin", [0.5, torch.tensor([0.5, 0.5])])
def test_a_margin_must_be_won_before_the_loss_is_that_of_a_tie(margin: Tensor | float) -> None:
    chosen, rejected = torch.tensor([1.5, 2.0]), torch.tensor([1.0, 1.0])
    losses = bradley_terry(chosen, rejected, margin=margin)
    assert losses.tolist() == pytest.approx([math.log(2), math.log(1 + math.exp(-0.5))])


def test_centring_pulls_the_sum_of_both_rewards_and_not_their_difference() -> None:
    chosen = torch.tensor([3.0], requires_grad=True)
    rejected = torch.tensor([1.0], requires_grad=True)
    (bradley_terry(chosen, rejected, centre=0.01) - bradley_terry(chosen, rejected)).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert [chosen.grad.item(), rejected.grad.item()] == pytest.approx([0.08, 0.08])  # 2 * 0.01 * (3 + 1)


def test_far_rewards_give_large_finite_losses() -> None:
    far = torch.tensor([-1e4])
    assert bradley_terry(far, -far, torch.tensor([0.5])).item() == pytest.approx(1e4)
    assert bradley_terry(far, -far).item() == pytest.approx(2e4)


def test_accuracy_counts_agreement_and_half_a_tie() -> None:
    # right, wrong, right for a pair named the other way round, predicted tie, labelled tie
    probabilities, labels = torch.tensor([0.9, 0.2, 0.2, 0.5, 0.8]), torch.tensor([1.0, 0.7, 0.1, 1.0, 0.5])
    assert accuracy(probabilities, labels).item() == pytest.approx((1 + 0 + 1 + 0.5 + 0.5) / 5)


def test_brier_score_by_hand() -> None:
    assert brier(torch.tensor([0.9, 0.4]), torch.tensor([1.0, 0.0])).item() == pytest.approx((0.01 + 0.16) / 2)


def test_calibration_error_by_hand() -> None:
    # Bins of 0.05 from 0.5. In [0.9, 0.95) mean confidence 0.91 and two of three right: gap 0.73 / 3. Neighbours:
    # 0.71, right, gap 0.29, and 0.79, wrong, gap 0.79, which would cancel in one bin.
    probabilities = torch.tensor([0.901, 0.91, 0.919, 0.71, 0.79], dtype=torch.float64)
    labels = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    error = expected_calibration_error(probabilities, labels)
    assert error.item() == pytest.approx((0.73 + 0.29 + 0.79) / 5)


def test_a_calibrated_model_has_no_calibration_error_on_pairs_that_name_the_better_one_first() -> None:
    # Of ten pairs predicted at 0.8 two are wrong; named better-first these are predictions of 0.2 for label 1.
    probabilities = torch.tensor([0.8] * 8 + [0.2] * 2, dtype=torch.float64)
    assert expected_calibration_error(probabilities, torch.ones(10)).item() == pytest.approx(0, abs=1e-12)


def test_always_answering_one_half_is_calibrated_and_certainty_falls_in_the_last_bin() -> None:
    assert expected_calibration_error(torch.full((4,), 0.5), torch.tensor([1.0, 1.0, 1.0, 0.0])).item() == 0
    assert expected_calibration_error(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0])).item() == pytest.approx(0.5)


@pytest.mark.parametrize("measure", MEASURES)
@given(pairs=st.lists(st.tuples(Probability, Probability), min_size=1, max_size=20), swaps=st.integers(0, 2**20))
def test_measures_do_not_depend_on_which_of_a_pair_is_named_first(measure, pairs, swaps: int) -> None:
    # 64ths, for which 1 - p is exact, so that rounding moves no pair to another bin.
    probabilities, labels = (torch.tensor(pairs, dtype=torch.float64) * 64).round().div(64).T
    swapped = torch.tensor([swaps >> place & 1 for place in range(len(pairs))], dtype=torch.bool)
    other = [torch.where(swapped, 1 - x, x) for x in (probabilities, labels)]
    torch.testing.assert_close(measure(*other), measure(probabilities, labels))
