import json
import os

import numpy as np
import pytest

from rlhf_ray.config.common import DataConfig, MixedDataConfig
from rlhf_ray.data.quarantine import Quarantine
from rlhf_ray.data.rows import (
    candidates,
    judged_answers,
    labelled_pairs,
    preference_pairs,
    prompts,
    rewarded_answers,
    sft_examples,
)
from rlhf_ray.errors import DataError

HELLO = [{"role": "user", "content": "Hello"}]
DAY = [{"role": "assistant", "content": "Good day"}]
BYE = [{"role": "assistant", "content": "Bye"}]
HH = "\n\nHuman: Hello\n\nAssistant:"
GOOD = {
    sft_examples: {"prompt": "Hello", "completion": "Good day"},
    preference_pairs: {"prompt": "Hello", "chosen": "Good day", "rejected": "Bye"},
    judged_answers: {"prompt": "Hello", "completion": "Good day", "label": True},
    rewarded_answers: {"prompt": "Hello", "completion": "Good day", "reward": 0.5},
    prompts: {"prompt": "Hello"},
}


def load(loader, tokenizer, path, max_tokens=64, quarantine=None):
    data = DataConfig(path=path, max_tokens=max_tokens, max_bad_share=1.0)
    return loader(data, tokenizer, quarantine or Quarantine())


def fault_of(loader, tokenizer, jsonl, row, max_tokens=64):
    """The reason why `row`, the second of two, is quarantined."""
    quarantine = Quarantine()
    usable = load(loader, tokenizer, jsonl(GOOD[loader], row), max_tokens, quarantine)
    assert len(usable) == 1
    assert quarantine.total == 1
    assert ":2: " in quarantine.first[0]
    return quarantine.first[0].partition(":2: ")[2]


# Every way of writing the same row.
SFT = [
    {"prompt": "Hello", "completion": "Good day"},
    {"prompt": HELLO, "completion": DAY},
    {"prompt": HELLO, "completion": "Good day"},
    {"prompt": HH, "completion": " Good day"},
    {"messages": HELLO + DAY},
    {"messages": HELLO + DAY, "prompt": None, "completion": None},
]
PAIRS = [
    {"prompt": "Hello", "chosen": "Good day", "rejected": "Bye"},
    {"prompt": HELLO, "chosen": DAY, "rejected": BYE},
    {"prompt": "Hello", "chosen": HELLO + DAY, "rejected": HELLO + BYE},
    {"prompt": HH, "chosen": " Good day", "rejected": " Bye"},
    {"chosen": HH + " Good day", "rejected": HH + " Bye"},
    {"chosen": HELLO + DAY, "rejected": HELLO + BYE, "prompt": None},
]
JUDGED = [
    {"prompt": "Hello", "completion": "Good day", "label": True},
    {"prompt": HELLO, "completion": DAY, "label": True},
    {"prompt": "Hello", "completion": HELLO + DAY, "label": True, "chosen": None},
    {"prompt": HH, "completion": " Good day", "label": True},
]
PROMPTS = [
    {"prompt": "Hello"},
    {"prompt": HELLO},
    {"prompt": HH},
    {"messages": HELLO},
    {"messages": HELLO + DAY},
    {"chosen": HH + " Good day"},
    {"chosen": HELLO + DAY},
]


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_every_stage_sees_the_same_prompt_ids_however_the_row_is_written(template, request, jsonl):
    tokenizer = request.getfixturevalue(template)
    expected = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    answers = {"plain": (" Good day", " Bye"), "chatml": ("Good day", "Bye")}[template]
    chosen, rejected = ([*tokenizer.encode(answer), tokenizer.eos_token_id] for answer in answers)

    for example in load(sft_examples, tokenizer, jsonl(*SFT)):
        assert example.ids.tolist() == expected + chosen
        assert example.loss_mask.tolist() == [False] * len(expected) + [True] * len(chosen)
    for pair in load(preference_pairs, tokenizer, jsonl(*PAIRS)):
        assert (pair.prompt.tolist(), pair.chosen.tolist(), pair.rejected.tolist()) == (expected, chosen, rejected)
    for judged in load(judged_answers, tokenizer, jsonl(*JUDGED)):
        assert (judged.prompt.tolist(), judged.answer.tolist(), judged.desirable) == (expected, chosen, True)
    for prompt in load(prompts, tokenizer, jsonl(*PROMPTS)):
        assert (prompt.ids.tolist(), prompt.text) == (expected, "Hello")


