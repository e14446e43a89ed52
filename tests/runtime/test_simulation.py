"""The real controller in thousands of seeded worlds, each history judged by the audit.

A seed that fails plays again exactly: `played(seed)`.
"""

from typing import Any

import numpy as np
import pytest

from rlhf_ray.errors import DeadlineError, PublicationError, RLHFError
from rlhf_ray.runtime import controller as controllers
from rlhf_ray.runtime.admission import Admission, Terms
from rlhf_ray.runtime.audit import audit
from rlhf_ray.runtime.controller import Controller, Finished, Joined, Lost, Scored
from rlhf_ray.runtime.ledger import Landed, Ledger
from rlhf_ray.runtime.simulation import Outcome, SimulatedFleet, World, simulate

SEEDS = 10_000
MODES = ("keep", "wait", "abort")


def told(seed: int) -> tuple[Terms, World, Any]:
    """What a seed stands for."""
    random = np.random.default_rng(seed)
    refills = int(random.integers(0, 3))
    terms = Terms(
        updates=int(random.integers(1, 6)),
        groups_per_update=int(random.integers(1, 7)),
        max_staleness=int(random.integers(0, 5)),
        max_refills=refills,
    )
    world = World(
        engines=int(random.integers(1, 4)),
        kv_tokens=float(random.choice([150, 1000, 1e9])),
        learn_s=float(random.choice([0.1, 1.0, 5.0])),
        score_s=float(random.choice([0.01, 0.1, 2.0])),
        publish_s=float(random.choice([0.02, 2.0])),
        failures_per_s=float(random.choice([0.0, 0.02, 0.3])),
        restart_s=float(random.choice([0.5, 5.0])),
        late_share=float(random.choice([0.0, 0.5])),
        dull_share=0.2 if refills else 0.0,
    )
    return terms, world, MODES[seed % 3]


def played(seed: int) -> Outcome:
    terms, world, mode = told(seed)
    return simulate(terms, world, seed, mode)


def test_no_schedule_of_thousands_loses_a_sample_trains_it_twice_or_lets_it_grow_too_old() -> None:
    kinds: set[str] = set()
    for seed in range(SEEDS):
        terms, _, _ = told(seed)
        found = played(seed)
        verdict = audit(found.history)
        assert verdict.good and verdict.complete, f"seed {seed}: {verdict}"
        assert verdict.trained + sum(verdict.dropped.values()) == verdict.admitted, f"seed {seed}"
        assert max(verdict.staleness, default=0) <= terms.max_staleness
        kinds |= {row["event"] for row in found.history}
    everything = (
        "began joined admitted sent returned finished scored dropped training trained publishing published lost ended"
    )
    assert kinds == set(everything.split())


def test_a_run_that_is_killed_again_and_again_loses_nothing_and_trains_nothing_twice() -> None:
    resumed = 0
    for seed in range(2000):
        terms, world, mode = told(seed)
        random = np.random.default_rng([seed, 1])
        kills: list[tuple[int, int]] = []
        newest = 0
        for _ in range(int(random.integers(1, 4))):
            killed = int(random.integers(newest, terms.updates))
            newest = int(random.integers(max(1, newest), killed + 1)) if killed else 0
            if newest:
                kills.append((newest, killed))
        verdict = audit(simulate(terms, world, seed, mode, kills=kills).history)
        assert verdict.good and verdict.complete, f"seed {seed}, {kills}: {verdict}"
        assert max(verdict.staleness, default=0) <= terms.max_staleness
        assert verdict.trained + sum(verdict.dropped.values()) == verdict.admitted
        resumed += len(kills)
    assert resumed > 1000


def test_a_seed_plays_again_exactly() -> None:
    assert all(played(seed).history == played(seed).history for seed in range(0, 300, 7))


def test_without_staleness_nothing_is_generated_while_the_learner_trains() -> None:
    history = simulate(Terms(4, 6), World(), seed=1).history
    training = False
    for row in history:
        if row["event"] in ("training", "publishing"):
            training = True
        elif row["event"] == "published":
            training = False
        elif row["event"] in ("sent", "finished"):
            assert not training
    assert audit(history).staleness == {0: 24}


def test_with_staleness_the_learner_does_not_wait_for_stragglers() -> None:
    """The same world: lognormal lengths, a learner as slow as half of generation."""
    world = World(engines=4, learn_s=3.0, kv_tokens=4000)
    plain, overlapped = (simulate(Terms(20, 32, bound), world, seed=0) for bound in (0, 1))
    assert overlapped.seconds < plain.seconds / 1.4


