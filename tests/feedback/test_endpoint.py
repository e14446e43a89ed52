import math
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from chat_server import ChatServer, Said, choice, serving, text

from rlhf_ray import interrupts
from rlhf_ray.config.feedback import EndpointJudge
from rlhf_ray.errors import ConfigError, JudgeError, StopRequested
from rlhf_ray.feedback import endpoint
from rlhf_ray.feedback.endpoint import KEY, Endpoint, Pace, read_choice, seconds_asked_for
from rlhf_ray.feedback.judging import Reply

SECRET = "sk-very-secret-key"
TURNS = [{"role": "user", "content": "which?"}]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setenv(KEY, SECRET)
    with serving() as running:
        yield running


def judge_of(server: ChatServer, **changes: Any) -> Endpoint:
    settings = {"model": "m", "base_url": server.url, "requests_per_minute": 60000, "retry_for_s": 5, "timeout_s": 5}
    return Endpoint(EndpointJudge.model_validate(settings | changes), seed=3)


def asked(judge: Endpoint) -> Reply:
    [reply] = judge.choices([TURNS])
    return reply


# What is asked and what is read


def test_a_choice_is_asked_for_with_log_probabilities_and_the_key_in_the_header_alone(server: ChatServer) -> None:
    server.replies = [choice({"A": 0.6, "B": 0.3})]
    reply = asked(judge_of(server))
    assert reply == Reply(
        logprobs=(pytest.approx(math.log(0.6)), pytest.approx(math.log(0.3))), tokens_in=10, tokens_out=1
    )
    assert server.requests == [
        {
            "path": "/v1/chat/completions",
            "model": "m",
            "messages": TURNS,
            "logprobs": True,
            "top_logprobs": 20,
            "max_tokens": 3,
            "temperature": 0.0,
        }
    ]
    assert server.headers[0]["authorization"] == f"Bearer {SECRET}"


def test_without_a_key_none_is_sent(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY)
    server.replies = [choice({"A": 0.6, "B": 0.3})]
    assert asked(judge_of(server)).logprobs
    assert "authorization" not in server.headers[0]


@pytest.mark.parametrize(
    ("places", "a", "b"),
    [
        ([{"(A)": 0.5, "(B)": 0.25}], 0.5, 0.25),
        ([{" A": 0.5, "B": 0.2, "(B": 0.1, "a": 0.05, "Answer": 0.05}], 0.5, 0.3),  # all spellings, and no others
        ([{"(": 0.8, "A": 0.1}, {"B": 0.75, "A": 0.25}, {")": 1.0}], 0.2, 0.6),  # after a bracket, which costs 0.8
        ([{" **": 0.5}, {"(A": 0.5, "(B": 0.5}], 0.25, 0.25),
    ],
)
def test_letters_are_read_with_and_without_marks(places: list[dict[str, float]], a: float, b: float) -> None:
    found = read_choice(choice(*places).body).logprobs
    assert found is not None
    assert [math.exp(value) for value in found] == pytest.approx([a, b])


def test_a_sampled_token_that_is_not_listed_counts_once() -> None:
    body = choice({"B": 0.4, "A": 0.3}).body
    token = body["choices"][0]["logprobs"]["content"][0]
    token["top_logprobs"] = [each for each in token["top_logprobs"] if each["token"] == "A"]
    found = read_choice(body).logprobs
    assert found == (pytest.approx(math.log(0.3)), pytest.approx(math.log(0.4)))


@pytest.mark.parametrize(
    ("places", "cause"),
    [
        ([{"A": 0.9, "I": 0.1}], r"option missing: \(B\) not among the likeliest tokens 'A', 'I', ..."),
        ([{"Well": 0.9}, {"A": 0.5, "B": 0.5}], r"option missing: \(A\) and \(B\)"),  # the letters come too late
        ([{"(": 0.9}], "option missing: the reply has no word"),
        ([], "option missing: the reply has no word"),
    ],
)
def test_an_option_that_is_missing_is_no_answer_and_its_tokens_are_paid_for(
    server: ChatServer, places: list[dict[str, float]], cause: str
) -> None:
    server.replies = [choice(*places)]
    reply = asked(judge_of(server))
    assert reply.logprobs is None
    assert re.match(cause, reply.failed or "")
    assert (reply.tokens_in, reply.tokens_out) == (10, 1)


def test_an_option_of_no_probability_at_all_is_missing() -> None:
    body = choice({"A": 1.0}).body
    body["choices"][0]["logprobs"]["content"][0]["top_logprobs"].append({"token": "B", "logprob": -9999.0})
    assert re.match(r"option missing: \(B\)", read_choice(body).failed or "")