@pytest.mark.parametrize(
    ("loader", "rows"), [(sft_examples, SFT), (preference_pairs, PAIRS), (judged_answers, JUDGED), (prompts, PROMPTS)]
)
def test_no_way_of_writing_a_good_row_is_quarantined(plain, jsonl, loader, rows):
    quarantine = Quarantine()
    assert len(load(loader, plain, jsonl(*rows), quarantine=quarantine)) == len(rows)
    assert quarantine.total == 0


def test_plain_text_without_a_template_is_the_same_prompt_in_all_three(raw, jsonl):
    row = {"prompt": "A cat is", "completion": " an animal", "chosen": " an animal", "rejected": " how"}
    (sft,), (pair,), (prompt,) = (load(f, raw, jsonl(row)) for f in (sft_examples, preference_pairs, prompts))
    assert raw.decode(sft.ids) == "A cat is an animal<|im_end|>"
    assert sft.ids.tolist() == [*pair.prompt, *pair.chosen]
    assert pair.prompt.tolist() == prompt.ids.tolist()
    assert prompt.text == "A cat is"


def test_ids_are_int32_and_masks_are_bool(plain, jsonl):
    (sft,) = load(sft_examples, plain, jsonl(SFT[0]))
    assert (sft.ids.dtype, sft.loss_mask.dtype) == (np.int32, np.bool_)


def test_whole_dialogues_share_all_turns_before_the_last_answer(plain, jsonl):
    start = "\n\nHuman: Hi\n\nAssistant: Good day\n\nHuman: Hello\n\nAssistant:"
    (pair,) = load(preference_pairs, plain, jsonl({"chosen": start + " Bye", "rejected": start + " No"}))
    assert plain.decode(pair.prompt) == start.replace("Good day", "Good day<|im_end|>")


def test_the_text_of_a_prompt_is_the_last_user_turn(plain, jsonl):
    (prompt,) = load(prompts, plain, jsonl({"messages": HELLO + DAY + [{"role": "user", "content": "And?"}]}))
    assert prompt.text == "And?"


def test_margin_and_p_are_read_where_they_are_given(plain, jsonl):
    rows = [{**PAIRS[0], "margin": 2}, {**PAIRS[0], "p": 0}, {**PAIRS[0], "p": 0.75, "margin": None}]
    pairs = load(preference_pairs, plain, jsonl(*rows))
    assert [(pair.margin, pair.p) for pair in pairs] == [(2.0, None), (None, 0.0), (None, 0.75)]


@pytest.mark.parametrize(("p", "labels"), [(None, [True, False]), (0.75, [True, False]), (0.25, [False, True])])
def test_a_pair_is_two_judged_answers_of_which_the_likelier_better_one_is_desirable(plain, jsonl, p, labels):
    for row in PAIRS:
        (pair,) = load(preference_pairs, plain, jsonl(row))
        judged = load(judged_answers, plain, jsonl({**row, "p": p}))
        assert [answer.desirable for answer in judged] == labels
        assert [answer.answer.tolist() for answer in judged] == [pair.chosen.tolist(), pair.rejected.tolist()]
        assert [answer.prompt.tolist() for answer in judged] == [pair.prompt.tolist()] * 2


@pytest.mark.parametrize(("p", "reward"), [(None, 1.0), (0.75, 0.5), (0.5, 0.0), (0.25, -0.5)])
def test_of_a_pair_the_better_answer_earns_what_the_worse_one_loses(plain, jsonl, p, reward):
    (pair,) = load(preference_pairs, plain, jsonl(PAIRS[0]))
    better, worse = load(rewarded_answers, plain, jsonl({**PAIRS[0], "p": p}))
    assert (better.answer.tolist(), better.reward) == (pair.chosen.tolist(), reward)
    assert (worse.answer.tolist(), worse.reward) == (pair.rejected.tolist(), -reward)


def test_a_runs_samples_are_rewarded_answers_to_the_prompts_that_it_had(plain, jsonl):
    (pair,) = load(preference_pairs, plain, jsonl(PAIRS[0]))
    shown = {"update": 3, "prompt": plain.decode(pair.prompt), "response": " Good day", "score": -2, "kl": 0.1}
    rewarded = {"prompt": HELLO, "completion": DAY, "reward": -2.0}
    for answer in load(rewarded_answers, plain, jsonl(shown, rewarded)):
        assert answer.prompt.tolist() == pair.prompt.tolist()
        assert (answer.answer.tolist(), answer.reward) == (pair.chosen.tolist(), -2.0)


