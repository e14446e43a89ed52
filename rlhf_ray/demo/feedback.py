"""What the demo's feedback from a model starts from: a base model that can criticise, revise and judge, and its data.

The base model learns these from people's dialogues, by next-token prediction alone, and performs them by sampling and
by log-probabilities: nothing is scripted. No held-out prompt may occur in anything that is trained on.
"""

from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import yaml

from rlhf_ray.demo import critics, gold, people
from rlhf_ray.demo.base_model import Recipe, train
from rlhf_ray.demo.critics import CRITICISED_MIX, FAULTS, FAULTS_OF, Part
from rlhf_ray.demo.language import PROMPTS, TOPICS
from rlhf_ray.demo.principles import CONSTITUTION
from rlhf_ray.demo.world import CORPUS_MIX, ROUND, Mix, Shares, World, answer
from rlhf_ray.feedback.constitution import Principle
from rlhf_ray.telemetry.run_folder import write_rows

RED_TEAM: Shares = (*ROUND, *("decline",) * 17)
"""Two thirds of the prompts ask for help with harm."""
ALL_DECLINE: Shares = ("decline",)
ALL_BENIGN: Shares = (*TOPICS, "own")

HELPFUL_MIX: Mix = {
    "benign": {"good": 0.7, "bad": 0.12, "evade": 0.1, "admit": 0.03, "refuse": 0.03, "broken": 0.02},
    "honesty": {"good": 0.3, "curt": 0.2, "bad": 0.38, "evade": 0.1, "broken": 0.02},
    "decline": {"good": 0.05, "curt": 0.05, "bad": 0.8, "evade": 0.08, "broken": 0.02},
}
"""Demonstrators who want to help, and do not see harm."""
CLEAR = 0.85
"""Share of compared pairs in which the part differs; in the others it may."""

Dialogue = dict[str, list[dict[str, str]]]


def corpus(world: World, n: int) -> list[Dialogue]:
    """`n` dialogues {"messages"}: talk as in the plain corpus, critiques with revisions, revisions, comparisons."""
    rng = world.rng("feedback corpus")
    kinds: dict[Callable[[World, Principle, Random], Dialogue], float] = {
        talk: 0.1,
        critique: 0.24,
        direct_revision: 0.06,
        comparison: 0.38,
        reasoned_comparison: 0.22,
    }
    return [
        kind(world, rng.choice(CONSTITUTION.principles), rng)
        for kind in rng.choices(list(kinds), weights=list(kinds.values()), k=n)
    ]


def talk(world: World, principle: Principle, rng: Random) -> Dialogue:
    prompt = _prompt(world, principle, rng)
    return _dialogue(prompt, answer(PROMPTS[prompt], CORPUS_MIX, rng))


def critique(world: World, principle: Principle, rng: Random) -> Dialogue:
    prompt = _prompt(world, principle, rng)
    response = answer(PROMPTS[prompt], CRITICISED_MIX, rng)
    fault = critics.criticise(prompt, response, _part(principle), rng)
    revision = critics.revise(PROMPTS[prompt], response, fault, rng)
    return _dialogue(prompt, response, principle.critique, f"the answer {FAULTS[fault]}", principle.revision, revision)


def direct_revision(world: World, principle: Principle, rng: Random) -> Dialogue:
    prompt = _prompt(world, principle, rng)
    response = answer(PROMPTS[prompt], CRITICISED_MIX, rng)
    fault = critics.criticise(prompt, response, _part(principle), rng)
    return _dialogue(prompt, response, principle.revision, critics.revise(PROMPTS[prompt], response, fault, rng))


def comparison(world: World, principle: Principle, rng: Random) -> Dialogue:
    prompt = _prompt(world, principle, rng)
    a, b = _pair(world, prompt, _part(principle), rng)
    better = critics.prefers_a(prompt, a, b, _part(principle), rng)
    return _dialogue(asked(CONSTITUTION.templates.comparison, principle, prompt, a, b), _option(better))


def reasoned_comparison(world: World, principle: Principle, rng: Random) -> Dialogue:
    prompt = _prompt(world, principle, rng)
    a, b = _pair(world, prompt, _part(principle), rng)
    rationale, better = critics.reason(prompt, a, b, _part(principle), rng)
    request = asked(CONSTITUTION.templates.reasoning, principle, prompt, a, b)
    return _dialogue(request, rationale, CONSTITUTION.templates.decision, _option(better))


def _prompt(world: World, principle: Principle, rng: Random) -> str:
    return world.draw(1, rng, shares=(rng.choice(RED_TEAM if _part(principle) == "harmless" else ROUND),))[0]


def _pair(world: World, prompt: str, part: Part, rng: Random) -> tuple[str, str]:
    """Two answers, of which this part differs in most cases."""
    a, b = world.candidate_answers(prompt, 2, rng)
    if rng.random() < CLEAR:
        for _ in range(20):
            if gold.parts(prompt, a)[part] != gold.parts(prompt, b)[part]:
                break
            a, b = world.candidate_answers(prompt, 2, rng)
    return a, b


def _part(principle: Principle) -> Part:
    return principle.tags[0]  # type: ignore[return-value]


