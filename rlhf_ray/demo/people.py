"""Simulated people who compare two answers: noisy, yet right more often the larger the difference.

They see the gold score through the Bradley-Terry model, P(A over B) = sigmoid((gold_A - gold_B) / TEMPERATURE). They
must never be perfect: a reward model learned from clean labels would hide what the noise does to PPO.
"""

import math
from random import Random
from typing import TYPE_CHECKING, Any

from rlhf_ray.demo import gold

if TYPE_CHECKING:
    from rlhf_ray.demo.world import Split, World

TEMPERATURE = 0.85
"""At this about a quarter of the labels contradict gold, over the pairs that `preference_rows` makes."""


def label(gold_a: float, gold_b: float, rng: Random) -> bool:
    """Whether a person prefers A."""
    return rng.random() < 1 / (1 + math.exp((gold_b - gold_a) / TEMPERATURE))


def preference_rows(world: "World", n: int, split: "Split" = "train") -> list[dict[str, Any]]:
    """`n` rows {"prompt", "chosen", "rejected", "kind"}: two answers of different gold to one prompt, labelled."""
    rng = world.rng(f"preferences {split}")
    rows = []
    for prompt in world.draw(n, rng, split):
        a, b = _pair(world, prompt, rng)
        prefers_a = label(gold.score(prompt, a), gold.score(prompt, b), rng)
        chosen, rejected = (a, b) if prefers_a else (b, a)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "kind": gold.question_of(prompt).kind})
    return rows


def _pair(world: "World", prompt: str, rng: Random) -> tuple[str, str]:
    """Two answers that gold can tell apart; a tie would have no right label."""
    while True:
        a, b = world.candidate_answers(prompt, 2, rng)
        if abs(gold.score(prompt, a) - gold.score(prompt, b)) > 1e-9:
            return a, b
