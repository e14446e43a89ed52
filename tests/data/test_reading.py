import gzip
import io
import json

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from rlhf_ray.config.common import DataConfig
from rlhf_ray.data.quarantine import Quarantine
from rlhf_ray.data.reading import read_rows
from rlhf_ray.errors import DataError

ROWS = [{"prompt": "a", "p": 0.5}, {"prompt": "b", "p": None}]


def encoded(kind):
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    if kind == "json":
        return json.dumps(ROWS, indent=1).encode()
    table = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(ROWS), table)
    return table.getvalue()


def read(path, quarantine=None, split="train"):
    return list(read_rows(DataConfig(path=str(path), split=split), quarantine or Quarantine()))


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("packed", [False, True])
def test_each_format_gives_the_same_rows(tmp_path, kind, packed):
    path = tmp_path / f"rows.v1.{kind}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(encoded(kind)) if packed else encoded(kind))
    rows = read(path)
    assert [row.fields for row in rows] == ROWS
    assert [(row.file, row.line) for row in rows] == [(str(path), 1), (str(path), 2)]


def test_json_lines_under_the_suffix_json_are_read_as_lines(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(encoded("jsonl"))
    assert [row.fields for row in read(path)] == ROWS


def test_the_list_of_examples_in_one_object_is_read_by_number(tmp_path):
    path = tmp_path / "task.json"
    path.write_text(json.dumps({"name": "of a benchmark", "examples": [*ROWS, 3]}, indent=1))
    quarantine = Quarantine()
    rows = read(path, quarantine)
    assert [(row.line, row.fields) for row in rows] == [(1, ROWS[0]), (2, ROWS[1])]
    assert quarantine.first == [f"{path}:3: not an object: found int"]


def test_bad_lines_are_quarantined_by_their_line_and_the_others_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    deep, long = b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}"
    path.write_bytes(
        b'\xef\xbb\xbf{"n": 1}\n\n{"n": \n\xff\xfe\n[1, 2]\r\nnull\n' + deep + b"\n" + long + b'\n{"n": 2}'
    )
    quarantine = Quarantine(tmp_path / "q.jsonl")
    assert [(row.line, row.fields["n"]) for row in read(path, quarantine)] == [(1, 1), (9, 2)]
    entries = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["reason"].split(":")[0]) for entry in entries] == [
        (3, "not JSON"),
        (4, "not UTF-8"),
        (5, "not an object"),
        (6, "not an object"),
        (7, "not JSON"),
        (8, "not JSON"),
    ]
    assert {entry["file"] for entry in entries} == {str(path)}


def test_an_item_of_a_json_list_that_is_no_object_is_quarantined_by_its_number(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"n": 1}, 5]')
    quarantine = Quarantine()
    assert len(read(path, quarantine)) == 1
    assert quarantine.first == [f"{path}:2: not an object: found int"]


def test_a_parquet_row_that_is_not_utf8_is_quarantined_and_the_others_are_read(tmp_path):
    octets = pa.array([b"a", b"\xff", b"c"], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 3, octets.buffers())
    parquet.write_table(pa.table({"prompt": strings}), tmp_path / "rows.parquet")
    quarantine = Quarantine()
    assert [(row.line, row.fields["prompt"]) for row in read(tmp_path / "rows.parquet", quarantine)] == [
        (1, "a"),
        (3, "c"),
    ]
    assert "rows.parquet:2: not UTF-8" in quarantine.first[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", b"3", "expected a list of objects, found int"),
        ("rows.json", b'[{"n": 1}', "not JSON"),
        ("rows.json", b'["\xff"]', "not UTF-8: byte 2"),
        ("rows.parquet", b"junk", "cannot be read as Parquet"),
        ("rows.jsonl.gz", b"junk", "cannot be read: Not a gzipped file"),
        ("rows.jsonl.gz", gzip.compress(b'{"n": 1}\n' * 9)[:-12], "cannot be read"),
        ("rows.csv", b"prompt\na\n", "cannot tell the format"),
        ("rows", b"", "cannot tell the format"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "no/such/rows", "./rows", "here/rows", "rows.jsn"])
def test_a_local_path_that_does_not_exist_fails_without_asking_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match="no such file or folder"):
        read(name)


@pytest.mark.parametrize("name", ["imdb", "Anthropic/hh-rlhf", "owner/data-v1.0"])
def test_a_hub_name_that_cannot_be_reached_names_path_split_what_was_tried_and_the_remedy(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as raised:
        read(name, split="test")
    for part in (f"'{name}'", "'test'", "no local file or folder", "datasets.load_dataset", "give a local file"):
        assert part in str(raised.value)


def test_files_of_a_folder_are_read_in_the_order_of_their_names(tmp_path):
    (tmp_path / "b.json").write_text('[{"n": 3}]')
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n{"n": 2}\n')
    (tmp_path / "README.md").write_text("not data")
    assert [(row.fields["n"], row.line) for row in read(tmp_path)] == [(1, 1), (2, 2), (3, 1)]


def test_a_folder_whose_files_are_named_after_splits_gives_the_split_asked_for(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00001.jsonl").write_text('{"n": 1}\n')
    (tmp_path / "data" / "test-00000-of-00001.jsonl").write_text('{"n": 2}\n')
    assert [row.fields["n"] for row in read(tmp_path)] == [1]
    assert [row.fields["n"] for row in read(tmp_path, split="test")] == [2]
    with pytest.raises(DataError, match="no split 'dev'; it has train, test"):
        read(tmp_path, split="dev")


def test_a_folder_without_data_is_named(tmp_path):
    with pytest.raises(DataError, match="no data files"):
        read(tmp_path)


def test_a_folder_of_a_format_that_only_datasets_reads_is_left_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "rows.csv").write_text("prompt,n\na,1\nb,2\n")
    assert [row.fields for row in read(tmp_path / "csv")] == [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]


def test_a_data_set_saved_to_disk_is_read(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert [row.fields for row in read(tmp_path / "one")] == ROWS


def test_a_split_of_a_data_set_saved_to_disk_is_chosen_by_name(tmp_path):
    saved = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS[:1]), test=datasets.Dataset.from_list(ROWS[1:]))
    saved.save_to_disk(tmp_path / "two")
    assert [row.fields for row in read(tmp_path / "two", split="test")] == ROWS[1:]
    with pytest.raises(DataError, match="no split 'dev'; it has train, test"):
        read(tmp_path / "two", split="dev")
