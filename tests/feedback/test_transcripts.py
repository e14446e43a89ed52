from collections import Counter

import pytest

from rlhf_ray.feedback.constitution import Constitution
from rlhf_ray.feedback.critique import MOST_STEPS, Said, Step, Transcript, drawn, sft_rows, steps

CONSTITUTION = Constitution.model_validate(
    {
        "name": "two",
        "principles": [
            {"id": "x", "critique": "critique x?", "revision": "revise x.", "comparison": "compare x?"},
            {"id": "y", "critique": "critique y?", "revision": "revise y.", "comparison": "compare y?"},
        ],
    }
)
SHOWN = CONSTITUTION.model_copy(
    update={
        "examples": Constitution.model_validate(
            {
                **CONSTITUTION.model_dump(),
                "examples": [{"principle": "y", "prompt": "ep", "response": "er", "critique": "ec", "revision": "ev"}],
            }
        ).examples
    }
)


def said(text: str, finish: str = "eos") -> Said:
    return Said(text, 3, -1.5, finish)  # type: ignore[arg-type]


def talked(transcript: Transcript, *texts: str, critique: bool = True, rounds: int = 2) -> list[list[str]]:
    """Takes a transcript through its steps with these texts; what was asked in each, as contents of turns."""
    asked = []
    for step, text in zip(steps(rounds, critique), texts, strict=False):
        asked.append([turn["content"] for turn in transcript.ask(CONSTITUTION, 0, step)])
        transcript.hear(step, said(text))
    return asked


def start() -> Transcript:
    return Transcript(7, [{"role": "user", "content": "prompt"}])


def test_each_round_starts_again_from_the_prompt_and_the_last_revision() -> None:
    transcript = start()
    asked = talked(transcript, "answer", "critique 1", "revision 1", "critique 2", "revision 2")
    first, second = (CONSTITUTION.of(each.principle_id) for each in transcript.rounds)
    assert asked == [
        ["prompt"],
        ["prompt", "answer", first.critique],
        ["prompt", "answer", first.critique, "critique 1", first.revision],
        ["prompt", "revision 1", second.critique],
        ["prompt", "revision 1", second.critique, "critique 2", second.revision],
    ]


def test_without_critique_the_revision_is_asked_for_directly() -> None:
    transcript = start()
    asked = talked(transcript, "answer", "revision 1", "revision 2", critique=False)
    first, second = (CONSTITUTION.of(each.principle_id) for each in transcript.rounds)
    assert asked == [["prompt"], ["prompt", "answer", first.revision], ["prompt", "revision 1", second.revision]]


def test_examples_come_first_in_the_form_that_is_asked_for() -> None:
    transcript = start()
    transcript.hear(Step("response", 0), said("answer"))
    with_critique = transcript.ask(SHOWN, 0, Step("critique", 1))
    assert [turn["content"] for turn in with_critique][:6] == ["ep", "er", "critique y?", "ec", "revise y.", "ev"]
    assert [turn["role"] for turn in with_critique] == ["user", "assistant"] * 4 + ["user"]
    directly = transcript.ask(SHOWN, 0, Step("revision", 1))
    assert [turn["content"] for turn in directly][:4] == ["ep", "er", "revise y.", "ev"]


def test_the_principle_depends_on_seed_prompt_and_round_alone() -> None:
    one, two = start(), start()
    talked(one, "a", "b", "c", "d", "e")
    talked(two, "other", "texts", "here", "all", "through")
    assert [each.principle_id for each in one.rounds] == [each.principle_id for each in two.rounds]
    seen = {(s, p, r): drawn(CONSTITUTION.principles, s, p, r).id for s in (0, 1) for p in range(50) for r in (1, 2, 3)}
    for fixed in range(3):  # each of the three makes a difference
        groups: dict[tuple[int, ...], set[str]] = {}
        for key, value in seen.items():
            groups.setdefault(key[:fixed] + key[fixed + 1 :], set()).add(value)
        assert any(len(values) == 2 for values in groups.values())


def test_principles_are_drawn_with_replacement_and_evenly() -> None:
    counts = Counter(drawn(CONSTITUTION.principles, 0, prompt, 1).id for prompt in range(2000))
    assert counts["x"] == pytest.approx(1000, abs=100)  # 4.5 standard deviations
    both = [[drawn(CONSTITUTION.principles, 0, prompt, r).id for r in (1, 2)] for prompt in range(100)]
    assert any(first == second for first, second in both)


def test_no_two_steps_of_any_prompts_share_a_sample_id() -> None:
    for critique in (True, False):
        ids = [prompt * MOST_STEPS + step.number for prompt in range(3) for step in steps(24, critique)]
        assert len(set(ids)) == len(ids)
    assert {step.number for step in steps(4, False)} < {step.number for step in steps(4, True)}


@pytest.mark.parametrize(
    ("bad", "finish", "cause"),
    [("", "eos", "critique 2: empty"), ("long", "length", "critique 2: truncated at 3 tokens")],
)
def test_an_unfit_text_ends_its_transcript_and_what_came_before_stays_good(bad: str, finish: str, cause: str) -> None:
    transcript = start()
    talked(transcript, "answer", "critique 1", "revision 1")
    transcript.ask(CONSTITUTION, 0, Step("critique", 2))
    transcript.hear(Step("critique", 2), said(bad, finish))
    assert transcript.dropped == cause
    assert [text for _, _, text in transcript.revisions()] == ["revision 1"]


def test_an_unfit_answer_leaves_no_revisions() -> None:
    transcript = start()
    transcript.hear(Step("response", 0), said("cut", "length"))
    assert transcript.dropped == "response: truncated at 3 tokens"
    assert sft_rows(transcript, "all") == []


def test_an_unfit_revision_is_no_row() -> None:
    transcript = start()
    talked(transcript, "answer", "critique 1", "revision 1", "critique 2")
    transcript.hear(Step("revision", 2), said("cut", "length"))
    assert [row["round"] for row in sft_rows(transcript, "all")] == [1]
    assert [row["round"] for row in sft_rows(transcript, "last")] == [1]


def test_rows_hold_the_prompt_and_a_revision() -> None:
    transcript = start()
    talked(transcript, "answer", "critique 1", "revision 1", "critique 2", "revision 2")
    every = sft_rows(transcript, "all")
    assert [row["messages"] for row in every] == [
        [{"role": "user", "content": "prompt"}, {"role": "assistant", "content": f"revision {number}"}]
        for number in (1, 2)
    ]
    assert [row["principle_id"] for row in every] == [each.principle_id for each in transcript.rounds]
    assert sft_rows(transcript, "last") == every[1:]


def test_a_transcript_is_the_same_after_its_row_is_read() -> None:
    transcript = start()
    talked(transcript, "answer", "critique 1", "revision 1", "critique 2")
    assert Transcript.of(transcript.row()) == transcript
