import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import tiny

from rlhf_ray.actors.reward import RewardModel, Rewards, ServerScores, _guarded, checked, imported
from rlhf_ray.config.rewards import RewardSection
from rlhf_ray.errors import RewardError
from tests.test_records import trajectories


class Server:
    """A reward server on loopback that answers what it is told, one reply a request; the last is repeated."""

    def __init__(self) -> None:
        self.replies: list[tuple[int, str]] = []
        self.requests: list[dict] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.requests.append(json.loads(body))
                status, text = outer.replies.pop(0) if len(outer.replies) > 1 else outer.replies[0]
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_server_scores_arrive_in_order(server: Server) -> None:
    server.replies = [(200, '{"scores": [1.5, -2]}')]
    assert ServerScores(server.url, 5)(["p", "q"], ["a", "b"]) == [1.5, -2]
    assert server.requests == [{"prompts": ["p", "q"], "responses": ["a", "b"]}]


def test_what_may_pass_is_tried_again(server: Server) -> None:
    server.replies = [(503, "busy"), (429, "slow down"), (200, '{"scores": [3]}')]
    assert ServerScores(server.url, 10)(["p"], ["a"]) == [3]
    assert len(server.requests) == 3


def test_a_server_that_stays_broken_ends_at_the_deadline_with_its_last_word(server: Server) -> None:
    server.replies = [(500, "broken")]
    with pytest.raises(RewardError, match=r"no scores in 0.5 s and \d tries; the last: HTTP 500"):
        ServerScores(server.url, 0.5)(["p"], ["a"])


def test_nobody_at_the_address_is_an_error_not_a_value() -> None:
    with pytest.raises(RewardError, match="ConnectError"):
        ServerScores("http://127.0.0.1:9/", 0.3)(["p"], ["a"])


def test_a_refusal_is_not_tried_again(server: Server) -> None:
    server.replies = [(400, "no such model")]
    with pytest.raises(RewardError, match="HTTP 400: no such model"):
        ServerScores(server.url, 5)(["p"], ["a"])
    assert len(server.requests) == 1


@pytest.mark.parametrize("text", ["scores", "[1]", '{"score": [1]}'])
def test_a_reply_of_another_shape_says_what_was_expected(server: Server, text: str) -> None:
    server.replies = [(200, text)]
    with pytest.raises(RewardError, match=r'expected \{"scores"'):
        ServerScores(server.url, 5)(["p"], ["a"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_named_by_its_place(value: float) -> None:
    with pytest.raises(RewardError, match=r"score 1 of 2 is (nan|inf)"):
        checked([0.0, value], 2, "f")


def test_a_wrong_number_of_scores_gives_both_numbers() -> None:
    with pytest.raises(RewardError, match="expected 3 scores, one for each answer, got 2"):
        checked([1, 2], 3, "f")
    with pytest.raises(RewardError, match="expected a list of 1 numbers, got None"):
        checked(None, 1, "f")


def test_scores_of_any_numeric_kind_become_float32() -> None:
    assert checked(np.array([1, 2]), 2, "f").dtype == np.float32


def test_a_function_that_raises_is_named_with_what_it_raised() -> None:
    def broken(prompts: list[str], responses: list[str]) -> list[float]:
        raise KeyError("weather")

    with pytest.raises(RewardError, match="f raised KeyError: 'weather'"):
        _guarded(broken, "f", 5)(["p"], ["a"])


def test_a_function_that_hangs_ends_at_the_deadline() -> None:
    release = threading.Event()
    with pytest.raises(RewardError, match=r"no scores within 0.1 s for 1 answers"):
        _guarded(lambda prompts, responses: [float(release.wait(5))], "f", 0.1)(["p"], ["a"])
    release.set()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("json.loads", "expected package.module:name"),
        ("no_such_package:f", "cannot import 'no_such_package'"),
        ("json:no_such", "module 'json' has no 'no_such'"),
        ("json:__name__", "is not callable"),
    ],
)
def test_an_import_path_that_leads_nowhere_says_where_it_ends(path: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        imported(path)


# Several rewards

ANSWERS = trajectories([[7, 8], [9]], [(0, [10, 11, 1]), (1, [12, 1]), (0, [13])])


def letters(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response.replace(" ", ""))) for response in responses]


def nothing(prompts: list[str], responses: list[str]) -> list[float]:
    return [math.nan for _ in responses]


@pytest.fixture(scope="module")
def members(reward_model: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [reward_model, tiny.write_reward_model(tmp_path_factory.mktemp("member"), seed=5)]


def rewards(policy: str, **reward: Any) -> Rewards:
    return Rewards(RewardSection.model_validate(reward), 64, "cpu", policy, False)


def test_rewards_add_up_by_their_weights_and_their_own_scores_and_disagreement_travel_along(
    policy: str, members: list[str]
) -> None:
    parts = {
        "good": {"ensemble": {"models": members, "combine": {"name": "uncertainty", "coefficient": 0.5}}, "weight": 2},
        "brief": {"function": f"{__name__}:letters", "weight": -0.25},
        "plain": {"model": members[0], "weight": 0},
    }
    table = rewards(policy, parts=parts).scores(ANSWERS)
    first, second = (RewardModel(path, 64, "cpu", False).scores(ANSWERS).astype(np.float64) for path in members)
    good = (first + second) / 2 - 0.5 * (first - second) ** 2 / 4
    brief = [2.0, 1.0, 1.0]  # the end of a sequence is no letter
    assert table.dtype == np.float32 and table.shape == (3, 5)
    expected = [2 * good - 0.25 * np.array(brief), good, brief, first, abs(first - second) / 2]
    np.testing.assert_allclose(table, np.stack(expected, 1), atol=1e-5)


@pytest.mark.parametrize(("combine", "width"), [("mean", 2), ("worst", 2), ("weights", 1)])
def test_an_ensemble_alone_is_one_score_and_its_disagreement_unless_its_weights_were_averaged(
    policy: str, members: list[str], combine: str, width: int
) -> None:
    table = rewards(policy, ensemble={"models": members, "combine": combine}).scores(ANSWERS)
    assert table.shape == (3, width)
    first, second = (RewardModel(path, 64, "cpu", False).scores(ANSWERS) for path in members)
    if combine != "weights":
        expected = np.minimum(first, second) if combine == "worst" else (first + second) / 2
        np.testing.assert_allclose(table[:, 0], expected, atol=1e-5)


def test_a_part_that_fails_is_an_error_whatever_its_weight(policy: str, reward_model: str) -> None:
    parts = {"plain": {"model": reward_model}, "broken": {"function": f"{__name__}:nothing", "weight": 0}}
    with pytest.raises(RewardError, match=r"reward.function .*:nothing: score 0 of 3 is nan"):
        rewards(policy, parts=parts).scores(ANSWERS)