def test_a_pair_counts_as_one_row_towards_the_share_of_bad_rows(plain, jsonl):
    bad = {"prompt": "Hello", "completion": "Bye"}
    with pytest.raises(DataError, match=r"1 of 3 rows \(33.33%\)"):
        data = DataConfig(path=jsonl(PAIRS[0], PAIRS[1], bad), max_bad_share=0.3)
        judged_answers(data, plain, Quarantine())


PAIR = GOOD[preference_pairs]
JUDGEMENT = GOOD[judged_answers]


@pytest.mark.parametrize(
    ("loader", "row", "reason"),
    [
        (sft_examples, {"prompt": "a"}, "missing column: no 'completion' (nor 'messages'); the row has prompt"),
        (sft_examples, {}, "missing column: no 'prompt' (nor 'messages'); the row has none"),
        (sft_examples, {"messages": "a"}, "wrong type: 'messages' is str, expected a list of messages"),
        (sft_examples, {"messages": []}, "empty: 'messages' has no messages"),
        (sft_examples, {"messages": HELLO}, "no answer: none of the messages is the assistant's"),
        (sft_examples, {"messages": DAY}, "no prompt: no turn comes before the assistant's first"),
        (
            sft_examples,
            {"messages": [*HELLO, {"role": "assistant"}]},
            "wrong type: 'messages'[1] is dict, expected an object with 'role' and 'content'",
        ),
        (
            sft_examples,
            {"messages": [{"role": "tool", "content": "a"}]},
            "wrong value: 'messages'[0] has role 'tool', expected one of system, user, assistant",
        ),
        (
            sft_examples,
            {"messages": [{"role": ["user"], "content": "a"}]},
            "wrong value: 'messages'[0] has role ['user'], expected one of system, user, assistant",
        ),
        (
            sft_examples,
            {"messages": [*HELLO, {"role": "assistant", "content": [{"text": "a"}]}]},
            "wrong type: 'messages'[1].content is list, expected text",
        ),
        (
            sft_examples,
            {"prompt": "a", "completion": "b<|im_end|>c"},
            "end inside an answer: the text '<|im_end|>' stands before the answer's end",
        ),
        (sft_examples, {"prompt": "a", "completion": " \n"}, "empty: 'completion' has no text"),
        (
            sft_examples,
            {"prompt": HELLO, "completion": HELLO},
            "no answer: the last message of 'completion' is the user's",
        ),
        (preference_pairs, {"prompt": "a", "chosen": "b"}, "missing column: no 'rejected'; the row has prompt, chosen"),
        (preference_pairs, {**PAIR, "chosen": 3}, "wrong type: 'chosen' is int, expected text or a list of messages"),
        (preference_pairs, {**PAIR, "prompt": {}}, "wrong type: 'prompt' is dict, expected text or a list of messages"),
        (preference_pairs, {**PAIR, "rejected": "Good day "}, "identical: 'chosen' and 'rejected' are the same"),
        (preference_pairs, {**PAIR, "margin": "2"}, "wrong type: 'margin' is str, expected a number"),
        (preference_pairs, {**PAIR, "margin": float("nan")}, "wrong value: 'margin' is nan"),
        (preference_pairs, {**PAIR, "margin": float("inf")}, "wrong value: 'margin' is inf"),
        (preference_pairs, {**PAIR, "margin": 10**400}, "wrong value: 'margin' is 1000"),
        (preference_pairs, {**PAIR, "p": 1.5}, "wrong value: 'p' is 1.5, expected a number from 0 to 1"),
        (preference_pairs, {**PAIR, "p": True}, "wrong type: 'p' is bool, expected a number"),
        (
            preference_pairs,
            {**PAIR, "chosen": [{"role": "user", "content": "Other"}, *DAY]},
            "prompts differ: 'chosen' does not begin with the messages of 'prompt'",
        ),
        (
            preference_pairs,
            {"chosen": HH + " a", "rejected": "\n\nHuman: Other\n\nAssistant: b"},
            "prompts differ: 'chosen' and 'rejected' part before their last answers",
        ),
        (
            preference_pairs,
            {"chosen": HH, "rejected": HH + " b"},
            "empty: turn 2 of 2 in 'chosen', the assistant's, has no text",
        ),
        (
            preference_pairs,
            {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"},
            "no answer: the last turn of 'chosen' is the user's",
        ),
        (
            preference_pairs,
            {"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"},
            "no prompt: 'chosen' has no turn before the answer",
        ),
        (preference_pairs, {"chosen": "Good", "rejected": "Bad"}, "not a dialogue: expected text that begins with"),
        (judged_answers, {**JUDGEMENT, "label": 1}, "wrong type: 'label' is int, expected true or false"),
        (judged_answers, {**JUDGEMENT, "label": "true"}, "wrong type: 'label' is str, expected true or false"),
        (
            judged_answers,
            {"prompt": "a", "completion": "b"},
            "missing column: no 'label' (nor 'chosen' and 'rejected'); the row has prompt, completion",
        ),
        (judged_answers, {**JUDGEMENT, "completion": ""}, "empty: 'completion' has no text"),
        (judged_answers, {"prompt": "a", "chosen": "b"}, "missing column: no 'rejected'; the row has prompt, chosen"),
        (judged_answers, {**PAIR, "p": 0.5}, "undecided: 'p' is 0.5, so neither answer is the desirable one"),
        (
            rewarded_answers,
            {"prompt": "a", "completion": "b"},
            "missing column: no 'reward' (nor 'chosen' and 'rejected'); the row has prompt, completion",
        ),
        (rewarded_answers, {"prompt": "a", "response": "b", "score": None}, "missing column: no 'score'"),
        (rewarded_answers, {**GOOD[rewarded_answers], "reward": "1"}, "wrong type: 'reward' is str, expected a number"),
        (rewarded_answers, {**GOOD[rewarded_answers], "reward": float("nan")}, "wrong value: 'reward' is nan"),
        (prompts, {"text": "a", "id": 1}, "missing column: no 'chosen' (nor 'prompt' or 'messages'); the row has text"),
        (prompts, {"prompt": "\ud800"}, "not UTF-8: 'prompt' has a lone surrogate at character 0"),
        (prompts, {"prompt": "\n\nHuman: \n\nAssistant:"}, "empty: turn 1 of 1 in 'prompt', the user's, has no text"),
        (prompts, {"messages": DAY}, "no prompt: no turn comes before the assistant's first"),
        (prompts, {"prompt": None}, "missing column: no 'chosen' (nor 'prompt' or 'messages'); the row has none"),
    ],
)
def test_a_bad_row_is_quarantined_with_its_reason_and_the_good_one_is_kept(chatml, jsonl, loader, row, reason):
    assert fault_of(loader, chatml, jsonl, row).startswith(reason)


def test_a_row_of_exactly_max_tokens_is_kept_and_one_token_more_is_not(plain, jsonl):
    path = jsonl(GOOD[sft_examples])
    length = len(load(sft_examples, plain, path)[0].ids)
    assert len(load(sft_examples, plain, path, max_tokens=length)) == 1
    with pytest.raises(DataError, match=f"too long: {length} tokens, data.max_tokens is {length - 1}"):
        load(sft_examples, plain, path, max_tokens=length - 1)


def test_a_judged_answer_of_exactly_max_tokens_is_kept_and_one_token_more_is_not(plain, jsonl):
    (judged,) = load(judged_answers, plain, jsonl(JUDGEMENT))
    length = len(judged.prompt) + len(judged.answer)
    assert len(load(judged_answers, plain, jsonl(JUDGEMENT), max_tokens=length)) == 1
    with pytest.raises(DataError, match=f"too long: {length} tokens, data.max_tokens is {length - 1}"):
        load(judged_answers, plain, jsonl(JUDGEMENT), max_tokens=length - 1)


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_a_pair_is_as_long_as_its_prompt_and_longer_answer(plain, jsonl, longer):
    (pair,) = load(preference_pairs, plain, jsonl({**PAIR, longer: "What is a cat? " * 3}))
    length = len(pair.prompt) + len(getattr(pair, longer))
    reason = fault_of(preference_pairs, plain, jsonl, {**PAIR, longer: "What is a cat? " * 3}, max_tokens=length - 1)
    assert reason == f"too long: {length} tokens, data.max_tokens is {length - 1}"


def test_a_prompt_is_measured_without_the_answer_after_it(plain, jsonl):
    (short,) = load(prompts, plain, jsonl(PROMPTS[0]))
    long_answer = {"messages": [*HELLO, {"role": "assistant", "content": "cat " * 500}]}
    assert len(load(prompts, plain, jsonl(long_answer), max_tokens=len(short.ids))) == 1


@pytest.mark.parametrize("loader", list(GOOD))
def test_an_empty_data_set_and_one_of_bad_rows_alone_are_told_apart(plain, jsonl, loader):
    with pytest.raises(DataError, match="empty data set"):
        load(loader, plain, jsonl())
    with pytest.raises(DataError, match="all rows bad"):
        load(loader, plain, jsonl({"x": 1}, {"x": 2}))


def test_lines_that_cannot_be_read_count_towards_the_share_of_bad_rows(plain, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Hello"}\n' * 98 + "{\n" + '{"prompt": ""}\n')
    quarantine = Quarantine()
    assert len(prompts(DataConfig(path=str(path), max_bad_share=0.02), plain, quarantine)) == 98
    with pytest.raises(DataError, match=r"2 of 100 rows \(2.00%\)"):
        prompts(DataConfig(path=str(path), max_bad_share=0.019), plain, Quarantine())


def test_rows_read_through_parquet_are_the_same_examples(plain, jsonl, tmp_path):
    """Parquet gives every row every column, null where it had none."""
    from datasets import Dataset

    mixed = [SFT[0], SFT[4]]
    Dataset.from_list([{"messages": None, "prompt": None, "completion": None, **row} for row in mixed]).to_parquet(
        tmp_path / "rows.parquet"
    )
    examples = load(sft_examples, plain, str(tmp_path / "rows.parquet"))
    assert [e.ids.tolist() for e in examples] == [e.ids.tolist() for e in load(sft_examples, plain, jsonl(*mixed))]


@pytest.mark.skipif("RLHF_RAY_HH_PATH" not in os.environ, reason="RLHF_RAY_HH_PATH names no file of hh-rlhf pairs")
def test_real_hh_rlhf_pairs_are_read_within_the_default_share_of_bad_rows(plain):
    data = DataConfig(path=os.environ["RLHF_RAY_HH_PATH"], max_tokens=100_000)
    pairs = preference_pairs(data, plain, Quarantine())
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            assert np.flatnonzero(answer == plain.eos_token_id).tolist() == [len(answer) - 1]
        assert plain.decode(pair.prompt).endswith("\n\nAssistant:")


# Several sources


@pytest.mark.parametrize("loader", [sft_examples, preference_pairs, judged_answers, rewarded_answers])
def test_a_row_knows_its_source_and_a_bad_one_its_file_and_line(loader, plain, jsonl, tmp_path):
    people, ai = jsonl(GOOD[loader], name="people.jsonl"), jsonl({"no": 1}, GOOD[loader], name="ai.jsonl")
    sources = {"people": {"path": people}, "ai": {"path": ai}}
    data = MixedDataConfig.model_validate({"sources": sources, "max_bad_share": 0.5})
    quarantine = tmp_path / "quarantine.jsonl"
    found = loader(data, plain, Quarantine(quarantine))
    assert [row.source for row in found] == ["people", "ai"]
    [entry] = map(json.loads, quarantine.read_text().splitlines())
    assert (entry["file"], entry["line"]) == (ai, 1)


def test_a_small_bad_source_is_not_hidden_by_a_large_good_one(plain, jsonl):
    large = jsonl(*[GOOD[sft_examples]] * 98, name="large.jsonl")
    small = jsonl({"no": 1}, GOOD[sft_examples], name="small.jsonl")
    sources = {"large": {"path": large}, "small": {"path": small}}
    data = MixedDataConfig.model_validate({"sources": sources, "max_bad_share": 0.1})
    with pytest.raises(DataError, match=r"small.jsonl': 1 of 2 rows \(50.00%\) cannot be used"):
        sft_examples(data, plain, Quarantine())


def test_a_bad_row_of_one_source_is_not_held_against_the_next(plain, jsonl):
    many = jsonl({"no": 1}, *[GOOD[sft_examples]] * 19, name="many.jsonl")
    few = jsonl(GOOD[sft_examples], name="few.jsonl")
    sources = {"many": {"path": many}, "few": {"path": few}}
    data = MixedDataConfig.model_validate({"sources": sources, "max_bad_share": 0.1})
    assert len(sft_examples(data, plain, Quarantine())) == 20


# Answers to be compared


def test_answers_to_be_compared_are_a_list_or_a_pair_whose_label_is_left_away(jsonl):
    rows = [{"prompt": "Hello", "responses": ["Good day ", "Bye"]}, *PAIRS]
    found = candidates(DataConfig(path=jsonl(*rows)), Quarantine(), most=2)
    assert len(found) == len(rows)
    assert all(each.responses == ("Good day", "Bye") and each.p is None for each in found)


def test_a_labelled_pair_is_certain_unless_its_row_says_otherwise(jsonl):
    data = DataConfig(path=jsonl(PAIRS[0], {**PAIRS[0], "p": 0.2}))
    assert [each.p for each in labelled_pairs(data, Quarantine())] == [1.0, 0.2]
