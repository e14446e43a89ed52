"""The judge stage: with a server of rules whose every answer can be told beforehand, and with a real engine."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from rlhf_ray.config.common import DataConfig
from rlhf_ray.config.feedback import JudgeConfig
from rlhf_ray.data.quarantine import Quarantine
from rlhf_ray.data.rows import preference_pairs
from rlhf_ray.errors import ConfigError, DataError, JudgeError, ModelError, StopRequested
from rlhf_ray.feedback import constitution as constitutions
from rlhf_ray.feedback.endpoint import KEY
from rlhf_ray.models import load
from rlhf_ray.stages import judge
from rlhf_ray.stages.engines import Engines, Reader
from tests.feedback.chat_server import ChatServer, Said, choice, serving, text

SECRET = "sk-very-secret-key"
PROMPTS = ["good day", "what is it", "why", "tell me more", "how so", "and then"]
CONSTITUTION = {
    "name": "short",
    "principles": [
        {"id": f"p{n}", "critique": f"bad{n}", "revision": f"new{n}", "comparison": f"which{n}"} for n in range(3)
    ],
    "templates": {
        "comparison": "{conversation} {principle} (A) {a} (B) {b}",
        "reasoning": "{conversation} {principle} (A) {a} (B) {b} why",
        "decision": "so",
        "turn": "{role} {content}",
    },
}
KNOWN = [{"prompt": "why", "chosen": "because of that", "rejected": "no"}] * 3 + [
    {"prompt": "why", "chosen": "no", "rejected": "because of that"}
]


def lines(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    (folder / "constitution.json").write_text(json.dumps(CONSTITUTION))
    write(folder / "labelled.jsonl", KNOWN)
    write(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    answers = [{"prompt": prompt, "responses": ["short", "a longer one", "short"]} for prompt in PROMPTS]
    pairs = [{"prompt": prompt, "chosen": "yes", "rejected": "yes indeed", "p": 1.0} for prompt in PROMPTS]
    write(folder / "answers.jsonl", [row for both in zip(answers, pairs, strict=True) for row in both])
    return folder


def config_of(files: Path, name: str, **changes: Any) -> JudgeConfig:
    settings: dict[str, Any] = {
        "name": name,
        "output_dir": str(files / "runs"),
        "constitution": str(files / "constitution.json"),
        "principles_per_pair": 2,
        "telemetry": {"wandb": "off"},
    }
    return JudgeConfig.model_validate({**settings, **changes})


# A server of rules


def prefers_longer(request: dict[str, Any]) -> Said:
    """0.8 for the longer answer at the first place, 0.62 at the second: by hand, p = (0.8 + 0.62) / 2 = 0.71 for it."""
    first, second = request["messages"][0]["content"].partition("(A) ")[2].split(" (B) ")
    a = 0.8 if len(first) > len(second) else 0.38
    return choice({"A": a * 0.9, "B": (1 - a) * 0.9}, usage=(100, 1))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setenv(KEY, SECRET)
    with serving() as running:
        running.reply = prefers_longer
        yield running


def served(files: Path, server: ChatServer, name: str, **changes: Any) -> JudgeConfig:
    settings: dict[str, Any] = {
        "data": {"path": str(files / "answers.jsonl")},
        "judge": {
            "name": "endpoint",
            "model": "m",
            "base_url": server.url,
            "requests_per_minute": 60000,
            "retry_for_s": 1,
            "price_in": 2.0,
            "price_out": 10.0,
        },
    }
    return config_of(files, name, **{**settings, **changes})


def test_every_pair_is_judged_in_both_orders_by_every_principle_drawn(files: Path, server: ChatServer) -> None:
    summary = judge.run(served(files, server, "rules", labelled=str(files / "labelled.jsonl")))
    sha = constitutions.load(files / "constitution.json").sha
    judged, preferences = lines(summary["judgements"]), lines(summary["rows"])
    assert [row["prompt_id"] for row in judged] == list(range(16))
    # 12 pairs of data and 4 known ones, 2 principles, 2 orders
    assert len(server.requests) == summary["questions"] == 16 * 2 * 2
    assert summary["answers_dropped"] == {"identical": 6}
    assert (summary["prompts"], summary["pairs"], summary["preferences"]) == (12, 12, 12)
    for row in preferences:
        assert row["chosen"] in ("a longer one", "yes indeed")
        assert row["p"] == pytest.approx(0.71)
        assert len(set(row["principle_ids"])) == 2
        assert row | {"label_source": "ai", "cot": False, "feedback_model": "m", "constitution_sha": sha} == row
    assert summary["position_bias"] == pytest.approx((0.8 + 0.38) / 2 - 0.5)
    assert (summary["flip_rate"], summary["spread"]) == (0, pytest.approx(0))
    assert (summary["option_mass"], summary["low_mass_share"]) == (pytest.approx(0.9), 0)
    assert summary["tokens"] == {"generated": 0, "judge_in": 6400, "judge_out": 64}
    assert summary["cost"] == pytest.approx((6400 * 2 + 64 * 10) / 1e6)
    known = summary["calibration"]
    assert (known["pairs"], known["accuracy"]) == (4, 0.75)  # the last known pair prefers the shorter
    assert known["ece"] == pytest.approx(0.75 - 0.71)
    assert known["brier"] == pytest.approx((3 * 0.29**2 + 0.71**2) / 4)


def test_preferences_are_rows_that_training_reads(files: Path, server: ChatServer, policy: str) -> None:
    summary = judge.run(served(files, server, "read"))
    data = DataConfig(path=summary["rows"], max_tokens=128)
    pairs = preference_pairs(data, load.tokenizer(policy, "model"), Quarantine())
    assert [pair.p for pair in pairs] == pytest.approx([0.71] * 12)


def test_a_rationale_comes_first_and_its_pair_is_clamped(files: Path, server: ChatServer) -> None:
    def reasoned(request: dict[str, Any]) -> Said:
        if len(request["messages"]) == 1:
            return text(f"seed {request['seed']}", usage=(100, 7))
        assert request["messages"][1]["content"].startswith("seed ")
        assert request["messages"][2]["content"] == "so"
        return prefers_longer({"messages": request["messages"][:1]})

    server.reply = reasoned
    summary = judge.run(served(files, server, "cot", chain_of_thought=True))
    preferences = lines(summary["rows"])
    assert {(row["p"], row["cot"]) for row in preferences} == {(0.6, True)}
    questions = [each for row in lines(summary["judgements"]) for pair in row["pairs"] for each in pair["questions"]]
    assert len({each["rationale"]["text"] for each in questions}) == len(questions), (
        "each has random numbers of its own"
    )
    assert {(each["tokens_in"], each["tokens_out"]) for each in questions} == {(200, 8)}


def test_a_rationale_that_was_cut_short_is_not_followed_by_a_choice(files: Path, server: ChatServer) -> None:
    def talkative(request: dict[str, Any]) -> Said:
        asked = request["messages"][0]["content"]
        if len(request["messages"]) == 1:
            return text("well", "length" if "how so" in asked else "stop", usage=(100, 7))
        assert "how so" not in asked
        return prefers_longer({"messages": request["messages"][:1]})

    server.reply = talkative
    summary = judge.run(served(files, server, "talkative", chain_of_thought=True))
    assert summary["questions_failed"] == {"rationale truncated at 7 tokens": 8}
    assert (summary["pairs"], summary["preferences"]) == (12, 10)


def test_a_question_without_an_answer_gives_no_label_and_is_counted(files: Path, server: ChatServer) -> None:
    def sometimes(request: dict[str, Any]) -> Said:
        asked = request["messages"][0]["content"]
        if asked.startswith("user why ") and "(A) yes indeed" in asked:
            return choice({"A": 0.9, "C": 0.05})
        if "how so which1" in asked:
            return Said("too much", 400)
        return prefers_longer(request)

    server.reply = sometimes
    summary = judge.run(served(files, server, "failing", principles_per_pair=3))
    assert summary["questions_failed"] == {"option missing": 3, "refused": 4}
    assert (summary["pairs"], summary["preferences"]) == (12, 11)
    judged = {(row["prompt"], len(row["responses"])): row["pairs"][0] for row in lines(summary["judgements"])}
    assert judged["why", 2]["p"] is None
    row = next(row for row in lines(summary["rows"]) if row["prompt"] == "how so")
    assert sorted(row["principle_ids"]) == ["p0", "p2"]
    assert row["p"] == pytest.approx(0.71)


def test_a_judge_that_fails_on_most_ends_the_run_and_the_block_is_asked_again_by_the_next(
    files: Path, server: ChatServer
) -> None:
    whole = judge.run(served(files, server, "mended_whole"))
    config = served(files, server, "mended", prompts_at_once=5)

    def broken(request: dict[str, Any]) -> Said:
        failing = any(each in request["messages"][0]["content"] for each in PROMPTS[3:])
        return choice({"I": 0.9, "A": 0.1}) if failing else prefers_longer(request)

    server.reply = broken
    with pytest.raises(JudgeError, match=r"failed on 16 of the latest 20 questions; one of them: option missing"):
        judge.run(config)
    assert len(lines(files / "runs/mended/judgements.jsonl")) == 5
    server.reply = prefers_longer
    constitution = files / "constitution.json"
    before = constitution.read_text()
    constitution.write_text(before.replace("which0", "who"))
    with pytest.raises(ConfigError, match=r"judgements.jsonl: an interrupted run wrote it with constitution_sha"):
        judge.run(config)
    constitution.write_text(before)
    again = judge.run(config)
    for file in ("judgements", "rows"):
        assert Path(again[file]).read_text() == Path(whole[file]).read_text()


def test_the_key_is_in_no_file_of_the_run(files: Path, server: ChatServer) -> None:
    def echo(request: dict[str, Any]) -> Said:
        return Said(f"we know {SECRET}", 400) if "why which0" in str(request) else prefers_longer(request)

    server.reply = echo
    summary = judge.run(served(files, server, "secret"))
    assert summary["questions_failed"]["refused"] > 0
    for path in (files / "runs/secret").rglob("*"):
        assert path.is_dir() or SECRET not in path.read_text()


def test_bad_rows_are_set_aside_with_file_and_line(files: Path, server: ChatServer, tmp_path: Path) -> None:
    good = [{"prompt": "why", "responses": ["no", "because"]}] * 5
    bad = [
        ({"prompt": "why", "responses": ["alone"]}, "'responses' has 1 texts, expected 2 to 16"),
        ({"prompt": "why", "responses": ["no", 3]}, r"'responses'[1] is int, expected text"),
        ({"prompt": "why"}, "no 'chosen' (nor 'responses')"),
        ({"responses": ["no", "yes"]}, "no 'prompt'"),
    ]
    path = write(tmp_path / "rows.jsonl", [*good, *(row for row, _ in bad)])
    judge.run(served(files, server, "bad", data={"path": path, "max_bad_share": 0.5}))
    set_aside = lines(files / "runs/bad/quarantine.jsonl")
    assert [(row["file"], row["line"]) for row in set_aside] == [(path, n) for n in (6, 7, 8, 9)]
    for row, (_, reason) in zip(set_aside, bad, strict=True):
        assert reason in row["reason"]


def test_answers_that_are_all_alike_are_no_preferences(files: Path, server: ChatServer, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "why", "responses": ["no", "no "]}])
    with pytest.raises(JudgeError, match=r"no pair has a label; .*judgements.jsonl"):
        judge.run(served(files, server, "alike", data={"path": path}))


def test_labelled_rows_without_a_label_are_refused_before_anybody_is_asked(files: Path, server: ChatServer) -> None:
    with pytest.raises(DataError, match="missing column"):
        judge.run(served(files, server, "unlabelled", labelled=str(files / "prompts.jsonl")))
    assert server.requests == []


def test_more_principles_than_there_are_are_refused(files: Path, server: ChatServer) -> None:
    with pytest.raises(ConfigError, match="principles_per_pair is 4, but constitution 'short' has 3 to draw from"):
        judge.run(served(files, server, "many", principles_per_pair=4))


# A model of one's own


def test_a_tokenizer_that_cannot_tell_the_options_apart_is_refused_before_an_engine_starts(
    files: Path, policy: str
) -> None:
    with pytest.raises(ModelError, match=r"cannot judge: its tokenizer makes the same tokens of \(A\) and \(B\)"):
        judge.run(local(files, policy, "letters"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_judge(tmp_path_factory.mktemp("model"))


def local(files: Path, model: str, name: str, **changes: Any) -> JudgeConfig:
    section = {"model": model, "max_tokens": 256, "max_new_tokens": 40, "cpus": 0.5}
    settings: dict[str, Any] = {
        "data": {"path": str(files / "prompts.jsonl"), "max_tokens": 32},
        "judge": section,
        "generator": section,
        "responses_per_prompt": 4,
    }
    return config_of(files, name, **{**settings, **changes})


@pytest.fixture(scope="module")
def one_start(files: Path, model: str, ray_session: None) -> Iterator[None]:
    """The runs of this module share one start of the engines."""
    config = local(files, model, "start")
    assert list(config.engines) == ["generator"], "the judge has engines of its own"
    readers = {"generator": Reader(config.engines["generator"], "generator", False)}
    with judge._models(config, readers, None) as models, pytest.MonkeyPatch.context() as patched:

        @contextmanager
        def ready(config: JudgeConfig, *_: Any) -> Iterator[Any]:
            generator, served_judge = models
            yield generator if config.generator else None, served_judge

        patched.setattr(judge, "_models", ready)
        yield


@pytest.fixture(scope="module")
def whole(files: Path, model: str, one_start: None) -> dict[str, Any]:
    """An uninterrupted run, all prompts at once."""
    return judge.run(local(files, model, "whole", labelled=str(files / "labelled.jsonl")))


def plain_logprob(causal: Any, tokenizer: Any, turns: list[dict[str, str]], option: str) -> float:
    import torch

    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    before, after = (tokenizer.encode(part, add_special_tokens=False) for part in (prompt, option))
    assert len(after) == 3
    with torch.inference_mode():
        table = causal(torch.tensor([before + after])).logits[0].log_softmax(-1)
    return float(sum(table[len(before) - 1 + place, token] for place, token in enumerate(after)))


@pytest.mark.real
def test_labels_are_a_plain_forward_pass_s_averaged_over_orders_and_principles(
    whole: dict[str, Any], files: Path, model: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    causal, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    rows = lines(whole["judgements"])
    compared = 0
    for row in rows:
        texts = [response["text"] for response in row["responses"]]
        for pair in row["pairs"]:
            found = []
            for question in pair["questions"]:
                a, b = texts[pair["first"]], texts[pair["second"]]
                a, b = (b, a) if question["swapped"] else (a, b)
                asked = f"user {row['prompt']} which{question['principle_id'][1:]} (A) {a} (B) {b}"
                turns = [{"role": "user", "content": asked}]
                l_a, l_b = (plain_logprob(causal, tokenizer, turns, option) for option in ("(A)", "(B)"))
                np.testing.assert_allclose(question["logprobs"], [l_a, l_b], atol=3e-4)
                p_a = math.exp(l_a) / (math.exp(l_a) + math.exp(l_b))
                found.append(1 - p_a if question["swapped"] else p_a)
                assert question["p"] == pytest.approx(found[-1], abs=1e-4)
            assert pair["p"] == pytest.approx(sum(found) / 4, abs=1e-4)
            compared += 1
    assert compared > 6


@pytest.mark.real
def test_what_is_dropped_is_counted_and_every_other_pair_is_a_row(whole: dict[str, Any]) -> None:
    rows = [row for row in lines(whole["judgements"]) if row["label"] is None]
    assert [row["prompt"] for row in rows] == PROMPTS
    assert all(len(row["responses"]) == 4 for row in rows)
    dropped = [response["dropped"] for row in rows for response in row["responses"] if response["dropped"]]
    assert whole["answers_dropped"] == {cause: dropped.count(cause) for cause in set(dropped)}
    assert whole["answers_dropped"]["truncated"] > 0, "the tiny model should fail to stop now and then"
    fit = [sum(response["dropped"] is None for response in row["responses"]) for row in rows]
    assert whole["pairs"] == whole["preferences"] == sum(n * (n - 1) // 2 for n in fit) > 0
    assert whole["questions_failed"] == {}
    assert whole["calibration"]["pairs"] == len(KNOWN)
    assert whole["tokens"]["generated"] == sum(each["tokens"] for row in rows for each in row["responses"])


@pytest.mark.real
def test_a_run_that_was_cut_off_goes_on_and_ends_with_the_same_files(
    whole: dict[str, Any], files: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = local(files, model, "cut", labelled=str(files / "labelled.jsonl"), prompts_at_once=4)
    score, calls = Engines.option_logprobs, []

    def stopped(self: Engines, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise StopRequested("interrupted")
        return score(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Engines, "option_logprobs", stopped)
        with pytest.raises(StopRequested):
            judge.run(config)
    journal = files / "runs/cut/judgements.jsonl"
    assert len(lines(journal)) == 4
    journal.write_text(journal.read_text() + '{"prompt_id": 4, "pro')  # as a crash leaves it
    again = judge.run(config)
    for file in ("judgements", "rows"):
        assert Path(again[file]).read_text() == Path(whole[file]).read_text()
    assert {**again, "judgements": "", "rows": ""} == {**whole, "judgements": "", "rows": ""}
    with pytest.raises(ConfigError, match="already holds a run"):
        judge.run(config)


@pytest.mark.real
def test_a_judge_that_does_not_end_its_rationale_has_failed_and_one_that_does_is_heard(
    files: Path, model: str, one_start: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "check_answers", lambda before, block: None)  # most rationales are cut short
    data = {"path": str(files / "answers.jsonl")}
    summary = judge.run(local(files, model, "reasoned", chain_of_thought=True, data=data, generator=None))
    questions = [each for row in lines(summary["judgements"]) for pair in row["pairs"] for each in pair["questions"]]
    heard = [each for each in questions if not each["failed"]]
    assert 0 < len(heard) < len(questions)
    assert sum(summary["questions_failed"].values()) == len(questions) - len(heard)
    for each in questions:
        finished = each["rationale"]["finish"] == "eos" and each["rationale"]["text"] != ""
        assert finished == (each["failed"] is None) == (each["p"] is not None)
    assert all(0.5 <= row["p"] <= 0.6 for row in lines(summary["rows"]))
