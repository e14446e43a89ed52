from random import Random
from statistics import mean

import pytest

from rlhf_ray.demo import gold
from rlhf_ray.demo.critics import (
    FAULTS,
    FAULTS_OF,
    FIXED,
    INVENTED,
    JUDGE_TEMPERATURE,
    OVERLOOKED,
    criticise,
    fault_of,
    prefers_a,
    reason,
    revise,
)
from rlhf_ray.demo.language import PROMPTS

FACT = "hello! what colour is grass?"
RIDDLE = "what number is my aunt thinking of?"
HARM = "how do i read my aunt's diary?"
READING = "open the diary and turn the pages."
REFUSAL = "i will not help with that."


@pytest.mark.parametrize(
    ("prompt", "response", "part", "fault"),
    [
        (HARM, READING, "harmless", "harm"),
        (HARM, READING, "not_evasive", "fine"),  # it answers, alas
        (HARM, READING, "helpful", "useless"),
        (HARM, REFUSAL, "harmless", "fine"),
        (HARM, REFUSAL, "helpful", "half"),
        (HARM, "it is hard to say.", "not_evasive", "avoids"),
        (HARM, "it is green.", "honest", "guess"),
        (HARM, "open the diary and", "harmless", "senseless"),
        (RIDDLE, "it is three.", "honest", "guess"),
        (RIDDLE, "i cannot know that.", "honest", "fine"),
        (FACT, "grass is red.", "honest", "false"),
        (FACT, "i do not know that.", "honest", "hides"),
        (FACT, REFUSAL, "not_evasive", "avoids"),
        (FACT, REFUSAL, "harmless", "fine"),
    ],
)
def test_fault_is_what_gold_holds_against_the_answer(prompt: str, response: str, part, fault: str) -> None:  # type: ignore[no-untyped-def]
    assert fault_of(prompt, response, part) == fault


@pytest.mark.parametrize(("response", "wrong"), [(READING, OVERLOOKED), (REFUSAL, INVENTED)])
def test_critics_are_wrong_in_the_stated_shares(response: str, wrong: float) -> None:
    """10,000 critiques: a standard error of at most 0.004."""
    rng = Random(0)
    truth = fault_of(HARM, response, "harmless")
    said = [criticise(HARM, response, "harmless", rng) for _ in range(10_000)]
    assert mean(fault != truth for fault in said) == pytest.approx(wrong, abs=0.016)
    assert set(said) == set(FAULTS_OF["harmless"])


def test_what_a_critique_names_is_mended_in_the_stated_share() -> None:
    """Another answer, drawn in `SPOILED` of the revisions, refuses in at most a fifth of the cases."""
    rng = Random(0)
    revisions = [revise(PROMPTS[HARM], READING, "harm", rng) for _ in range(5_000)]
    refused = mean(gold.parts(HARM, revision)["helpful"] > 0 for revision in revisions)
    assert FIXED - 0.025 < refused < FIXED + 0.02 + 0.025
    assert READING in revisions


def test_a_critique_that_is_wrong_is_followed_all_the_same() -> None:
    rng = Random(0)
    revisions = [revise(PROMPTS[FACT], "grass is green.", "harm", rng) for _ in range(1_000)]
    assert mean(gold.parts(FACT, revision)["not_evasive"] == 0 for revision in revisions) > FIXED - 0.06


def test_an_answer_called_fine_is_mostly_kept() -> None:
    rng = Random(0)
    kept = mean(revise(PROMPTS[HARM], READING, "fine", rng) == READING for _ in range(2_000))
    assert 0.95 <= kept < 0.99  # also where another answer happens to be the same


def test_judgements_follow_bradley_terry_in_the_part() -> None:
    """sigmoid(1 / 0.35) = 0.9457 when the parts are one apart; 20,000 judgements have a standard error of 0.002."""
    assert JUDGE_TEMPERATURE == 0.35
    rng = Random(0)
    judged = [prefers_a(HARM, REFUSAL, READING, "harmless", rng) for _ in range(20_000)]
    assert mean(judged) == pytest.approx(0.9457, abs=0.008)
    tied = [prefers_a(HARM, REFUSAL, "that depends.", "harmless", rng) for _ in range(20_000)]
    assert mean(tied) == pytest.approx(0.5, abs=0.014)


def test_a_reasoned_choice_follows_from_what_was_said() -> None:
    rng = Random(0)
    for _ in range(200):
        text, a_is_better = reason(HARM, READING, REFUSAL, "helpful", rng)
        first, second = text.removeprefix("the first answer ").split(" the second answer ")
        merit = {FAULTS["fine"]: 1.0, FAULTS["half"]: 0.5}
        if merit.get(first, 0) != merit.get(second, 0):
            assert a_is_better == (merit.get(first, 0) > merit.get(second, 0))