def asked(template: str, principle: Principle, prompt: str, a: str, b: str) -> str:
    """The user's turn of a comparison."""
    conversation = CONSTITUTION.templates.turn.format(role="user", content=prompt)
    return template.format(conversation=conversation, principle=principle.comparison, a=a, b=b)


def _option(a_is_better: bool) -> str:
    return "(A)" if a_is_better else "(B)"


def _dialogue(*turns: str) -> Dialogue:
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]}


class Sizes(NamedTuple):
    """Rows of each file that `write` makes."""

    prompts_red_team: int = 1_200
    prompts_train: int = 1_600
    held_out_red_team: int = 384
    held_out_benign: int = 336
    prompts_held_out: int = 384
    sft: int = 2_000
    preferences: int = 4_000
    sft_helpful: int = 2_000
    preferences_helpful: int = 4_000
    judgements_held_out: int = 800
    judgements_harmless: int = 400


USUAL = Sizes()
RECIPE = Recipe(dialogues=48_000, steps=3_000, dialogues_per_step=16)
"""Smaller steps than the plain base model's: for the same tokens, comparisons are learned sooner with more steps."""


def prepare_feedback(
    folder: str | Path,
    seed: int,
    recipe: Recipe = RECIPE,
    sizes: Sizes = USUAL,
    log: Callable[[int, float], None] = lambda step, loss: None,
) -> dict[str, Any]:
    """Writes data, constitution.yaml and the base model's folder `base` into `folder`.

    `log` is called with each step of training and its loss. Returns {"seed", "constitution_sha", "rows", "base_model"}.
    """
    folder, world = Path(folder), World(seed)
    rows = write(world, folder, sizes)
    return {
        "seed": seed,
        "constitution_sha": CONSTITUTION.sha,
        "rows": rows,
        "base_model": train(folder / "base", corpus(world, recipe.dialogues), seed, recipe, log),
    }


def write(world: World, folder: Path, sizes: Sizes = USUAL) -> dict[str, int]:
    """Writes constitution.yaml and a .jsonl file for each field of `sizes`. Returns their numbers of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    content = CONSTITUTION.model_dump(mode="json")
    (folder / "constitution.yaml").write_text(yaml.safe_dump(content, sort_keys=False, width=120), encoding="utf-8")
    files = {
        "prompts_red_team": world.prompts(sizes.prompts_red_team, shares=RED_TEAM),
        "prompts_train": world.prompts(sizes.prompts_train),
        "held_out_red_team": world.prompts(sizes.held_out_red_team, "held_out", ALL_DECLINE),
        "held_out_benign": world.prompts(sizes.held_out_benign, "held_out", ALL_BENIGN),
        "prompts_held_out": world.prompts(sizes.prompts_held_out, "held_out"),
        "sft": world.sft_rows(sizes.sft),
        "preferences": people.preference_rows(world, sizes.preferences),
        "sft_helpful": sft_helpful(world, sizes.sft_helpful),
        "preferences_helpful": preferences_helpful(world, sizes.preferences_helpful),
        "judgements_held_out": judgements(world, sizes.judgements_held_out),
        "judgements_harmless": judgements(world, sizes.judgements_harmless, ["harmless"]),
    }
    for name, rows in files.items():
        write_rows(folder / f"{name}.jsonl", rows)
    return {name: len(rows) for name, rows in files.items()}


def sft_helpful(world: World, n: int) -> list[Dialogue]:
    """`n` demonstrations {"messages"} by people who want to help and do not see harm."""
    rng = world.rng("sft helpful")
    return [_dialogue(prompt, answer(PROMPTS[prompt], HELPFUL_MIX, rng)) for prompt in world.draw(n, rng)]


def preferences_helpful(world: World, n: int) -> list[dict[str, Any]]:
    """`n` rows {"prompt", "chosen", "rejected", "kind"}, labelled by people who want help and see no harm."""
    rng = world.rng("preferences helpful")
    rows = []
    for prompt in world.draw(n, rng):
        while True:
            a, b = world.candidate_answers(prompt, 2, rng)
            worth = gold.wish_granted(prompt, a), gold.wish_granted(prompt, b)
            if worth[0] != worth[1]:
                break
        chosen, rejected = (a, b) if people.label(*worth, rng) else (b, a)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "kind": PROMPTS[prompt].kind})
    return rows


def judgements(world: World, n: int, parts: Sequence[Part] = tuple(FAULTS_OF)) -> list[dict[str, Any]]:
    """`n` held-out rows {"prompt", "chosen", "rejected", "kind", "part"}: of `part`, chosen has 1 and rejected 0."""
    rng = world.rng(f"judgements {' '.join(parts)}")
    rows = []
    for part in islice(cycle(parts), n):
        while True:
            prompt = world.draw(1, rng, "held_out", (rng.choice(RED_TEAM if part == "harmless" else ROUND),))[0]
            a, b = world.candidate_answers(prompt, 2, rng)
            if gold.parts(prompt, a)[part] - gold.parts(prompt, b)[part] == 1:
                break
        rows.append({"prompt": prompt, "chosen": a, "rejected": b, "kind": PROMPTS[prompt].kind, "part": part})
    return rows
