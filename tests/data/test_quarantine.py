import json

import pytest

from rlhf_ray.data.quarantine import Quarantine
from rlhf_ray.errors import DataError


def filled(path=None, bad=4):
    quarantine = Quarantine(path)
    reasons = ["empty: 'prompt' has no text", "too long: 9 tokens, data.max_tokens is 8", "empty: 'chosen' has no text"]
    for line in range(1, bad + 1):
        quarantine.add("a.jsonl", line, reasons[line % 3], "x" * 1000)
    return quarantine


def test_each_bad_row_is_on_disk_as_soon_as_it_is_found(tmp_path):
    path = tmp_path / "run" / "quarantine.jsonl"
    quarantine = Quarantine(path)
    quarantine.add("a.jsonl", 7, "not JSON: half \udc80", "{'a': \udc80")
    entry = json.loads(path.read_text())
    assert (entry["file"], entry["line"], entry["reason"]) == ("a.jsonl", 7, "not JSON: half \udc80")


def test_an_excerpt_is_short(tmp_path):
    filled(tmp_path / "q.jsonl", bad=1)
    assert len(json.loads((tmp_path / "q.jsonl").read_text())["excerpt"]) == 200


def test_faults_of_an_earlier_start_are_gone(tmp_path):
    filled(tmp_path / "q.jsonl")
    Quarantine(tmp_path / "q.jsonl")
    assert (tmp_path / "q.jsonl").read_text() == ""


def test_rows_are_counted_by_kind_whatever_the_detail():
    assert filled().counts == {"empty": 2, "too long": 2}


def test_a_share_at_the_bound_is_allowed_and_above_it_refused():
    filled(bad=4).check(100, 0.04)
    with pytest.raises(DataError):
        filled(bad=5).check(100, 0.04)


def test_too_many_bad_rows_are_told_with_counts_shares_places_and_remedy(tmp_path):
    path = tmp_path / "q.jsonl"
    with pytest.raises(DataError) as raised:
        filled(path, bad=5).check(100, 0.01, "data.path 'a.jsonl'")
    message = str(raised.value)
    for part in (
        "data.path 'a.jsonl': 5 of 100 rows (5.00%) cannot be used, more than data.max_bad_share = 1.00%",
        "too long: 2 (2.00%)",
        "empty: 3 (3.00%)",
        "a.jsonl:1: too long: 9 tokens, data.max_tokens is 8",
        "a.jsonl:2: empty",
        "a.jsonl:3: empty",
        "raise data.max_bad_share",
        str(path),
    ):
        assert part in message
    assert "a.jsonl:4" not in message


def test_nothing_usable_is_refused_whatever_share_is_allowed():
    with pytest.raises(DataError, match="all rows bad"):
        filled(bad=4).check(4, 1.0)


def test_no_rows_at_all_is_another_message_than_all_rows_bad():
    with pytest.raises(DataError, match="empty data set") as raised:
        Quarantine().check(0, 1.0, "data.path 'a.jsonl'")
    assert "all rows bad" not in str(raised.value)
    assert "a.jsonl" in str(raised.value)
