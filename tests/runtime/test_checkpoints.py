import json
from pathlib import Path

import pytest
import xxhash

from rlhf_ray.errors import ResourceError
from rlhf_ray.runtime import checkpoints


def weights(text: str):
    def save(folder: Path) -> None:
        (folder / "weights").write_text(text)

    return save


def test_a_checkpoint_holds_what_was_saved_and_its_state(tmp_path: Path) -> None:
    place = checkpoints.write(tmp_path, "update_000001", weights("a"), {"updates": 1}, keep=2, needed_bytes=1)
    assert (place / "weights").read_text() == "a"
    state = json.loads((place / "state.json").read_text())
    assert state.pop("files") == {"weights": xxhash.xxh3_128(b"a").hexdigest()}
    assert state == {"updates": 1}


def test_only_the_newest_stay(tmp_path: Path) -> None:
    for number in range(4):
        checkpoints.write(tmp_path, f"update_{number}", weights(str(number)), {}, keep=2, needed_bytes=1)
    assert [place.name for place in checkpoints.written(tmp_path)] == ["update_2", "update_3"]


def test_a_save_that_fails_leaves_the_last_checkpoint_and_shows_no_new_one(tmp_path: Path) -> None:
    checkpoints.write(tmp_path, "update_1", weights("good"), {}, keep=1, needed_bytes=1)

    def breaks(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise OSError("torn")

    with pytest.raises(ResourceError, match="torn"):
        checkpoints.write(tmp_path, "update_2", breaks, {}, keep=1, needed_bytes=1)
    assert [place.name for place in checkpoints.written(tmp_path)] == ["update_1"]
    checkpoints.write(tmp_path, "update_2", weights("whole"), {}, keep=1, needed_bytes=1)
    assert [(place.name, (place / "weights").read_text()) for place in checkpoints.written(tmp_path)] == [
        ("update_2", "whole")
    ]


def test_too_little_disk_is_refused_with_both_numbers_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"needs 1099511627776.0 MiB, and the disk has .* MiB free"):
        checkpoints.write(tmp_path, "update_1", weights("x"), {}, keep=1, needed_bytes=2**60)
    assert list(tmp_path.iterdir()) == []


def kept(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        checkpoints.write(tmp_path, f"update_{number}", weights(str(number)), {"updates": number, "whole": 1}, 3, 1)


def test_the_newest_checkpoint_that_a_run_can_go_on_from_is_found(tmp_path: Path) -> None:
    kept(tmp_path)
    checkpoints.write(tmp_path, "stopped", weights("x"), {"updates": 3}, 4, 1)
    (tmp_path / "update_9.unfinished").mkdir()
    told: list[str] = []
    found = checkpoints.newest(tmp_path, "whole", told.append)
    assert found is not None and found.place.name == "update_3" and found.state["updates"] == 3 and told == []
    assert checkpoints.newest(tmp_path / "nowhere", "whole", told.append) is None


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda place: (place / "weights").write_text("4"), "weights is not what was written"),
        (lambda place: (place / "weights").unlink(), "weights is missing"),
        (lambda place: (place / "state.json").write_text('{"upd'), "state.json cannot be read"),
    ],
    ids=["another byte", "a file gone", "cut off"],
)
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(tmp_path: Path, harm, said: str) -> None:
    kept(tmp_path)
    harm(tmp_path / "update_3")
    told: list[str] = []
    found = checkpoints.newest(tmp_path, "whole", told.append)
    assert found is not None and found.place.name == "update_2"
    assert len(told) == 1 and said in told[0] and "going on from the one before it" in told[0]
