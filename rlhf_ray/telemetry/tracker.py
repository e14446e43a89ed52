"""What a stage tells about itself: metrics, samples, results, progress, alarm.

The run folder is the truth and W&B a copy of it: a number goes to `metrics.jsonl` first, and a broken W&B changes
nothing there. A run that fails says so to W&B before its error goes on to the caller.
"""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rlhf_ray.config.common import StageConfig
from rlhf_ray.errors import StopRequested
from rlhf_ray.telemetry import catalogue, progress
from rlhf_ray.telemetry.run_folder import RunFolder, finite
from rlhf_ray.telemetry.wandb_client import WandbClient, mode


class Tracker:
    """Context manager around a run. ConfigError on entry of a folder that holds another run.

    >>> with Tracker(config, "ppo") as tracker:  # doctest: +SKIP
    ...     bar = tracker.progress(config.ppo.updates, "ppo")
    ...     tracker.log(1, {"objective/kl": 0.0})
    ...     bar.advance(kl=0.0)
    """

    def __init__(self, config: StageConfig, stage: str, resumable: bool = False) -> None:
        self.stage, self._config = stage, config
        self._wandb: WandbClient | None = None
        self._progress: progress.Progress | None = None
        self.folder = RunFolder(config, resumable)

    def __enter__(self) -> "Tracker":
        chosen = mode(self._config.telemetry.wandb)
        if chosen != "off":
            self._wandb = WandbClient(self._config, self.stage, self.folder, chosen)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.close()
        if self._wandb:
            if error is not None:
                stopped = isinstance(error, StopRequested | KeyboardInterrupt)
                title = f"{self.stage} '{self._config.name}' {'was stopped' if stopped else 'failed'}"
                self._wandb.alert(title, f"{type(error).__name__}: {error}", "WARN" if stopped else "ERROR")
            self._wandb.close(exit_code=0 if error is None else 1)
        self.folder.close()

    def log(self, update: int, metrics: Mapping[str, float]) -> None:
        """One line of `metrics.jsonl`. ValueError for a name that is not in the catalogue."""
        catalogue.check(metrics)
        numbers = {name: _number(value) for name, value in metrics.items()}
        self.folder.log(update, numbers)
        if self._wandb:
            self._wandb.log(update, numbers)

    def samples(self, update: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A few answers of the update: rows of `prompt`, `response`, `score`, `kl`."""
        rows = finite(rows)
        self.folder.log_samples(update, rows)
        if self._wandb and rows:
            self._wandb.samples(update, rows)

    def alert(self, title: str, text: str) -> None:
        """For what a person should look at though the run goes on."""
        progress.say(f"{title}: {text}")
        if self._wandb:
            self._wandb.alert(title, text, "WARN")

    def summary(self, summary: Mapping[str, Any]) -> None:
        """The run's results, `summary.json`; a second call replaces the first."""
        self.folder.write_summary(summary)
        if self._wandb:
            self._wandb.summary(finite(summary))

    def progress(self, total: int, what: str, done: int = 0) -> progress.Progress:
        """For `total` updates of which `done` are done; ends an earlier one."""
        if self._progress:
            self._progress.close()
        self._progress = progress.progress(total, what, done)
        return self._progress


def _number(value: Any) -> float:
    """Python's own number for Python's, NumPy's and torch's scalars."""
    return value if isinstance(value, int) else float(value)
