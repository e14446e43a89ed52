from collections.abc import Sequence
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.runtime.graph import walk


class World:
    """A random graph, room for some of its parts at a time, and ends in any order; checks every call of `walk`."""

    def __init__(self, seed: int) -> None:
        random = self.random = Random(seed)
        names = [f"p{number}" for number in range(random.randint(0, 9))]
        after = {name: tuple(n for n in names[:place] if random.random() < 0.3) for place, name in enumerate(names)}
        self.after = {name: after[name] for name in random.sample(names, len(names))}
        self.size = {name: random.randint(0, 4) for name in names}
        self.room = random.randint(0, 8)
        self.fails = {name for name in names if random.random() < random.choice([0.0, 0.3])}
        self.begun: list[str] = []
        self.running: list[str] = []
        self.done: set[str] = set()
        self.failed: list[str] = []

    def begin(self, name: str) -> None:
        assert name not in self.begun
        assert set(self.after[name]) <= self.done, "it waits for others"
        assert not self.failed, "nothing begins after a failure"
        assert not self.running or self.fits([*self.running, name]), "it does not fit beside what runs"
        self.begun.append(name)
        self.running.append(name)

    def ended(self) -> tuple[str, Exception | None]:
        assert self.running, "nobody runs whose end could be waited for"
        if not self.failed:
            ready = [name for name in self.after if name not in self.begun and set(self.after[name]) <= self.done]
            assert not any(self.fits([*self.running, name]) for name in ready), "there is room for one that is ready"
        name = self.running.pop(self.random.randrange(len(self.running)))
        if name in self.fails:
            self.failed.append(name)
            return name, RuntimeError(name)
        self.done.add(name)
        return name, None

    def fits(self, names: Sequence[str]) -> bool:
        return sum(self.size[name] for name in names) <= self.room


@given(st.integers(0, 2**64))
@settings(max_examples=3000, deadline=None)
def test_every_part_runs_once_in_order_where_there_is_room_and_none_begins_after_a_failure(seed: int) -> None:
    world = World(seed)
    errors = walk(world.after, world.begin, world.ended, world.fits)
    assert not world.running, "an end that nobody waited for"
    assert list(errors) == world.failed
    assert all(str(error) == name for name, error in errors.items())
    if not errors:
        assert world.done == set(world.after)


def test_the_first_of_several_that_are_ready_begins_first() -> None:
    world = World(0)
    world.after, world.size, world.fails = {"c": (), "a": (), "b": ("c",)}, dict.fromkeys("abc", 1), set()
    world.room = 1
    walk(world.after, world.begin, world.ended, world.fits)
    assert world.begun == ["c", "a", "b"]


def test_what_is_larger_than_the_room_runs_alone() -> None:
    world = World(0)
    world.after, world.size, world.fails = {"large": (), "small": ()}, {"large": 9, "small": 1}, set()
    world.room = 2
    assert walk(world.after, world.begin, world.ended, world.fits) == {}
    assert world.begun == ["large", "small"]