@pytest.mark.parametrize(
    "body",
    [
        "no JSON",
        {},
        [],
        {"choices": []},
        {"choices": [{"logprobs": None}], "usage": {}},
        {"choices": [{"logprobs": None}], "usage": {"prompt_tokens": 1, "completion_tokens": 1}},
    ],
)
def test_a_reply_of_another_shape_is_no_answer(server: ChatServer, body: Any) -> None:
    server.replies = [Said(body)]
    reply = asked(judge_of(server))
    assert (reply.failed or "").startswith("unexpected reply: ")
    assert len(server.requests) == 1


def test_a_rationale_brings_its_tokens_and_log_probability(server: ChatServer) -> None:
    server.replies = [text("the first is kinder ")]
    [reply] = judge_of(server, max_new_tokens=50).rationales([TURNS], [7])
    assert reply.said is not None
    assert (reply.said.text, reply.said.tokens, reply.said.logprob) == ("the first is kinder", 5, -4.0)
    assert reply.said.fault is None
    [request] = server.requests
    assert (request["max_tokens"], request["temperature"], request["seed"]) == (50, 1.0, 10)
    assert "top_logprobs" not in request


@pytest.mark.parametrize(
    ("finish", "cause"), [("length", "truncated at 5 tokens"), ("content_filter", "rationale not")]
)
def test_a_rationale_that_is_not_whole_says_so(server: ChatServer, finish: str, cause: str) -> None:
    server.replies = [text("the first", finish)]
    [reply] = judge_of(server).rationales([TURNS], [0])
    assert (reply.failed or (reply.said and reply.said.fault) or "").startswith(cause)
    assert (reply.tokens_in, reply.tokens_out) == (10, 5)


def test_replies_come_in_the_order_of_the_questions(server: ChatServer) -> None:
    def reply(request: dict[str, Any]) -> Said:
        number = int(request["messages"][0]["content"])
        said = choice({"A": (number + 1) / 100, "B": 0.5})
        said.after_s = 0.05 if number % 3 == 0 else 0
        return said

    server.reply = reply
    replies = judge_of(server).choices([[{"role": "user", "content": str(n)}] for n in range(40)])
    assert [math.exp(each.logprobs[0]) for each in replies if each.logprobs] == pytest.approx(
        [(n + 1) / 100 for n in range(40)]
    )


# What goes wrong


def test_what_may_pass_is_tried_again(server: ChatServer) -> None:
    server.replies = [Said("oh", 500), Said("busy", 503), choice({"A": 0.5, "B": 0.5})]
    assert asked(judge_of(server)).logprobs
    assert len(server.requests) == 3


def test_a_busy_server_is_given_the_time_that_it_asks_for(server: ChatServer) -> None:
    server.replies = [Said("slow down", 429, {"Retry-After": "1"}), choice({"A": 0.5, "B": 0.5})]
    assert asked(judge_of(server)).logprobs
    assert server.times[1] - server.times[0] >= 1.0


def test_a_server_that_asks_for_more_time_than_there_is_has_failed_and_holds_up_nobody(server: ChatServer) -> None:
    server.replies = [Said("come tomorrow", 429, {"Retry-After": "86400"}), choice({"A": 0.5, "B": 0.5})]
    judge = judge_of(server, concurrency=1)
    began = time.monotonic()
    first, second = judge.choices([TURNS, TURNS])
    assert (first.failed or "").startswith("request failed: HTTP 429: come tomorrow (1 tries in 5 s)")
    assert second.logprobs
    assert time.monotonic() - began < 4


def test_a_time_out_is_tried_again(server: ChatServer) -> None:
    late = choice({"A": 0.1, "B": 0.9})
    late.after_s = 1.0
    server.replies = [late, choice({"A": 0.5, "B": 0.5})]
    reply = asked(judge_of(server, timeout_s=0.2))
    assert reply.logprobs and reply.logprobs[0] == pytest.approx(math.log(0.5))


def test_pauses_grow_until_the_time_for_it_is_over(server: ChatServer) -> None:
    server.replies = [Said("broken", 500)]
    began = time.monotonic()
    reply = asked(judge_of(server, retry_for_s=0.5))
    assert time.monotonic() - began < 2
    assert re.fullmatch(r"request failed: HTTP 500: broken \(\d tries in 0.5 s\)", reply.failed or "")
    pauses = [later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False)]
    assert 3 <= len(pauses) <= 5  # 0.01, 0.02, 0.04 ... 0.16 s
    assert all(pause >= 0.01 * 2**n for n, pause in enumerate(pauses))


def test_nobody_there_is_a_failure_that_says_so(server: ChatServer) -> None:
    reply = asked(judge_of(server, base_url="http://127.0.0.1:9/v1", retry_for_s=0.1))
    assert (reply.failed or "").startswith("request failed: ConnectError")


