from pathlib import Path

import pytest

from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.feedback.journal import Journal


def test_rows_are_there_for_the_next_run(tmp_path: Path) -> None:
    with Journal(tmp_path / "rows.jsonl") as journal:
        assert journal.rows == []
        journal.add([{"a": 1}, {"a": "ü"}])
        journal.add([{"a": 3}])
    with Journal(tmp_path / "rows.jsonl") as again:
        assert again.rows == [{"a": 1}, {"a": "ü"}, {"a": 3}]


def test_half_a_last_line_is_cut_off_and_written_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2')
    with Journal(path) as journal:
        assert journal.rows == [{"a": 1}]
        journal.add([{"a": 2}])
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'


def test_a_damaged_line_before_the_last_is_refused_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:2: is not JSON"):
        Journal(path)


def test_rows_of_another_constitution_are_not_gone_on_with(tmp_path: Path) -> None:
    with Journal(tmp_path / "rows.jsonl") as journal:
        journal.check({"constitution_sha": "a"})
        journal.add([{"n": 1, "constitution_sha": "a"}])
        journal.check({"constitution_sha": "a"})
        with pytest.raises(ConfigError, match=r"rows.jsonl: .* with constitution_sha a, but now that is b"):
            journal.check({"constitution_sha": "b"})
