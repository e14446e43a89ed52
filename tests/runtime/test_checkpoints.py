import json
from pathlib import Path

import pytest

from rlhf_ray.errors import ResourceError
from rlhf_ray.runtime import checkpoints


def weights(text: str):
    def save(folder: Path) -> None:
        (folder / "weights").write_text(text)

    return save


def test_a_checkpoint_holds_what_was_saved_and_its_state(tmp_path: Path) -> None:
    place = checkpoints.write(tmp_path, "update_000001", weights("a"), {"updates": 1}, keep=2, needed_bytes=1)
    assert (place / "weights").read_text() == "a"
    assert json.loads((place / "state.json").read_text()) == {"updates": 1}


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
