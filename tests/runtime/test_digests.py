import os
from pathlib import Path

from rlhf_ray.runtime.digests import Digests


def fresh(tmp_path: Path) -> Digests:
    return Digests(tmp_path / ".memory.json")


def model(folder: Path, weights: bytes = b"abc") -> Path:
    (folder / "deep").mkdir(parents=True)
    (folder / "deep/weights").write_bytes(weights)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_digest_follows_content_and_names_and_not_the_place(tmp_path: Path) -> None:
    digests = fresh(tmp_path)
    one, same = model(tmp_path / "one"), model(tmp_path / "elsewhere")
    os.utime(same / "config.json", (1, 1))
    (same / ".hidden").write_text("x")
    assert digests.of(one) == digests.of(same)
    assert digests.of(one) != digests.of(model(tmp_path / "two", b"abd"))
    (same / "config.json").rename(same / "other.json")
    assert digests.of(one) != digests.of(same)


def test_what_is_remembered_is_forgotten_when_the_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("one")
    digests = fresh(tmp_path)
    before = digests.of(file)
    digests.keep()
    again = fresh(tmp_path)
    assert again.of(file) == before
    file.write_text("two")
    assert again.of(file) != before


def test_memory_saves_reading_the_file_again(tmp_path: Path) -> None:
    file = tmp_path / "large"
    file.write_text("one")
    digests = fresh(tmp_path)
    before, stat = digests.of(file), file.stat()
    file.write_text("two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as if nothing had happened
    assert digests.of(file) == before
