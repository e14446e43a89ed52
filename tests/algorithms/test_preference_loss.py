import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_ray.algorithms.preference_loss import (
    PAIRED,
    accuracy,
    bradley_terry,
    brier,
    dpo,
    expected_calibration_error,
    ipo,
    kto,
    kto_reference_point,
    length_controlled_accuracy,
    reliability,
)
from rlhf_ray.config.supervised import DPOConfig

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


def test_the_table_of_reliability_by_hand() -> None:
    # Confidences 0.62, right; 0.64, wrong by a label of a quarter; 0.96, right though named the other way round.
    probabilities, labels = torch.tensor([0.62, 0.64, 0.04]), torch.tensor([1.0, 0.25, 0.0])
    found = reliability(probabilities, labels)
    assert found.counts.tolist() == [0, 0, 2, 0, 0, 0, 0, 0, 0, 1]
    assert found.confidence[[2, 9]].tolist() == pytest.approx([0.63, 0.96])
    assert found.agreement[[2, 9]].tolist() == pytest.approx([0.625, 1.0])
    assert found.confidence[0].isnan() and found.agreement[0].isnan()


Pairs = st.lists(st.tuples(Probability, Probability), min_size=1, max_size=40)


@given(Pairs)
def test_the_calibration_error_is_the_tables_mean_gap(pairs) -> None:
    predicted, labels = (torch.tensor(pairs, dtype=torch.float64) * 64).round().div(64).T
    gaps: dict[int, float] = defaultdict(float)
    for probability, label in zip(predicted.tolist(), labels.tolist(), strict=True):
        confidence = max(probability, 1 - probability)
        right = 0.5 if probability == 0.5 else label if probability > 0.5 else 1 - label
        gaps[min(int((confidence - 0.5) / 0.05 + 1e-9), 9)] += confidence - right
    expected = sum(map(abs, gaps.values())) / len(pairs)
    assert expected_calibration_error(predicted, labels).item() == pytest.approx(expected, abs=1e-12)


def test_length_controlled_accuracy_weighs_both_sides_alike() -> None:
    # Better answer longer: right, right, wrong. Better answer shorter: wrong (named better first), right (named last).
    probabilities = torch.tensor([0.9, 0.8, 0.3, 0.2, 0.1, 0.9, 0.9])
    labels = torch.tensor([1.0, 0.9, 1.0, 1.0, 0.2, 1.0, 0.5])
    lengths = torch.tensor([[5, 2], [5, 2], [5, 2], [2, 5], [5, 2], [4, 4], [5, 2]])  # the last two belong to no side
    assert length_controlled_accuracy(probabilities, labels, lengths).item() == pytest.approx((2 / 3 + 1 / 2) / 2)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.3, 1.0]), st.integers(1, 9), st.integers(1, 9)), max_size=20))
def test_preferring_the_longer_answer_is_as_good_as_a_coin(pairs) -> None:
    pairs = [(1.0, 2, 1), (1.0, 1, 2), *pairs]  # one on each side
    labels = torch.tensor([pair[0] for pair in pairs])
    lengths = torch.tensor([pair[1:] for pair in pairs])
    longer = (lengths[:, 0] - lengths[:, 1]).sign() * 0.4 + 0.5
    assert length_controlled_accuracy(longer, labels, lengths).item() == pytest.approx(0.5)
    swapped = length_controlled_accuracy(1 - longer, 1 - labels, lengths.flip(1))
    assert swapped.item() == pytest.approx(0.5)


def test_a_side_without_pairs_has_no_length_controlled_accuracy() -> None:
    assert length_controlled_accuracy(torch.tensor([0.9]), torch.tensor([1.0]), torch.tensor([[2, 1]])).isnan()


# Direct preference learning

LogRatio = st.floats(-20, 20)
Beta = st.floats(0.01, 2)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def expected_dpo(chosen: float, rejected: float, p: float, beta: float) -> float:
    d = beta * (chosen - rejected)
    return p * math.log1p(math.exp(-d)) + (1 - p) * math.log1p(math.exp(d))


