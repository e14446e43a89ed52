"""Rows out of files, one at a time, each knowing the file and line it came from.

A line that cannot be read is one bad row; a file that cannot be read is an error. Nothing is skipped silently but
blank lines. A path that is meant to be local is never looked up on the hub: a typing mistake must fail at once.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.config.common import DataConfig
from rlhf_ray.data.quarantine import BadRow, Quarantine
from rlhf_ray.errors import DataError

FORMATS = (".jsonl", ".json", ".parquet")
_FILE_SUFFIXES = (*FORMATS, ".gz", ".csv", ".tsv", ".txt", ".arrow", ".zip", ".zst")
_KNOWN = "known are .jsonl, .json and .parquet, each also with .gz"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Row:
    """One object of a data set."""

    file: str
    """The file, or the name of the data set."""
    line: int
    """Line number from 1, or the row's number in formats that have no lines."""
    fields: dict[str, Any]


def read_rows(data: DataConfig, quarantine: Quarantine) -> Iterator[Row]:
    """Every row of `data.path`, in order. Lines that are not JSON, not UTF-8 or not an object go to `quarantine`.

    Raises DataError if the path does not exist, cannot be read, or has no split `data.split`.
    """
    path = Path(data.path).expanduser()
    if path.is_dir():
        yield from _folder(path, data, quarantine)
    elif path.exists():
        yield from _file(path, quarantine)
    elif _looks_local(data.path):
        raise DataError(f"data.path '{data.path}': no such file or folder (looked for {path.absolute()})")
    else:
        yield from _hugging_face(data)


def _looks_local(path: str) -> bool:
    """Whether `path` can only be meant as a local one; what is left is `name` or `owner/name`."""
    owner, slash, name = path.rpartition("/")
    if not _HUB_NAME.fullmatch(path) or name.endswith(_FILE_SUFFIXES):
        return True
    return Path(owner).is_dir() if slash else "." in name


def _format(path: Path) -> str:
    """Suffix that tells the format, ".gz" left aside."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _folder(path: Path, data: DataConfig, quarantine: Quarantine) -> Iterator[Row]:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        yield from _saved_to_disk(path, data)
        return
    files = _files_of_split(path, data.split)
    if not files:  # formats of `datasets` that are not ours, such as CSV
        yield from _hugging_face(data)
    for file in files:
        yield from _file(file, quarantine)


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """Files of our formats, sorted, that `datasets` puts into `split` by their names; all into train if none tells."""
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    try:
        found = DataFilesDict.from_patterns(get_data_patterns(str(folder)), base_path=str(folder))
    except EmptyDatasetError:
        raise DataError(f"data.path '{folder}': the folder has no data files; {_KNOWN}") from None
    splits = {
        str(name): sorted(file for file in map(Path, files) if _format(file) in FORMATS)
        for name, files in found.items()
    }
    if any(splits.values()) and not splits.get(split):
        raise DataError(f"data.path '{folder}' has no split '{split}'; it has {', '.join(splits)}; set data.split")
    return splits.get(split, [])


def _file(path: Path, quarantine: Quarantine) -> Iterator[Row]:
    readers = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
    reader = readers.get(_format(path))
    if reader is None:
        raise DataError(f"{path}: cannot tell the format by the name; {_KNOWN}")
    try:
        yield from reader(path, quarantine)
    except (OSError, EOFError, zlib.error) as error:  # EOFError and zlib.error: a gzip file cut short or damaged
        raise DataError(f"{path}: cannot be read: {error}") from None


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _jsonl(path: Path, quarantine: Quarantine) -> Iterator[Row]:
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield Row(str(path), number, _object(_parse(line)))
            except BadRow as fault:
                quarantine.add(str(path), number, str(fault), line.decode("utf-8", "replace"))


def _json(path: Path, quarantine: Quarantine) -> Iterator[Row]:
    """A list of objects, or an object with such a list as its `examples`; or lines of objects, which many files of this
    suffix are."""
    with _open(path) as file:
        content = file.read()
    is_object = content.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{"
    rows = None
    try:
        rows = _parse(content)
    except BadRow as fault:
        if not is_object:
            raise DataError(f"{path}: {fault}") from None
    if isinstance(rows, dict) and isinstance(rows.get("examples"), list):
        rows = rows["examples"]
    elif is_object:
        yield from _jsonl(path, quarantine)
        return
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of objects, found {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        try:
            yield Row(str(path), number, _object(row))
        except BadRow as fault:
            quarantine.add(str(path), number, str(fault), repr(row))


def _parse(content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRow("not UTF-8", f"byte {error.start}: {error.reason}") from None
    except (ValueError, RecursionError) as error:  # plain ValueError: an integer of thousands of digits
        raise BadRow("not JSON", str(error)) from None


def _object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise BadRow("not an object", f"found {type(row).__name__}")
    return row


def _parquet(path: Path, quarantine: Quarantine) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    with _open(path) as file:
        try:
            batches = parquet.ParquetFile(file).iter_batches(batch_size=1024)
            number = 0
            for batch in batches:
                for place in range(len(batch)):
                    number += 1
                    try:
                        yield Row(str(path), number, batch.slice(place, 1).to_pylist()[0])
                    except UnicodeDecodeError as error:
                        quarantine.add(str(path), number, f"not UTF-8: byte {error.start}: {error.reason}")
        except pyarrow.ArrowException as error:
            raise DataError(f"{path}: cannot be read as Parquet: {error}") from None


def _saved_to_disk(path: Path, data: DataConfig) -> Iterator[Row]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"data.path '{path}': cannot be read as a saved data set: {error}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if data.split not in loaded:
            raise DataError(f"data.path '{path}' has no split '{data.split}'; it has {', '.join(loaded)}")
        loaded = loaded[data.split]
    for number, fields in enumerate(loaded, start=1):
        yield Row(str(path), number, fields)


def _hugging_face(data: DataConfig) -> Iterator[Row]:
    """Whatever `datasets.load_dataset` makes of the path: a name on the hub, one in its cache, or a folder."""
    import datasets

    try:
        loaded = datasets.load_dataset(data.path, split=data.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        here = f"a folder without {', '.join(FORMATS)}" if Path(data.path).is_dir() else "no local file or folder"
        raise DataError(
            f"data.path '{data.path}', data.split '{data.split}': it is {here}, and "
            f"datasets.load_dataset could not load it: {' '.join(str(error).split())}\n"
            f"check the name; without network give a local file, or a data set that is already in the cache"
        ) from None
    for number, fields in enumerate(loaded, start=1):
        yield Row(data.path, number, fields)
