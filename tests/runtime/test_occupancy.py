from typing import Any

import pytest

from rlhf_ray.runtime.admission import Terms
from rlhf_ray.runtime.occupancy import Occupancy, trace
from rlhf_ray.runtime.simulation import World, simulate


def row(time: float, event: str, actor: str = "learner", **facts: Any) -> dict[str, Any]:
    return {"time": time, "event": event, "actor": actor, **facts}


EVENTS = [
    row(0, "joined", "rollout 0"),
    row(0, "joined", "rollout 1"),
    row(1, "sent", "rollout 0", groups=[0, 1]),
    row(3, "finished", "rollout 0", groups=[0]),
    row(4, "scored", groups=[0]),
    row(5, "finished", "rollout 0", groups=[1]),
    row(6, "scored", groups=[1]),
    row(6, "training", update=0),
    row(9, "trained", update=0),
    row(9, "publishing", version=1),
    row(9.5, "published", version=1),
]


def test_busy_shares_are_those_of_a_timeline_counted_by_hand() -> None:
    now = 0.0
    occupancy = Occupancy(lambda: now)
    for event in EVENTS:
        occupancy.see(event)
    now = 10.0
    # Engine 0 from 1 to 5 and engine 1 never; scoring from 3 to 4 and from 5 to 6; the learner from 6 to 9.5.
    assert occupancy.finish() == {"busy/rollout": 0.2, "busy/scoring": 0.2, "busy/learner": 0.35}


def test_what_is_under_way_when_an_update_ends_counts_in_both_for_its_part() -> None:
    now = 0.0
    occupancy = Occupancy(lambda: now)
    for event in EVENTS[:4]:
        occupancy.see(event)
    now = 4.0
    assert occupancy.finish() == {"busy/rollout": 3 / 4 / 2, "busy/scoring": 1 / 4, "busy/learner": 0.0}
    for event in EVENTS[4:7]:
        occupancy.see(event)
    now = 6.0
    assert occupancy.finish() == {"busy/rollout": 1 / 2 / 2, "busy/scoring": 1 / 2, "busy/learner": 0.0}


def test_shares_of_a_simulated_run_are_what_its_actors_were_busy() -> None:
    found = simulate(Terms(6, 8, 1), World(engines=3, failures_per_s=0.0), seed=1)
    occupancy = Occupancy(lambda: found.history[-1]["time"])
    occupancy._began = 0.0
    for event in found.history:
        occupancy.see(event)
    shares = occupancy.finish()
    assert shares["busy/rollout"] == pytest.approx(found.engine_busy_s / found.seconds, rel=1e-4)


def test_every_span_of_a_trace_that_begins_ends_on_the_same_row() -> None:
    history = simulate(Terms(3, 5, 1), World(failures_per_s=0.1), seed=2).history
    events = trace(history)["traceEvents"]
    open_spans: dict[tuple[str, int], int] = {}
    for event in events:
        if event["ph"] == "b":
            assert open_spans.setdefault((event["id"], event["pid"]), event["ts"]) == event["ts"]
        elif event["ph"] == "e":
            assert open_spans.pop((event["id"], event["pid"])) <= event["ts"]
    assert open_spans == {}
    rows = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert rows == {"rollout 0", "rollout 1", "reference and reward", "learner"}