def expected_ipo(chosen: float, rejected: float, p: float, beta: float) -> float:
    """Azar et al. 2023 in the form that the derivation of eq. 17 starts from: regression of h on a coin of bias p, the
    better answer named first or second alike, less the part that no policy changes."""
    regression = 0.0
    for first, second, wins in ((chosen, rejected, p), (rejected, chosen, 1 - p)):
        for coin, probability in ((1, wins), (0, 1 - wins)):
            regression += 0.5 * probability * (first - second - coin / beta) ** 2
    return regression - 0.25 / beta**2


ORACLES = {"sigmoid": expected_dpo, "ipo": expected_ipo}


def test_the_configuration_offers_the_losses_that_there_are() -> None:
    assert set(get_args(DPOConfig.model_fields["loss"].annotation)) == {*PAIRED, "kto"} == {*ORACLES, "kto"}


def test_dpo_matches_numbers_worked_by_hand() -> None:
    # beta 0.5 of a difference of 2 ln 3 is ln 3, so sigmoid(d) = 3/4; then a label of 0.9, then the worse one first.
    chosen, rejected = doubles(2 * math.log(3) - 7, 2 * math.log(3), -7), doubles(-7, 0, 2 * math.log(3) - 7)
    losses = dpo(chosen, rejected, doubles(1, 0.9, 1), 0.5)
    by_hand = [-math.log(0.75), -0.9 * math.log(0.75) - 0.1 * math.log(0.25), -math.log(0.25)]
    assert losses.tolist() == pytest.approx(by_hand)


def test_ipo_matches_numbers_worked_by_hand() -> None:
    # beta 0.25: h should be 2. Here it is 3, then 3 at a label of 0.75: 0.75 * 1^2 + 0.25 * 5^2.
    assert ipo(doubles(1, 1), doubles(-2, -2), doubles(1, 0.75), 0.25).tolist() == pytest.approx([1, 7])


def test_kto_matches_numbers_worked_by_hand() -> None:
    # beta 0.5, reference point 1. Log-ratio 1 + 2 ln 3 is ln 3 above it, 1 - 2 ln 3 as far below.
    up, down = 1 + 2 * math.log(3), 1 - 2 * math.log(3)
    losses = kto(
        doubles(up, down, up, down), torch.tensor([True, True, False, False]), torch.tensor(1.0), 0.5, 1.0, 4.0
    )
    assert losses.tolist() == pytest.approx([1 / 4, 3 / 4, 4 * 3 / 4, 4 * 1 / 4])


def test_the_reference_point_is_the_mean_of_mismatched_log_ratios_if_positive() -> None:
    assert kto_reference_point(doubles(3, -1, 4)).item() == pytest.approx(2)
    assert kto_reference_point(doubles(1, -3)).item() == 0


def test_no_gradient_flows_through_the_reference_point() -> None:
    mismatched = doubles(3, 1).requires_grad_()
    assert not kto_reference_point(mismatched).requires_grad


@pytest.mark.parametrize("name", list(PAIRED))
@given(rows=st.lists(st.tuples(LogRatio, LogRatio, Probability), min_size=1, max_size=5), beta=Beta)
def test_paired_losses_are_the_loops_of_their_papers(name: str, rows: list[tuple[float, float, float]], beta: float):
    chosen, rejected, p = (doubles(*column) for column in zip(*rows, strict=True))
    found = PAIRED[name](chosen, rejected, p, beta)
    assert found.tolist() == pytest.approx([ORACLES[name](*row, beta) for row in rows], rel=1e-9, abs=1e-9)