@pytest.mark.parametrize(
    ("mode", "mixed", "begun_anew"), [("keep", True, False), ("wait", False, False), ("abort", False, True)]
)
def test_answers_under_way_at_a_publication_fare_as_configured(mode: Any, mixed: bool, begun_anew: bool) -> None:
    history = simulate(Terms(6, 8, 2), World(learn_s=0.3), seed=3, in_flight=mode).history
    finished = [row for row in history if row["event"] == "finished"]
    assert any(row["oldest"] != row["newest"] for row in finished) == mixed
    assert any(row["event"] == "returned" for row in history) == begun_anew
    assert audit(history).good


def test_engines_are_given_what_they_have_room_for_and_no_more() -> None:
    history = simulate(Terms(2, 40), World(engines=2, kv_tokens=1000, answer_tokens=100, sigma=0.1), seed=0).history
    under_way: dict[str, set[int]] = {"rollout 0": set(), "rollout 1": set()}
    most = 0
    for row in history:
        if row["event"] == "sent":
            under_way[row["actor"]] |= set(row["groups"])
        elif row["event"] == "finished":
            under_way[row["actor"]] -= set(row["groups"])
        most = max(most, *map(len, under_way.values()))
    # Ten of 100 tokens fill 1,000; at first an answer is taken for 400 tokens long, and two are sent.
    first = next(row for row in history if row["event"] == "sent")
    assert len(first["groups"]) == 2
    assert 2 < most <= 9


# The audit sees what it is for: the controller is broken on purpose, or told of what must not be.


def test_a_controller_that_ignores_deadlines_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_come(self: Admission, update: int) -> list[int] | None:
        everything = sorted(number for some in self.ready.values() for number in some)
        if len(everything) < self.terms.groups_per_update:
            return None
        chosen = everything[-self.terms.groups_per_update :]
        self.ready = {deadline: some - set(chosen) for deadline, some in self.ready.items()}
        return chosen

    monkeypatch.setattr(Admission, "take", first_come)
    with pytest.raises(Exception, match="would train on tokens"):
        for seed in range(20):
            simulate(Terms(6, 3, 1), World(sigma=2.0), seed)


def test_a_controller_that_takes_answers_of_a_dead_engine_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def anybody(self: Controller, numbers: Any, engine: int, incarnation: int) -> set[int]:
        return {number for number in numbers if self._state(number) == controllers.State.GENERATING}

    monkeypatch.setattr(Controller, "_still_at", anybody)
    faults = []
    for seed in range(60):
        world = World(engines=3, failures_per_s=0.3, late_share=1.0, restart_s=2.0)
        try:
            faults += audit(simulate(Terms(4, 5), world, seed).history).faults
        except (RLHFError, KeyError) as error:
            faults.append(str(error))
    assert faults


def test_an_engine_that_serves_weights_of_before_is_refused() -> None:
    fleet = SimulatedFleet(World(engines=1), seed=0)
    controller = Controller(Terms(1, 1), fleet, Ledger(lambda row: None), lambda _: (1, 1), longest=10, version=5)
    controller._handle(Joined(0, 0, 100.0))
    controller._dispatch()
    with pytest.raises(PublicationError, match="sent group 0 with weights 5 published, and sampled it with weights 4"):
        controller._handle(Finished(0, 0, [Landed(0, 4, 5, 1)], object()))


def test_scores_of_a_chunk_that_was_not_taken_are_not_taken_either() -> None:
    fleet = SimulatedFleet(World(engines=1), seed=0)
    controller = Controller(Terms(1, 1), fleet, Ledger(lambda row: None), lambda _: (1, 1), longest=10)
    controller._handle(Joined(0, 0, 100.0))
    controller._dispatch()
    chunk, stranger = object(), object()
    controller._handle(Finished(0, 0, [Landed(0, 0, 0, 1)], chunk))
    controller._handle(Scored([0], stranger))
    assert controller.admission.take(0) is None
    controller._handle(Scored([0], chunk))
    assert controller.admission.take(0) == [0]


def test_what_a_dead_engine_had_goes_to_the_next_with_room_before_anything_else() -> None:
    sent: list[tuple[int, list[int]]] = []

    class Listening(SimulatedFleet):
        def generate(self, engine: int, groups: Any) -> None:
            sent.append((engine, list(groups)))

    fleet = Listening(World(engines=2), seed=0)
    controller = Controller(Terms(1, 4), fleet, Ledger(lambda row: None), lambda _: (0, 1), longest=10)
    controller._handle(Joined(0, 0, 20.0))
    controller._dispatch()
    assert sent == [(0, [0, 1])]
    controller._handle(Lost(0, 7, "news of another life"))
    controller._handle(Lost(0, 0, "gone"))
    controller._handle(Joined(1, 0, 20.0))
    controller._dispatch()
    assert sent == [(0, [0, 1]), (1, [0, 1])]
    controller._handle(Lost(1, 9, "news of another life"))
    assert controller.generating


def test_a_world_in_which_nothing_happens_any_more_is_an_error_and_no_endless_wait() -> None:
    with pytest.raises(DeadlineError):
        simulate(Terms(1, 1), World(engines=0), seed=0)
