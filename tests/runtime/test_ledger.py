from typing import Any

import pytest

from rlhf_ray.errors import TrainingError
from rlhf_ray.runtime.ledger import Group, Landed, Ledger


@pytest.fixture
def history() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def ledger(history: list[dict[str, Any]]) -> Ledger:
    ticks = iter(range(1000))
    found = Ledger(lambda row: history.append(dict(row)), lambda: float(next(ticks)))
    found.admit([Group(0, 0), Group(1, 0)], version=0)
    return found


def test_a_life_is_written_down_step_by_step(ledger: Ledger, history: list[dict[str, Any]]) -> None:
    ledger.sent([0, 1], engine=3, incarnation=1, version=0)
    ledger.finished([Landed(1, oldest=0, newest=2, tokens=7)], 3, 1)
    ledger.scored([1])
    ledger.train([1], update=2)
    ledger.drop([0], "no signal")
    assert history == [
        {"time": 0.0, "event": "admitted", "actor": "controller", "version": 0, "groups": [0, 1]},
        {"time": 1.0, "event": "sent", "actor": "rollout 3", "incarnation": 1, "version": 0, "groups": [0, 1]},
        {
            "time": 2.0,
            "event": "finished",
            "actor": "rollout 3",
            "incarnation": 1,
            "groups": [1],
            "oldest": [0],
            "newest": [2],
            "tokens": [7],
        },
        {"time": 3.0, "event": "scored", "actor": "reference and reward", "groups": [1]},
        {"time": 4.0, "event": "training", "actor": "learner", "update": 2, "groups": [1]},
        {"time": 5.0, "event": "dropped", "actor": "controller", "groups": [0], "cause": "no signal"},
    ]
    assert ledger.groups == {}


def test_what_an_engine_did_not_finish_waits_to_be_sent_again(ledger: Ledger) -> None:
    ledger.sent([0, 1], 0, 0, version=0)
    ledger.returned([0, 1], "engine lost")
    ledger.sent([1], 2, 0, version=1)
    assert (ledger.groups[1].engine, ledger.groups[1].version) == (2, 1)


def test_steps_that_do_not_follow_each_other_are_refused(ledger: Ledger) -> None:
    with pytest.raises(TrainingError, match="group 0 should be scored to become scored, but it is admitted"):
        ledger.train([0], 0)
    with pytest.raises(TrainingError, match=r"group 7 should be admitted .*, but it is over or was never admitted"):
        ledger.sent([7], 0, 0, 0)
    ledger.sent([0], 0, 0, 0)
    with pytest.raises(TrainingError, match="but it is generating"):
        ledger.sent([0], 0, 0, 0)
    ledger.finished([Landed(0, 0, 0, 1)], 0, 0)
    ledger.scored([0])
    ledger.train([0], 0)
    with pytest.raises(TrainingError, match="over"):
        ledger.train([0], 1)
    with pytest.raises(TrainingError, match="admitted twice"):
        ledger.admit([Group(1, 0)], 0)