@given(st.lists(st.tuples(LogRatio, st.booleans()), min_size=1, max_size=5), LogRatio, Beta)
def test_kto_is_the_loop_of_its_paper(rows: list[tuple[float, bool]], z: float, beta: float) -> None:
    found = kto(doubles(*(r for r, _ in rows)), torch.tensor([good for _, good in rows]), doubles(z)[0], beta, 1.5, 0.5)
    values = [1.5 - 1.5 * sigmoid(beta * (r - z)) if good else 0.5 - 0.5 * sigmoid(beta * (z - r)) for r, good in rows]
    assert found.tolist() == pytest.approx(values, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", list(PAIRED))
@given(chosen=LogRatio, rejected=LogRatio, p=Probability, beta=Beta)
def test_gradients_are_finite_differences(name: str, chosen: float, rejected: float, p: float, beta: float) -> None:
    inputs = doubles(chosen, rejected).requires_grad_()
    PAIRED[name](inputs[:1], inputs[1:], doubles(p), beta).sum().backward()
    oracle, step = ORACLES[name], 1e-4
    by_chosen = (oracle(chosen + step, rejected, p, beta) - oracle(chosen - step, rejected, p, beta)) / (2 * step)
    assert inputs.grad is not None
    assert inputs.grad.tolist() == pytest.approx([by_chosen, -by_chosen], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", list(PAIRED))
@given(chosen=LogRatio, rejected=LogRatio, p=Probability, beta=Beta, shift=LogRatio)
def test_a_pair_named_the_other_way_round_has_the_same_loss_and_what_both_share_does_not_count(
    name: str, chosen: float, rejected: float, p: float, beta: float, shift: float
) -> None:
    loss = PAIRED[name](doubles(chosen), doubles(rejected), doubles(p), beta)
    swapped = PAIRED[name](doubles(rejected), doubles(chosen), doubles(1 - p), beta)
    shifted = PAIRED[name](doubles(chosen + shift), doubles(rejected + shift), doubles(p), beta)
    torch.testing.assert_close(swapped, loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(shifted, loss, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_both_paired_losses_are_least_where_their_papers_say(p: float) -> None:
    # DPO at log-odds of the label, IPO at its distance from one half; both in nats of log-ratio times beta.
    for name, best in (("sigmoid", math.log(p / (1 - p))), ("ipo", p - 0.5)):
        h = doubles(best / 0.2).requires_grad_()
        PAIRED[name](h, doubles(0), doubles(p), 0.2).sum().backward()
        assert h.grad is not None
        assert h.grad.item() == pytest.approx(0, abs=1e-12)


def test_far_log_ratios_give_losses_and_gradients_that_are_finite() -> None:
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    losses = [PAIRED[name](far, -far, torch.ones(2), 0.1) for name in PAIRED]
    losses.append(kto(far, torch.tensor([True, True]), torch.tensor(0.0), 0.1))
    total = torch.stack(losses).sum()
    total.backward()
    assert far.grad is not None
    assert torch.isfinite(total) and torch.isfinite(far.grad).all()


def test_an_answer_far_on_its_side_still_has_a_gradient_in_kto() -> None:
    far = torch.tensor([30.0], requires_grad=True)
    kto(far, torch.tensor([True]), torch.tensor(0.0), 1.0).sum().backward()
    assert far.grad is not None
    assert far.grad.item() == pytest.approx(-math.exp(-30), rel=1e-3, abs=0)


# Another implementation, called with log-probabilities in place of a model

CHOSEN, REJECTED = doubles(-1.5, -4.0, -0.2, -2.0), doubles(-3.0, -0.5, -0.4, -2.0)
REFERENCE_CHOSEN, REFERENCE_REJECTED = doubles(-2.0, -2.5, -0.1, -3.0), doubles(-1.0, -1.5, -0.6, -3.0)


class Accelerator:
    """One process that gathers nothing."""

    device = torch.device("cpu")

    def gather(self, x: Tensor) -> Tensor:
        return x

    gather_for_metrics = gather


def trainer(**settings: Any) -> Any:
    """What TRL's `_compute_loss` reads of its trainer."""
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


def language_model(logps: Tensor) -> Any:
    """Answers of one token each after a prompt of one, so that sums over tokens and means are the same."""
    ones = torch.ones(len(logps), 1)
    return lambda **_: SimpleNamespace(
        log_probs=logps[:, None], entropy=ones, mean_logits=ones, is_top1=ones.bool(), log_sum_sq_probs=ones
    )


def batch(rows: int) -> dict[str, Tensor]:
    ids = torch.ones(rows, 2, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": ids, "completion_mask": torch.tensor([[0, 1]] * rows)}


@pytest.mark.parametrize("name", list(PAIRED))
def test_paired_losses_and_rewards_agree_with_trl(name: str) -> None:
    DPOTrainer = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
    settings = {"loss_types": [name], "loss_weights": [1.0], "beta": 0.3, "label_smoothing": 0.0, "ld_alpha": None}
    theirs = trainer(**settings, f_divergence_type="reverse_kl", use_weighting=False)
    inputs = {**batch(8), "ref_chosen_logps": REFERENCE_CHOSEN, "ref_rejected_logps": REFERENCE_REJECTED}
    loss = DPOTrainer._compute_loss(theirs, language_model(torch.cat([CHOSEN, REJECTED])), inputs, False)

    chosen, rejected = CHOSEN - REFERENCE_CHOSEN, REJECTED - REFERENCE_REJECTED
    torch.testing.assert_close(PAIRED[name](chosen, rejected, torch.ones(4).double(), 0.3).mean(), loss)
    margins = theirs._metrics["train"]["rewards/margins"]
    assert (0.3 * (chosen - rejected)).mean().item() == pytest.approx(margins[0])


@pytest.mark.parametrize("mismatched", [doubles(-1.0, -2.0, -1.0, -3.0), doubles(-4.0, -4.0, -4.0, -4.0)])
def test_kto_agrees_with_trl(mismatched: Tensor) -> None:
    """Its mismatched log-ratios are positive on average, then negative."""
    KTOTrainer = pytest.importorskip("trl.trainer.kto_trainer").KTOTrainer
    settings = {"loss_type": "kto", "beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.25}
    theirs = trainer(**settings, calculate_KL=True, _compute_kl_logps=lambda *_: mismatched)
    reference = doubles(-2.0, -2.5, -1.0, -3.0)
    desirable = torch.tensor([True, False, True, False])
    inputs = {**batch(4), "label": desirable, "ref_logps": REFERENCE_CHOSEN, "ref_KL_logps": reference}
    loss = KTOTrainer._compute_loss(theirs, language_model(CHOSEN), inputs, False)

    z = kto_reference_point(mismatched - reference)
    torch.testing.assert_close(kto(CHOSEN - REFERENCE_CHOSEN, desirable, z, 0.3, 1.0, 1.25).mean(), loss)
    assert theirs._metrics["train"]["kl"] == [pytest.approx(z.item())]


def test_answers_of_either_kind_weigh_the_same_in_kto_unless_told_otherwise() -> None:
    # Every answer is at the reference point, where sigmoid is one half.
    assert kto(doubles(2, 2), torch.tensor([True, False]), torch.tensor(2.0), 0.1).tolist() == [0.5, 0.5]


def test_the_bins_of_a_calibration_error_stand_on_the_device_of_the_arguments() -> None:
    # The device by default has no memory here: a tensor left to it could not meet those given.
    probabilities, labels = doubles(0.75), doubles(1)
    with torch.device("meta"):
        error = expected_calibration_error(probabilities, labels)
    assert error.item() == 0.25


def test_a_calibration_error_has_ten_bins_unless_told_otherwise() -> None:
    # Ten bins of confidence part the two at 0.55: gaps 0.455 and 0.553. Of nine, the first ends at 0.556 and has both.
    assert expected_calibration_error(doubles(0.545, 0.553), doubles(1, 0)).item() == pytest.approx(0.504)
