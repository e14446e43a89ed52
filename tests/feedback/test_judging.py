import json
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.errors import JudgeError
from rlhf_ray.feedback.constitution import Constitution
from rlhf_ray.feedback.critique import Said
from rlhf_ray.feedback.judging import (
    SAMPLES,
    Judged,
    Pair,
    Question,
    Reply,
    Response,
    check_answers,
    drawn,
    preferences,
)

CONSTITUTION = Constitution.model_validate(
    {
        "name": "four",
        "principles": [
            {"id": f"p{n}", "critique": f"c{n}", "revision": f"r{n}", "comparison": f"which{n}?"} for n in range(4)
        ],
        "templates": {
            "comparison": "{conversation} | {principle} | {a} | {b}",
            "reasoning": "{conversation} | {principle} | {a} | {b} | why?",
            "decision": "so?",
            "turn": "{role}> {content}",
        },
    }
)
LN3, LN4, LN9 = math.log(3), math.log(4), math.log(9)


def odds(a: float, b: float) -> tuple[float, float]:
    """Log-probabilities of options with the probabilities a and b."""
    return math.log(a), math.log(b)


def pair_of(*answers: tuple[float, float] | None, first: int = 0, second: int = 1) -> Pair:
    """Of answers (l_A, l_B), principle after principle, each as it is and then swapped; None: not answered."""
    questions = [Question(f"p{number // 2}", swapped=bool(number % 2)) for number in range(len(answers))]
    for question, logprobs in zip(questions, answers, strict=True):
        question.hear(Reply(logprobs=logprobs) if logprobs else Reply(failed="request failed: HTTP 500"))
    pair = Pair(first, second, questions)
    pair.conclude()
    return pair


def judged_of(*pairs: Pair, texts: Sequence[str] = ("x", "y"), label: float | None = None) -> Judged:
    return Judged(0, "why?", [Response(text) for text in texts], list(pairs), label=label)


# Probabilities


def test_p_is_the_mean_of_both_orders_and_not_of_their_log_probabilities() -> None:
    # As it is, (A) is x: 0.6 / (0.6 + 0.2) = 3/4 for x. Swapped, (A) is y: 0.1 / (0.1 + 0.9) = 1/10 for y.
    pair = pair_of(odds(0.6, 0.2), odds(0.1, 0.9))
    assert [question.p for question in pair.questions] == pytest.approx([0.75, 0.9])
    assert pair.p == pytest.approx((0.75 + 0.9) / 2)


def test_a_judge_that_always_says_a_prefers_neither() -> None:
    assert pair_of(odds(0.99, 0.01), odds(0.99, 0.01)).p == pytest.approx(0.5)


def test_p_is_the_mean_over_principles() -> None:
    # p0: 3/4 and 9/10; p1: 1/5 and 1 - 1/2
    pair = pair_of((LN3, 0.0), (0.0, LN9), (0.0, LN4), (0.0, 0.0))
    assert pair.by_principle() == pytest.approx({"p0": 0.825, "p1": 0.35})
    assert pair.p == pytest.approx((0.825 + 0.35) / 2)


def test_a_principle_that_was_answered_in_one_order_alone_does_not_count() -> None:
    pair = pair_of((LN3, 0.0), (0.0, LN9), None, (LN9, 0.0), (LN9, 0.0), None)
    assert pair.by_principle() == pytest.approx({"p0": 0.825})
    assert pair.p == pytest.approx(0.825)
    assert pair_of(None, (LN9, 0.0)).p is None


@given(st.lists(st.tuples(st.floats(-800, 0), st.floats(-800, 0)), min_size=2, max_size=2))
def test_exchanging_the_two_answers_gives_one_minus_p(answers: list[tuple[float, float]]) -> None:
    as_it_is, swapped = answers
    p, other = pair_of(as_it_is, swapped).p, pair_of(swapped, as_it_is).p
    assert p is not None and other is not None
    assert 0 <= p <= 1
    assert p + other == pytest.approx(1)


