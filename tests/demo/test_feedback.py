import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.demo import gold
from rlhf_ray.demo.base_model import CONTEXT, Recipe, make_tokenizer
from rlhf_ray.demo.critics import FAULTS
from rlhf_ray.demo.feedback import Sizes, asked, corpus, judgements, preferences_helpful, prepare_feedback, sft_helpful
from rlhf_ray.demo.language import PROMPTS
from rlhf_ray.demo.people import preference_rows
from rlhf_ray.demo.principles import CONSTITUTION
from rlhf_ray.demo.world import World
from rlhf_ray.feedback.constitution import load

SMALL = Sizes(24, 24, 12, 14, 20, 20, 8, 4)
SHORT = Recipe(dialogues=200, steps=2, dialogues_per_step=8, warmup_steps=1)
LONGEST_ANSWER = 32
"""Tokens, as answers are sampled."""
SENSIBLE_ANSWER = 24
"""Tokens of the longest answer that means something."""
ROLES = ["user", "assistant"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("feedback")
    return folder, prepare_feedback(folder, 0, SHORT, SMALL)


@pytest.fixture(scope="module")
def dialogues() -> list[list[str]]:
    rows = corpus(World(0), 4_000)
    assert all([turn["role"] for turn in row["messages"]] == ROLES * (len(row["messages"]) // 2) for row in rows)
    return [[turn["content"] for turn in row["messages"]] for row in rows]


def test_every_dialogue_is_one_of_five_forms(dialogues: list[list[str]]) -> None:
    """Talk, critique and revision, revision alone, comparison, comparison with a rationale; nothing else."""
    principles = CONSTITUTION.principles
    critiques = {f"the answer {fault}" for fault in FAULTS.values()}
    fault = "(" + "|".join(map(re.escape, FAULTS.values())) + ")"
    counts = dict.fromkeys(("talk", "critique", "revision", "comparison", "reasoned"), 0)
    for turns in dialogues:
        match turns:
            case [prompt, _] if prompt in PROMPTS:
                counts["talk"] += 1
            case [prompt, _, request, _] if any(request == p.revision for p in principles):
                counts["revision"] += prompt in PROMPTS
            case [prompt, _, first, critique, second, _] if critique in critiques:
                assert any((first, second) == (p.critique, p.revision) for p in principles)
                counts["critique"] += prompt in PROMPTS
            case [request, "(A)" | "(B)"]:
                counts["comparison"] += _is_comparison(request, "")
            case [request, rationale, "so which?", "(A)" | "(B)"]:
                assert re.fullmatch(f"the first answer {fault} the second answer {fault}", rationale)
                counts["reasoned"] += _is_comparison(request, " say why.")
    assert sum(counts.values()) == len(dialogues)
    assert min(counts.values()) > 200


def _is_comparison(request: str, wish: str) -> bool:
    start = request.removeprefix("user: ").partition(" (A) ")[0]
    return any(start.removesuffix(f" {principle.comparison}{wish}") in PROMPTS for principle in CONSTITUTION.principles)


def test_first_and_second_answer_are_preferred_equally_often(dialogues: list[list[str]]) -> None:
    """About 2,200 choices: a standard error of 0.011."""
    choices = [turns[-1] for turns in dialogues if turns[-1] in ("(A)", "(B)")]
    assert choices.count("(A)") / len(choices) == pytest.approx(0.5, abs=0.045)


def test_options_differ_in_exactly_one_token() -> None:
    tokenizer = make_tokenizer(corpus(World(0), 1_000))
    a, b = (tokenizer(option, add_special_tokens=False)["input_ids"] for option in ("(A)", "(B)"))
    assert len(a) == len(b)
    assert sum(x != y for x, y in zip(a, b, strict=True)) == 1


def test_longest_requests_leave_room_in_the_context() -> None:
    """Longest prompt, longest principle, answers as long as they may be; then rationale and choice, or revision."""
    tokenizer = make_tokenizer(corpus(World(0), 8_000))

    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    prompt = max(tokens(prompt) for prompt in PROMPTS)
    rationale = 2 * max(tokens(f" the second answer {fault}") for fault in FAULTS.values()) + 1
    templates = CONSTITUTION.templates
    for principle in CONSTITUTION.principles:
        frame = tokens(asked(templates.reasoning, principle, "", "", ""))
        decision = tokens(templates.decision) + tokens("(A)")
        marks = 6
        assert prompt + frame + 2 * SENSIBLE_ANSWER + rationale + decision + marks <= CONTEXT
        requests = tokens(principle.critique) + tokens(principle.revision)
        assert prompt + 2 * LONGEST_ANSWER + requests + rationale // 2 + marks <= CONTEXT


def test_sensible_answers_are_short() -> None:
    tokenizer = make_tokenizer(corpus(World(0), 8_000))
    answers = [row["messages"][1]["content"] for row in sft_helpful(World(0), 2_000)]
    sensible = [text for text in answers if gold.moves_of(text) is not None]
    assert max(len(tokenizer(text)["input_ids"]) for text in sensible) <= SENSIBLE_ANSWER


def test_no_held_out_prompt_occurs_in_anything_that_is_trained_on() -> None:
    world = World(1)
    held_out = {row["prompt"] for row in [*world.prompts(384, "held_out", ("decline",)), *judgements(world, 200)]}
    trained_on = {row["prompt"] for row in preferences_helpful(world, 1_000)}
    for row in [*corpus(world, 3_000), *sft_helpful(world, 1_000)]:
        request = row["messages"][0]["content"]
        # The longest: one prompt may end, never begin, another.
        trained_on.add(request.removeprefix("user: ").partition(" which ")[0] if " (A) " in request else request)
    assert not held_out & trained_on


def test_preferences_for_helpfulness_do_not_see_harm() -> None:
    """Where a person compares steps to do harm with an answer free of harm, the steps mostly win."""
    wins = []
    for row in preferences_helpful(World(0), 3_000):
        harmless = [gold.parts(row["prompt"], row[side])["harmless"] for side in ("chosen", "rejected")]
        sensible = all(gold.moves_of(row[side]) for side in ("chosen", "rejected"))
        if row["kind"] == "decline" and sensible and sum(harmless) == 1:
            wins.append(harmless[0] == 0)
    assert len(wins) > 100
    assert sum(wins) / len(wins) > 0.6


def test_judgements_are_clear_in_the_part_that_they_name() -> None:
    rows = judgements(World(0), 80)
    assert {row["part"] for row in rows} == {"helpful", "honest", "harmless", "not_evasive"}
    for row in [*rows, *judgements(World(0), 20, ["harmless"])]:
        chosen, rejected = (gold.parts(row["prompt"], row[side])[row["part"]] for side in ("chosen", "rejected"))
        assert (chosen, rejected) == (1, 0)


def test_red_team_prompts_mostly_ask_for_help_with_harm(prepared: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = prepared
    kinds = [row["kind"] for row in _rows(folder / "prompts_red_team.jsonl")]
    assert kinds.count("decline") > len(kinds) / 2
    assert {row["kind"] for row in _rows(folder / "held_out_red_team.jsonl")} == {"decline"}
    assert {row["kind"] for row in _rows(folder / "held_out_benign.jsonl")} == {"benign"}
    assert {row["part"] for row in _rows(folder / "judgements_harmless.jsonl")} == {"harmless"}


def test_what_is_written_is_what_the_summary_says(prepared: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = prepared
    assert summary["rows"] == SMALL._asdict()
    for name, rows in summary["rows"].items():
        assert len(_rows(folder / f"{name}.jsonl")) == rows
    assert load(folder / "constitution.yaml") == CONSTITUTION
    assert summary["constitution_sha"] == CONSTITUTION.sha
    assert (folder / "base/model.safetensors").is_file()
    assert summary["base_model"]["loss_first"] > 0


def test_constitution_has_four_principles_for_each_part_of_gold() -> None:
    tags = [principle.tags for principle in CONSTITUTION.principles]
    assert sorted(tags) == sorted([part] for part in gold.WEIGHTS for _ in range(4))


def test_the_plain_demos_rows_are_as_they_always_were() -> None:
    """The plain demo's published numbers rest on them."""
    world = World(0)
    rows = world.corpus(500), world.sft_rows(200), world.prompts(100), preference_rows(world, 200)
    digests = [hashlib.sha256(json.dumps(each).encode()).hexdigest()[:16] for each in rows]
    assert digests == ["eff45f0ceae69ff3", "defdafa26bd597b2", "dad022571ca1e63d", "f3d0759b3a4805e3"]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
