import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.errors import DataError
from rlhf_ray.runtime.admission import Terms
from rlhf_ray.runtime.audit import audit, read
from rlhf_ray.runtime.simulation import World, simulate


@pytest.fixture
def history() -> list[dict[str, Any]]:
    world = World(engines=2, failures_per_s=0.1, dull_share=0.1, learn_s=0.5)
    return simulate(Terms(4, 5, max_staleness=2, max_refills=2), world, seed=0).history


def first(history: list[dict[str, Any]], event: str, last: bool = False) -> int:
    places = [place for place, row in enumerate(history) if row["event"] == event]
    return places[-1 if last else 0]


def test_a_sound_history_is_said_to_be_one(history: list[dict[str, Any]]) -> None:
    verdict = audit(history)
    assert verdict.good and verdict.complete and verdict.trained == 20 and verdict.updates == 4
    assert "verdict: every sample is accounted for; the run is complete" in str(verdict)


def lose_a_finished_group(history: list[dict[str, Any]]) -> None:
    history[first(history, "finished")].update(groups=[], oldest=[], newest=[])


def train_twice(history: list[dict[str, Any]]) -> None:
    one, other = first(history, "training"), first(history, "training", last=True)
    history[other]["groups"] = [history[one]["groups"][0], *history[other]["groups"][1:]]


def train_too_many(history: list[dict[str, Any]]) -> None:
    history[0]["groups_per_update"] = 4


def grow_old(history: list[dict[str, Any]]) -> None:
    history[0]["max_staleness"] = 0


def forget_an_update(history: list[dict[str, Any]]) -> None:
    del history[first(history, "training")]


def publish_half_an_update(history: list[dict[str, Any]]) -> None:
    del history[first(history, "trained")]


def train_before_publication(history: list[dict[str, Any]]) -> None:
    place = first(history, "published", last=True)
    history[place - 1], history[place] = history[place], history[place - 1]
    history[first(history, "training", last=True)]["update"] = 9


def skip_a_prompt(history: list[dict[str, Any]]) -> None:
    history[first(history, "admitted")]["groups"][0] += 100


def serve_old_weights(history: list[dict[str, Any]]) -> None:
    history[first(history, "finished", last=True)]["oldest"][0] = -1


def serve_weights_that_do_not_exist(history: list[dict[str, Any]]) -> None:
    history[first(history, "finished")]["newest"][0] = 99


def come_from_the_dead(history: list[dict[str, Any]]) -> None:
    history[first(history, "finished")]["incarnation"] = 77


def publish_out_of_order(history: list[dict[str, Any]]) -> None:
    history[first(history, "publishing")]["version"] = 3


def lose_the_beginning(history: list[dict[str, Any]]) -> None:
    del history[0]


def say_what_is_unknown(history: list[dict[str, Any]]) -> None:
    history[5]["event"] = "vanished"


FAULTS = [
    (lose_a_finished_group, "group .*: scored, but it is generating"),
    (train_twice, "group .*: training, but it is trained in update 0"),
    (train_too_many, "trains 5 groups"),
    (grow_old, "updates old, at most 0 were agreed"),
    (publish_half_an_update, "published while an update is under way"),
    (forget_an_update, "update 1 where 0 was next"),
    (train_before_publication, "update 9 where 3 was next"),
    (skip_a_prompt, "was admitted where 0 was next"),
    (serve_old_weights, "has tokens of weights -1"),
    (serve_weights_that_do_not_exist, "to 99"),
    (come_from_the_dead, r"\(77\) does not serve"),
    (publish_out_of_order, "weights 3 follow weights 0"),
    (lose_the_beginning, "does not begin with its terms"),
    (say_what_is_unknown, "unknown event 'vanished'"),
]


@pytest.mark.parametrize(("harm", "said"), FAULTS, ids=[harm.__name__ for harm, _ in FAULTS])
def test_what_must_never_happen_is_seen(history: list[dict[str, Any]], harm: Any, said: str) -> None:
    import re

    harm(history)
    verdict = audit(history)
    assert not verdict.good
    assert any(re.search(said, fault) for fault in verdict.faults), verdict
    assert "not one of a sound run" in str(verdict)


def test_a_run_that_was_cut_off_is_sound_and_says_so(history: list[dict[str, Any]]) -> None:
    verdict = audit(history[: first(history, "training", last=True)])
    assert verdict.good and not verdict.complete and verdict.under_way > 0
    assert "under way when the history ends" in str(verdict) and "did not reach its end" in str(verdict)


def test_groups_that_a_complete_run_says_nothing_of_are_lost(history: list[dict[str, Any]]) -> None:
    last = history[first(history, "training", last=True)]
    last["groups"] = last["groups"][1:]
    assert any("1 groups were lost without a word" in fault for fault in audit(history).faults)


def test_a_history_is_read_from_a_run_s_folder_and_a_last_line_that_was_cut_off_is_left_out(
    tmp_path: Path, history: list[dict[str, Any]]
) -> None:
    lines = [json.dumps(row) for row in history]
    (tmp_path / "history.jsonl").write_text("\n".join(lines) + '\n{"time": 1, "ev')
    assert read(tmp_path) == history
    (tmp_path / "history.jsonl").write_text("\n".join([lines[0], "{", *lines[1:]]))
    with pytest.raises(DataError, match="line 2: not JSON"):
        read(tmp_path)
    with pytest.raises(DataError, match="no history can be read"):
        read(tmp_path / "nowhere")


@pytest.fixture
def resumed() -> list[dict[str, Any]]:
    """Killed in update 3, after which a second process goes on from the checkpoint after update 2."""
    return simulate(Terms(5, 4, max_staleness=1), World(), seed=0, kills=[(2, 3)]).history


def test_what_came_after_a_checkpoint_has_not_been_when_a_run_goes_on_from_it(resumed: list[dict[str, Any]]) -> None:
    verdict = audit(resumed)
    assert verdict.good and verdict.trained == verdict.admitted == 20 and verdict.updates == 5
    trainings = [row["update"] for row in resumed if row["event"] == "training"]
    assert trainings == [0, 1, 2, 3, 2, 3, 4]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda row: row["groups"].append(0), "group 0 is to be trained again, but it is trained in update 0"),
        (lambda row: row["groups"].pop(0), "1 groups were forgotten, group 8 among them"),
        (lambda row: row.update(update=7), "goes on before update 7, and only 4 were trained"),
    ],
    ids=["trained twice", "forgotten", "not yet trained"],
)
def test_a_run_that_goes_on_from_something_else_is_caught(resumed: list[dict[str, Any]], harm: Any, said: str) -> None:
    harm(resumed[first(resumed, "resumed")])
    assert any(said in fault for fault in audit(resumed).faults), audit(resumed)