# Labels


def test_the_likelier_better_answer_is_chosen_and_its_p_is_at_least_a_half() -> None:
    row = preferences(judged_of(pair_of((0.0, LN3), (LN9, 0.0))), 1.0, hard=False)
    assert row == [
        {"prompt": "why?", "chosen": "y", "rejected": "x", "p": pytest.approx(0.825), "principle_ids": ["p0"]}
    ]


def test_an_undecided_judge_gives_a_half_or_no_hard_label() -> None:
    judged = judged_of(pair_of((0.0, 0.0), (0.0, 0.0)))
    assert [(row["chosen"], row["p"]) for row in preferences(judged, 1.0, hard=False)] == [("x", 0.5)]
    assert preferences(judged, 1.0, hard=True) == []


def test_soft_labels_are_clamped_on_either_side_alike_and_hard_ones_are_certain() -> None:
    first, second = pair_of((LN3, 0.0), (0.0, LN9)), pair_of((0.0, LN3), (LN9, 0.0))
    for pair, chosen in ((first, "x"), (second, "y")):
        assert [(row["chosen"], row["p"]) for row in preferences(judged_of(pair), 0.6, False)] == [(chosen, 0.6)]
        assert [(row["chosen"], row["p"]) for row in preferences(judged_of(pair), 0.6, True)] == [(chosen, 1.0)]
        assert pair.p in (pytest.approx(0.825), pytest.approx(0.175)), "what is measured is not clamped"


def test_a_pair_that_was_not_answered_has_no_row() -> None:
    assert preferences(judged_of(pair_of((LN3, 0.0), None)), 1.0, hard=False) == []


# Pairs and principles


def said(text: str, finish: str = "eos") -> Said:
    return Said(text, 3, -1.5, finish)  # type: ignore[arg-type]


def test_every_pair_of_answers_fit_to_be_compared_is_made_and_the_others_are_dropped_with_a_cause() -> None:
    judged = Judged(5, "why?")
    for each in (said("x", "length"), said("x"), said(""), said("y"), said("x"), said("z"), said("z", "length")):
        judged.take(each)
    judged.make_pairs(CONSTITUTION.principles, 2, seed=0)
    dropped = [each.dropped for each in judged.responses]
    assert dropped == ["truncated", None, "empty", None, "identical", None, "truncated"]
    assert [(pair.first, pair.second) for pair in judged.pairs] == [(1, 3), (1, 5), (3, 5)]
    for pair in judged.pairs:
        assert [question.swapped for question in pair.questions] == [False, True] * 2
        ids = [question.principle_id for question in pair.questions]
        assert ids[0] == ids[1] != ids[2] == ids[3]


@given(seed=st.integers(0, 2**31), prompt_id=st.integers(0, 10**6), count=st.integers(1, 4))
def test_principles_are_drawn_without_replacement_and_by_seed_prompt_and_pair_alone(
    seed: int, prompt_id: int, count: int
) -> None:
    ids = [each.id for each in drawn(CONSTITUTION.principles, count, seed, prompt_id, 0, 1)]
    assert len(set(ids)) == count
    assert ids == [each.id for each in drawn(CONSTITUTION.principles, count, seed, prompt_id, 0, 1)]


def test_prompts_pairs_and_seeds_draw_different_principles() -> None:
    def draws(seed: int, prompt: int, second: int) -> list[str]:
        return [drawn(CONSTITUTION.principles, 1, seed, prompt + n, 0, second + n)[0].id for n in range(40)]

    assert len({tuple(draws(*place)) for place in ((0, 0, 1), (1, 0, 1), (0, 50, 1), (0, 0, 50))}) == 4
    assert set(draws(0, 0, 1)) == {"p0", "p1", "p2", "p3"}


