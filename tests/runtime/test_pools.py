from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.runtime.pools import LeastLoaded


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