def test_a_refused_request_is_not_tried_again(server: ChatServer) -> None:
    server.replies = [Said("context too long", 400)]
    assert asked(judge_of(server)).failed == "refused: HTTP 400: context too long"
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_the_run_at_once_and_is_not_shown(server: ChatServer, status: int) -> None:
    server.replies = [Said(f"bad key {SECRET}", status)]
    with pytest.raises(ConfigError, match=rf"variable {KEY}, is refused: HTTP {status}: bad key <redacted>"):
        judge_of(server, concurrency=1).choices([TURNS] * 50)
    assert len(server.requests) == 1


def test_a_missing_key_is_named(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY)
    server.replies = [Said("who are you?", 401)]
    with pytest.raises(ConfigError, match=f"{KEY}, is not set"):
        asked(judge_of(server))


@pytest.mark.parametrize("said", [Said("nothing here", 404), Said('{"error": {"code": "model_not_found"}}', 400)])
def test_an_unknown_model_ends_the_run_at_once(server: ChatServer, said: Said) -> None:
    server.replies = [said]
    with pytest.raises(ConfigError, match=r"judge http://127.0.0.1:\d+/v1/chat/completions: no model 'm' there"):
        asked(judge_of(server))


def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, SECRET + "\n")
    with pytest.raises(ConfigError) as refused:
        judge_of(server)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("url", ["http://", "https://[::1"])
def test_an_address_that_is_none_is_refused(server: ChatServer, url: str) -> None:
    with pytest.raises(ConfigError, match="expected something like https://host/v1"):
        judge_of(server, base_url=url)


def test_a_failure_that_shows_the_key_is_masked(server: ChatServer) -> None:
    server.replies = [Said(f"we got {SECRET}", 400)]
    assert asked(judge_of(server)).failed == "refused: HTTP 400: we got <redacted>"


def test_a_server_on_which_everything_fails_is_not_asked_for_ever(server: ChatServer) -> None:
    server.replies = [Said("no", 400)]
    with pytest.raises(JudgeError, match=r"2\d requests in a row failed; the last: refused: HTTP 400: no"):
        judge_of(server).choices([TURNS] * 1000)
    assert len(server.requests) <= 30


def test_some_failures_among_answers_end_nothing(server: ChatServer) -> None:
    server.replies = [*[Said("no", 400), Said("no", 400), choice({"A": 0.5, "B": 0.5})] * 20]
    replies = judge_of(server, concurrency=1).choices([TURNS] * 60)
    assert sum(reply.failed is not None for reply in replies) == 40


def test_a_stop_is_seen_while_the_server_is_waited_for(server: ChatServer) -> None:
    slow = choice({"A": 0.5, "B": 0.5})
    slow.after_s = 3
    server.replies = [slow]
    began = time.monotonic()
    with interrupts.stoppable(), pytest.raises(StopRequested):
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        asked(judge_of(server))
    assert time.monotonic() - began < 2


# How fast


def test_slots_lie_a_gap_apart_and_none_is_saved_up() -> None:
    pace = Pace(per_minute=120)  # every half second
    assert [pace.slot(10.0), pace.slot(10.0), pace.slot(10.2)] == pytest.approx([0, 0.5, 0.8])
    assert [pace.slot(20.0), pace.slot(20.0)] == pytest.approx([0, 0.5])
    pace.hold(30.0)
    assert [pace.slot(21.0), pace.slot(21.0)] == pytest.approx([9, 9.5])


def test_requests_go_no_faster_than_allowed_however_many_run_at_a_time(server: ChatServer) -> None:
    server.replies = [choice({"A": 0.5, "B": 0.5})]
    judge_of(server, requests_per_minute=1200, concurrency=8).choices([TURNS] * 11)
    assert server.times[-1] - server.times[0] >= 0.45  # ten gaps of 50 ms, less what a thread may start late


def test_no_more_requests_run_at_a_time_than_allowed(server: ChatServer) -> None:
    running, most = 0, 0
    lock = threading.Lock()

    def reply(request: dict[str, Any]) -> Said:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return choice({"A": 0.5, "B": 0.5})

    server.reply = reply
    judge_of(server, concurrency=3).choices([TURNS] * 30)
    assert 2 <= most <= 3


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0),
        ("7", 7),
        ("1.5", 1.5),
        ("-3", 0),
        ("soon", 0),
        ("Thu, 01 Jan 1970 00:16:50 GMT", 10),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
    ],
)
def test_a_retry_after_header_holds_seconds_or_a_date(header: str | None, seconds: float) -> None:
    assert seconds_asked_for(header, now_s=1000.0) == seconds
