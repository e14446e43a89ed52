from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.runtime.pools import LeastLoaded, Router


def test_work_goes_to_the_least_loaded_and_ties_to_the_first() -> None:
    pool = LeastLoaded(3)
    assert [pool.assign(work) for work in (5, 3, 4, 1, 1)] == [0, 1, 2, 1, 1]
    pool.release(0, 5)
    assert pool.assign(1) == 0


@given(st.integers(1, 8), st.lists(st.floats(0.1, 100), max_size=60))
def test_no_worker_is_ahead_of_another_by_more_than_one_piece(workers: int, pieces: list[float]) -> None:
    pool = LeastLoaded(workers)
    for piece in pieces:
        pool.assign(piece)
    assert max(pool.load) - min(pool.load) <= max(pieces, default=0) + 1e-9


def test_the_least_full_worker_gets_the_next_piece_in_proportion_to_its_room() -> None:
    router = Router()
    router.add(0, room=100)
    router.add(1, room=200)
    assert [router.place(50) for _ in range(6)] == [0, 1, 1, 0, 1, 1]
    assert router.place(50) is None
    router.release(0, 50)
    assert router.place(50) == 0


def test_a_worker_without_work_takes_a_piece_of_any_size() -> None:
    router = Router()
    router.add(3, room=10)
    assert router.place(1000) == 3
    assert router.place(1) is None


def test_a_worker_that_went_gets_nothing_and_comes_back_empty() -> None:
    router = Router()
    router.add(0, room=10)
    router.add(1, room=10)
    router.place(5)
    router.remove(0)
    assert [router.place(4), router.place(4), router.place(4)] == [1, 1, None]
    router.add(0, room=10)
    assert router.place(10) == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=200))
def test_the_router_is_as_good_as_looking_at_every_worker(steps: list[tuple[bool, int]]) -> None:
    router, rooms = Router(), [50.0, 80.0, 120.0]
    load = [0.0, 0.0, 0.0]
    under_way: list[tuple[int, int]] = []
    for number, room in enumerate(rooms):
        router.add(number, room)
    for begins, work in steps:
        if begins:
            best = min(range(3), key=lambda worker: (load[worker] / rooms[worker], worker))
            expected = best if not load[best] or load[best] + work <= rooms[best] else None
            assert router.place(work) == expected
            if expected is not None:
                load[expected] += work
                under_way.append((expected, work))
        elif under_way:
            worker, work = under_way.pop(0)
            router.release(worker, work)
            load[worker] -= work
