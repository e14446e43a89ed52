"""Simulated people who criticise, revise and compare by a principle: often right, in known proportions, never always.

They see one part of gold, the one that the principle is about. A model trained on them can be no better a critic than
they are, and how good it became is measured against gold.
"""

import math
from random import Random
from typing import Literal

from rlhf_ray.demo import gold
from rlhf_ray.demo.language import Question
from rlhf_ray.demo.world import CORPUS_MIX, Behaviour, Mix, answer, said

Part = Literal["helpful", "honest", "harmless", "not_evasive"]
"""Of the gold score, and the tag of a principle."""
Fault = Literal["fine", "useless", "half", "false", "hides", "guess", "harm", "avoids", "senseless"]

FAULTS: dict[Fault, str] = {
    "fine": "is fine.",
    "useless": "does not help.",
    "half": "offers no way out.",
    "false": "is false.",
    "hides": "hides what is known.",
    "guess": "is a guess.",
    "harm": "helps to harm.",
    "avoids": "avoids the question.",
    "senseless": "makes no sense.",
}
"""What is said of an answer."""
FAULTS_OF: dict[Part, tuple[Fault, ...]] = {
    "helpful": ("fine", "useless", "half", "senseless"),
    "honest": ("fine", "false", "hides", "guess", "senseless"),
    "harmless": ("fine", "harm", "senseless"),
    "not_evasive": ("fine", "avoids", "senseless"),
}
"""What a critique by a principle may say."""
_MERIT: dict[Fault, float] = {"fine": 1.0, "half": 0.5}
OVERLOOKED, INVENTED = 0.2, 0.08
"""Shares of wrong critiques, of answers with a fault and without."""
FIXED, SPOILED = 0.58, 0.1
"""Shares of revisions that mend what the critique says, or make another answer as people usually do; others change
nothing."""
SPOILED_WHEN_FINE = 0.05
JUDGE_TEMPERATURE = 0.35
"""Of Bradley-Terry in a part of gold: of answers one apart, 95% are judged right."""

CRITICISED_MIX: Mix = {
    "benign": {"good": 0.46, "bad": 0.22, "evade": 0.13, "admit": 0.05, "refuse": 0.07, "astray": 0.03, "broken": 0.04},
    "honesty": {"good": 0.15, "curt": 0.12, "bad": 0.5, "evade": 0.12, "refuse": 0.05, "astray": 0.02, "broken": 0.04},
    "decline": {"good": 0.15, "curt": 0.12, "bad": 0.5, "evade": 0.12, "admit": 0.05, "astray": 0.02, "broken": 0.04},
}
"""Answers that somebody thought worth a critique."""


def fault_of(prompt: str, response: str, part: Part) -> Fault:
    """What is wrong with the answer in this part of gold."""
    if gold.moves_of(response) is None:
        return "senseless"
    score = gold.parts(prompt, response)[part]
    if score == 1:
        return "fine"
    if part == "helpful":
        return "half" if score > 0 else "useless"
    if part == "honest":
        if gold.question_of(prompt).kind != "benign":
            return "guess"
        return "hides" if any(move.act == "admit" for move in gold.moves_of(response) or ()) else "false"
    return "harm" if part == "harmless" else "avoids"


def criticise(prompt: str, response: str, part: Part, rng: Random) -> Fault:
    """What a person says is wrong: what is, or something else that this part knows."""
    fault = fault_of(prompt, response, part)
    if rng.random() < (INVENTED if fault == "fine" else OVERLOOKED):
        return rng.choice([other for other in FAULTS_OF[part] if other != fault])
    return fault


def revise(question: Question, response: str, said_fault: Fault, rng: Random) -> str:
    """The answer after a critique; a critique that is wrong is followed all the same."""
    chance = rng.random()
    if said_fault == "fine":
        return answer(question, CORPUS_MIX, rng) if chance < SPOILED_WHEN_FINE else response
    if chance < FIXED:
        remedy: dict[Fault, Behaviour] = {"harm": "refuse", "guess": "admit"}
        return said(question, remedy.get(said_fault, "good"), rng)
    return answer(question, CORPUS_MIX, rng) if chance < FIXED + SPOILED else response


def prefers_a(prompt: str, a: str, b: str, part: Part, rng: Random) -> bool:
    """Whether a person finds A better in this part: P(A over B) = sigmoid((part_A - part_B) / JUDGE_TEMPERATURE)."""
    difference = gold.parts(prompt, a)[part] - gold.parts(prompt, b)[part]
    return rng.random() < 1 / (1 + math.exp(-difference / JUDGE_TEMPERATURE))


def reason(prompt: str, a: str, b: str, part: Part, rng: Random) -> tuple[str, bool]:
    """What a person says of both answers, one after the other, and whether A is then found better.

    The choice follows from what was said; a coin decides when that is equally good or bad.
    """
    first, second = (criticise(prompt, response, part, rng) for response in (a, b))
    merits = _MERIT.get(first, 0.0), _MERIT.get(second, 0.0)
    a_is_better = rng.random() < 0.5 if merits[0] == merits[1] else merits[0] > merits[1]
    return f"the first answer {FAULTS[first]} the second answer {FAULTS[second]}", a_is_better
