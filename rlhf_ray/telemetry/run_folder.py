"""The folder of one run: what it was told, what it measured, what it made.

A folder never holds two runs: a second run of the same name is refused while the first is alive, and after it as soon
as the first left anything worth keeping. One that died before its first update leaves nothing, and is replaced. A stage
that can go on where it stopped does so when the same configuration is run again, and never with another one.

Numbers that are not finite are written as `null`: JSON has no NaN, and readers fail on Python's spelling of it.
"""

import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import yaml

from rlhf_ray.config.common import StageConfig
from rlhf_ray.config.load import dump
from rlhf_ray.errors import ConfigError, ResourceError
from rlhf_ray.telemetry.secrets import redact_values


class RunFolder:
    """`<output_dir>/<name>/`. ConfigError when it belongs to another run; ResourceError when the disk refuses."""

    def __init__(self, config: StageConfig, resumable: bool = False) -> None:
        self.path = Path(config.output_dir).absolute() / config.name
        self.config = self.path / "config.yaml"
        """The resolved configuration, secrets masked."""
        self.metrics = self.path / "metrics.jsonl"
        """One object an update: `update`, `time` (Unix seconds) and the metrics."""
        self.samples = self.path / "samples.jsonl"
        """A few answers an update."""
        self.history = self.path / "history.jsonl"
        """What became of every sample, event by event."""
        self.summary = self.path / "summary.json"
        """The run's results; written as a whole or not at all."""
        self.unfinished = self.path / "unfinished.json"
        """The same of a run that did not end, as far as they were known; gone when the summary is there."""
        self.checkpoints = self.checkpoints_of(config)
        self.model = self.path / "model"
        """What the stage made, as a Hugging Face folder."""
        self.wandb = self.path / "wandb"

        with _writing(self.path):
            self._make()
            self._metrics = self.metrics.open("a", encoding="utf-8")
            try:
                _lock(self._metrics, self.path)
                if not (resumable and self._is_unfinished(config)):
                    self._refuse_results()
                write_atomically(self.config, _masked(config))
                self._samples = self.samples.open("a", encoding="utf-8")
                self._history: TextIO | None = None
            except BaseException:
                self._metrics.close()
                raise

    @staticmethod
    def checkpoints_of(config: StageConfig) -> Path:
        """Where a run of `config` keeps them, before its folder is taken."""
        return Path(config.output_dir).absolute() / config.name / "checkpoints"

    def log(self, update: int, metrics: Mapping[str, float]) -> None:
        """Appends one object to `metrics.jsonl`; it outlives the process, though not the machine."""
        self._append(self._metrics, {"update": update, "time": round(time.time(), 3), **metrics})

    def log_samples(self, update: int, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            self._append(self._samples, {"update": update, **row})

    def log_event(self, event: Mapping[str, Any]) -> None:
        """Appends to the history."""
        if self._history is None:
            with _writing(self.history):
                self._history = self.history.open("a", encoding="utf-8")
        self._append(self._history, event)

    def rewind(self, updates: int) -> list[dict[str, Any]]:
        """Forgets metrics and samples after the first `updates` updates, which an earlier process left; of a run that
        begins anew its history too. Returns the metrics that stay, one object an update."""
        kept = [_cut(path, lambda row: row["update"] < updates) for path in (self.metrics, self.samples)]
        _cut(self.history, lambda row: updates > 0)
        return kept[0]

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self._write(self.summary, summary)
        self.unfinished.unlink(missing_ok=True)

    def write_unfinished(self, results: Mapping[str, Any]) -> None:
        """What the summary will say, as far as it is known: a failure later does not take it away."""
        self._write(self.unfinished, results)

    def close(self) -> None:
        """Lets go of the folder. Safe to call twice."""
        self._metrics.close()
        self._samples.close()
        if self._history:
            self._history.close()

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ConfigError(
                f"{self.path} cannot be the run's folder: there is a file in its way; "
                f"choose another name= or output_dir=, or remove that file"
            ) from None
        self.checkpoints.mkdir(exist_ok=True)

    def _is_unfinished(self, config: StageConfig) -> bool:
        """Whether an earlier run of this very configuration began here and did not reach its summary."""
        return self.config.exists() and self.config.read_text() == _masked(config) and not self.summary.exists()

    def _refuse_results(self) -> None:
        results = (self.metrics, self.samples, self.summary, self.unfinished, self.checkpoints, self.model)
        found = [path.name for path in results if _holds_something(path)]
        if found:
            raise ConfigError(
                f"{self.path} already holds a run ({', '.join(found)}); choose another name with name=..., "
                f"or remove that folder"
            )

    def _write(self, path: Path, results: Mapping[str, Any]) -> None:
        with _writing(path):
            write_atomically(path, json.dumps(redact_values(finite(results)), indent=2) + "\n")

    def _append(self, file: TextIO, row: Mapping[str, Any]) -> None:
        with _writing(Path(file.name)):
            file.write(json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()


def _cut(path: Path, stays: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Shortens a file of rows to the first ones that stay, in place; a last line that was cut off goes too."""
    if not path.exists():
        return []
    kept, end = [], 0
    with _writing(path), path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or not stays(row):
                break
            kept.append(row)
            end += len(line)
        os.truncate(path, end)
    return kept


def write_atomically(path: Path, text: str) -> None:
    """Readers of `path` see the old content or the new, never a part, also after a loss of power."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself is only durable with its folder
    finally:
        os.close(folder)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSONL, whole or not at all."""
    write_atomically(path, "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows))


def finite(tree: Any) -> Any:
    """`tree` as JSON can say it: numbers that are not finite become None, NumPy and torch scalars Python's."""
    if isinstance(tree, Mapping):
        return {str(key): finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    if isinstance(tree, Path):
        return str(tree)
    if hasattr(tree, "item"):
        tree = tree.item()
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _masked(config: StageConfig) -> str:
    return yaml.safe_dump(redact_values(yaml.safe_load(dump(config))), sort_keys=False)


def _lock(file: TextIO, folder: Path) -> None:
    """Held until the file is closed or the process dies, however it dies."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"{folder} is being written by a run that is alive; choose another name with name=..."
        ) from None
    except OSError:
        return  # some network file systems have no locks; finished runs are still protected


def _holds_something(path: Path) -> bool:
    if path.is_dir():
        return any(path.iterdir())
    return path.exists() and path.stat().st_size > 0


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(f"{error.filename or path}: cannot be written: {error.strerror or error}") from error