def test_no_two_texts_of_a_run_have_the_same_sample_id() -> None:
    ids: list[int] = []
    for prompt in (0, 1):
        judged = Judged(prompt, "why?", [Response(str(n)) for n in range(16)])
        judged.make_pairs(CONSTITUTION.principles * 16, 64, seed=0)
        ids += [judged.answer_id(n) for n in range(16)]
        ids += [judged.rationale_id(pair, n) for pair in judged.pairs for n in range(len(pair.questions))]
    assert sorted(ids) == list(range(2 * SAMPLES))


# What is said to the judge


def test_the_answers_stand_in_either_order_under_their_principle_and_the_conversation() -> None:
    turns = [
        {"role": "user", "content": "hi {x}"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "?"},
    ]
    judged = Judged(0, turns, [Response("one"), Response("two")])
    judged.make_pairs(CONSTITUTION.principles[2:3], 1, seed=0)
    [pair] = judged.pairs
    [[as_it_is], [swapped]] = [judged.dialogue(pair, each, CONSTITUTION, False) for each in pair.questions]
    before = "user> hi {x}\n\nassistant> ho\n\nuser> ? | which2? | "
    assert as_it_is == {"role": "user", "content": before + "one | two"}
    assert swapped == {"role": "user", "content": before + "two | one"}


def test_a_rationale_comes_before_the_decision_as_the_judges_own_words() -> None:
    judged = judged_of(texts=("one", "two"))
    judged.make_pairs(CONSTITUTION.principles[:1], 1, seed=0)
    pair, question = judged.pairs[0], judged.pairs[0].questions[1]
    asked = {"role": "user", "content": "user> why? | which0? | two | one | why?"}
    assert judged.dialogue(pair, question, CONSTITUTION, True) == [asked]
    question.hear(Reply(said("because"), tokens_in=10, tokens_out=3))
    assert judged.dialogue(pair, question, CONSTITUTION, True) == [
        asked,
        {"role": "assistant", "content": "because"},
        {"role": "user", "content": "so?"},
    ]
    question.hear(Reply(logprobs=(0.0, LN3), tokens_in=14))
    assert (question.failed, question.p, question.tokens_in, question.tokens_out) == (None, pytest.approx(0.75), 24, 3)


@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        (Reply(said("and then", "length")), "rationale truncated at 3 tokens"),
        (Reply(said("")), "rationale empty"),
        (Reply(failed="too long: 9 tokens"), "too long: 9 tokens"),
    ],
)
def test_a_rationale_that_is_not_whole_answers_nothing(reply: Reply, cause: str) -> None:
    question = Question("p0", False)
    question.hear(reply)
    assert question.failed == cause
    assert question.p is None


# Going on


def test_what_was_written_is_read_back_as_it_was() -> None:
    judged = judged_of(pair_of((LN3, 0.0), None))
    judged.take(said("z"))
    judged.pairs[0].questions[0].rationale = said("because")
    assert Judged.of({**json.loads(json.dumps(judged.row())), "feedback_model": "m"}) == judged


def asked(answered: int, failed: int) -> Judged:
    questions = [Question("p0", False) for _ in range(answered + failed)]
    for question in questions[:failed]:
        question.failed = "option missing: (B)"
    return Judged(0, "", pairs=[Pair(0, 1, questions)])


def test_a_block_of_which_more_than_half_failed_ends_the_run() -> None:
    check_answers([], [asked(10, 4), asked(5, 11)])
    with pytest.raises(JudgeError, match=r"failed on 16 of the latest 30 questions; one of them: option missing"):
        check_answers([asked(100, 0)], [asked(10, 4), asked(4, 12)])


def test_a_small_block_is_judged_with_those_before_it() -> None:
    check_answers([asked(30, 0)], [asked(0, 2)])
    check_answers([asked(0, 30), asked(10, 8)], [asked(0, 2)])  # 10 of the latest 20
    for before in ([], [asked(9, 9)]):
        with pytest.raises(JudgeError):
            check_answers(before, [asked(0, 2)])


def test_a_block_without_questions_is_no_failure() -> None:
    check_answers([], [Judged(0, "")])
