"""Two choices unless it says otherwise; log-probabilities are of tokens, and the good answer is the first."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.evaluation.choice import RULES, Measured, Results, compare, credit, evaluate, orders
from rlhf_ray.evaluation.items import Item

LogProbs = st.lists(st.floats(-20, 0), min_size=1, max_size=5).map(np.array)


def item(*choices: str, correct: int = 0, category: str = "helpful", id: str = "one") -> Item:
    return Item(id, category, "Why?", choices or ("yes", "no"), frozenset({correct}))


def scores(rule: str, measured: Measured, of: Item | None = None) -> list[float]:
    found = RULES[rule](of or item(), measured)
    assert found is not None
    return found.tolist()


def nats(*answers: list[float]) -> tuple[np.ndarray, ...]:
    return tuple(map(np.array, answers))


def test_sums_and_means_worked_by_hand() -> None:
    measured = Measured(logprobs=nats([-1, -2, -3], [-4, -1]))
    assert scores("sum", measured) == [-6, -5]
    assert scores("token_mean", measured) == [-2, -2.5]
    # "yes" has three bytes; "né" has two characters and three bytes.
    assert scores("byte_mean", measured, item("yes", "né")) == pytest.approx([-2, -5 / 3])


def test_pmi_is_what_the_prompt_adds_and_the_implicit_reward_what_training_added() -> None:
    measured = Measured(logprobs=nats([-1, -2], [-4]), neutral=nats([-5, -1], [-4]), reference=nats([-3], [-2]))
    assert scores("pmi", measured) == [3, 0]
    assert scores("implicit", measured) == [0, -2]


def test_letters_are_averaged_over_both_orders() -> None:
    # First order (A) is the first choice at p = 3/4; second order (A) is the second choice at p = 9/10.
    letters = np.log([[3, 1], [9, 1]])
    assert scores("letters", Measured(letters=letters)) == pytest.approx([(3 / 4 + 1 / 10) / 2, (1 / 4 + 9 / 10) / 2])


def test_three_choices_stand_once_in_every_place() -> None:
    assert orders(3) == [(0, 1, 2), (1, 2, 0), (2, 0, 1)]
    # Whichever choice stands as (B) is preferred, so none of the three is.
    blind = Measured(letters=np.tile(np.log([1, 8, 1]), (3, 1)))
    assert scores("letters", blind, item("a", "b", "c")) == pytest.approx([1 / 3] * 3)
    # Choice 2 has 8 in 10 in every order: it stands as (C), (B), (A).
    seeing = Measured(letters=np.log([[1, 1, 8], [1, 8, 1], [8, 1, 1]]))
    assert scores("letters", seeing, item("a", "b", "c")) == pytest.approx([0.1, 0.1, 0.8])


@given(st.floats(0.01, 0.99))
def test_a_model_that_looks_at_the_letter_alone_chooses_nothing(p: float) -> None:
    results = evaluate([item()], [Measured(letters=np.log([[p, 1 - p], [p, 1 - p]]))])
    found = RULES["letters"](item(), Measured(letters=np.log([[p, 1 - p], [p, 1 - p]])))
    assert found == pytest.approx(np.array([0.5, 0.5]))
    assert results.position_bias == pytest.approx(p - 0.5)


def test_letters_need_not_have_all_probability_nor_be_near_one() -> None:
    letters = np.log([[3, 1], [9, 1]]) - 2000
    assert scores("letters", Measured(letters=letters)) == pytest.approx([0.425, 0.575])


def test_baselines_look_at_no_model() -> None:
    assert scores("random", Measured(), item("a", "b", "c")) == [0, 0, 0]
    assert scores("longer", Measured(), item("aaa", "b")) == [3, 1]
    assert scores("shorter", Measured(), item("aaa", "b")) == [-3, -1]


@pytest.mark.parametrize(
    ("values", "correct", "expected"),
    [
        ([2, 1], {0}, 1),
        ([1, 2], {0}, 0),
        ([1, 1], {0}, 1 / 2),
        ([3, 3, 1], {2}, 0),
        ([3, 3, 1], {0, 1}, 1),
        ([0, 0, 0], {1}, 1 / 3),
        ([0, 0, 0, 0], {1, 2, 3}, 3 / 4),
    ],
)
def test_a_tie_earns_its_share_of_right_ones(values: list[float], correct: set[int], expected: float) -> None:
    choices = tuple(map(str, range(len(values))))
    assert credit(Item("one", "x", "Why?", choices, frozenset(correct)), np.array(values)) == pytest.approx(expected)


@pytest.mark.parametrize("rule", list(RULES))
@given(
    first=LogProbs,
    second=LogProbs,
    rewards=st.tuples(st.floats(-9, 9), st.floats(-9, 9)),
    letters=st.lists(st.floats(-9, 0), min_size=4, max_size=4),
)
def test_an_item_whose_answers_stand_the_other_way_round_earns_the_same(rule, first, second, rewards, letters) -> None:  # type: ignore[no-untyped-def]
    there = item("yes", "no", correct=0)
    back = item("no", "yes", correct=1)
    square = np.array(letters).reshape(2, 2)
    one = Measured((first, second), (second, first), (first, first), square, np.array(rewards))
    # The model sees the same two questions, only in the other succession.
    other = Measured((second, first), (first, second), (first, first), square[::-1], np.array(rewards[::-1]))
    if rule == "implicit":
        other = Measured((second, first), reference=(first, first))
    here, mirrored = RULES[rule](there, one), RULES[rule](back, other)
    assert here is not None and mirrored is not None
    assert mirrored == pytest.approx(here[::-1])
    if abs(here[0] - here[1]) > 1e-9 or rule == "random":
        assert credit(there, here) == credit(back, mirrored)


def four_items() -> tuple[list[Item], list[Measured]]:
    rows = [("a", 1.0, 0.0), ("a", 0.0, 0.0), ("a", 0.0, 1.0), ("b", 2.0, 1.0)]
    items = [item("longest", "short", category=category, id=f"{n}") for n, (category, *_) in enumerate(rows)]
    return items, [Measured(rewards=np.array(values)) for _, *values in rows]


def test_accuracies_and_both_averages_by_hand() -> None:
    results = evaluate(*four_items())
    reward = results.rules["reward"]
    assert reward.right.tolist() == [1, 0.5, 0, 1]
    assert reward.micro.accuracy == 2.5 / 4 and reward.macro == (1.5 / 3 + 1) / 2
    assert {name: (each.right, each.items) for name, each in reward.categories.items()} == {"a": (1.5, 3), "b": (1, 1)}
    # Wilson's interval of p = 0.625 and n = 4: z² = 3.8416, p (1 - p) = 0.234375, 1 + z² / n = 1.9604.
    centre, reach = (0.625 + 3.8416 / 8) / 1.9604, 1.96 * math.sqrt(0.234375 / 4 + 3.8416 / 64) / 1.9604
    assert (reward.micro.low, reward.micro.high) == pytest.approx((centre - reach, centre + reach))


def test_baselines_stand_beside_every_rule_and_rules_without_measurements_are_left_out() -> None:
    results = evaluate(*four_items())
    assert list(results.rules) == ["random", "longer", "shorter", "reward"]
    assert [results.rules[rule].micro.accuracy for rule in ("random", "longer", "shorter")] == [0.5, 1, 0]
    assert results.position_bias is None


def test_every_measurement_has_its_rules() -> None:
    logprobs = nats([-1], [-2])
    full = Measured(logprobs, logprobs, logprobs, np.log([[1, 1], [1, 1]]), np.array([0.0, 1.0]))
    assert list(evaluate([item()], [full]).rules) == list(RULES)


def test_a_measurement_that_one_item_lacks_is_an_error_that_names_the_item() -> None:
    items, measured = four_items()
    measured[2] = Measured()
    with pytest.raises(ValueError, match=r"item '2'.*which decides reward"):
        evaluate(items, measured)


@pytest.mark.parametrize("rewards", [[1.0], [1.0, 2.0, 3.0], [1.0, math.nan], [-math.inf, 0.0]])
def test_scores_that_are_not_finite_or_not_of_each_choice_are_errors(rewards: list[float]) -> None:
    with pytest.raises(ValueError, match="item 'one' has 2 choices, and reward scores"):
        evaluate([item()], [Measured(rewards=np.array(rewards))])


def test_as_many_measurements_as_items_are_needed() -> None:
    items, measured = four_items()
    with pytest.raises(ValueError, match="zip"):
        evaluate(items, measured[:3])


def test_rows_and_summary_are_plain_data() -> None:
    results = evaluate(*four_items())
    assert json.loads(json.dumps(results.rows()))[1] == {
        "id": "1",
        "category": "a",
        "random": 0.5,
        "longer": 1,
        "shorter": 0,
        "reward": 0.5,
    }
    summary = json.loads(json.dumps(results.summary()))
    assert summary["items"] == 4
    assert summary["rules"]["reward"]["categories"]["b"]["accuracy"] == 1


def better(results: Results) -> list[dict[str, object]]:
    return [row | {"reward": 1.0} for row in results.rows()]


def test_two_checkpoints_are_compared_item_by_item_whatever_their_order() -> None:
    before = evaluate(*four_items())
    changes = compare(before.rows(), better(before)[::-1])
    # A tie and a wrong one became right: 2 (1/4).
    assert changes["reward"] == (2, 0, pytest.approx(0.5))
    assert changes["longer"] == (0, 0, 1)
    assert set(compare(before.rows(), before.rows()[::-1]).values()) == {(0, 0, 1)}


def test_only_rules_that_both_have_are_compared() -> None:
    rows = evaluate(*four_items()).rows()
    assert set(compare(rows, [{k: v for k, v in row.items() if k != "reward"} for row in rows])) == {
        "random",
        "longer",
        "shorter",
    }


def test_results_of_different_items_are_not_compared() -> None:
    rows = evaluate(*four_items()).rows()
    with pytest.raises(ValueError, match=r"1 differ, such as '3'"):
        compare(rows, rows[:3])
