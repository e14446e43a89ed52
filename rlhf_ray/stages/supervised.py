"""SFT and reward-model training from the driver's side: input checked, workers started by Ray Train, their word heard.

The driver owns everything a person sees: metrics, progress, errors, the end. It waits for nothing without a deadline,
and what a worker raised reaches the person as that one error, whatever Ray wraps around it.
"""

import os
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ray import interrupts
from rlhf_ray.config.layout import Group
from rlhf_ray.config.supervised import SupervisedConfig
from rlhf_ray.data.order import held_out_by_source
from rlhf_ray.errors import (
    ConfigError,
    DeadlineError,
    ModelError,
    ResourceError,
    RLHFError,
    StopRequested,
    TrainingError,
)
from rlhf_ray.models import load
from rlhf_ray.runtime import session
from rlhf_ray.runtime.deadlines import fetch
from rlhf_ray.runtime.environment import ray_train_environment, torch_environment
from rlhf_ray.runtime.feed import At, Failed, Feed, Joined, Logged, Saved, Word
from rlhf_ray.runtime.placement import shortage
from rlhf_ray.stages.supervised_rank import Job, Objective, train_loop, training_tokenizer
from rlhf_ray.telemetry.progress import Progress
from rlhf_ray.telemetry.tracker import Tracker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENDING_S = 20.0
"""How long workers may take to be gone once they are told to."""
RAY_TRAIN = "ray_train"
"""Folder in the run's own that Ray Train asks for while it runs."""
LAST_STEPS = 10
"""`loss_last` is the mean over so many of the last steps."""


def read_model(config: SupervisedConfig) -> tuple["PreTrainedTokenizerBase", int]:
    """The model's tokenizer and its context in tokens. Raises ModelError when the model or its tokenizer is none."""
    description = load.model_config(config.model, "model", config.trust_remote_code)
    tokenizer = training_tokenizer(config)
    load.check_vocabulary(tokenizer, description, config.model, "model")
    return tokenizer, int(getattr(description, "max_position_embeddings", config.data.max_tokens))


def check_lengths(config: SupervisedConfig, longest_sequence: int, longest_row: int, context: int) -> None:
    """Lengths in tokens; a row is what must lie in one micro-batch. Raises ModelError or ConfigError."""
    if longest_sequence > context:
        raise ModelError(
            f"model '{config.model}' has a context of {context} tokens, and the longest row has {longest_sequence}; "
            f"set data.max_tokens to {context} to set longer ones aside"
        )
    budget = config.training.tokens_per_micro_batch
    if longest_row > budget:
        raise ConfigError(
            f"training.tokens_per_micro_batch is {budget}, but the longest row has {longest_row} tokens (a pair counts "
            "both its answers, each with the prompt). Raise it, or lower data.max_tokens"
        )


def train(config: SupervisedConfig, objective: Objective, tracker: Tracker, address: str | None) -> dict[str, Any]:
    """Trains on what `objective` holds; returns the summary. Any failure is an RLHFError, workers gone."""
    learn, held_out = held_out_by_source(objective.sources, config.training.held_out_share, config.seed)
    job = Job(_with_absolute_paths(config), objective, learn, held_out, str(tracker.folder.checkpoints))
    job.order()  # a source that it cannot give rows is refused before Ray starts
    with session.connect(address), interrupts.stoppable():
        import ray

        _check_resources(config)
        feed = ray.remote(Feed).options(num_cpus=0).remote()
        try:
            return Run(job, feed, tracker).finish()
        finally:
            ray.kill(feed)


class Run:
    """One call of Ray Train, listened to."""

    def __init__(self, job: Job, feed: Any, tracker: Tracker) -> None:
        self.job, self.feed, self.tracker = job, feed, tracker
        self.heard = 0
        """Words heard so far."""
        self.doing = "starting"
        self.steps: list[Logged] = []
        self.saved: Saved | None = None
        self.failed: list[Failed] = []
        self.workers: list[Any] = []
        self.progress: Progress | None = None
        """From step 0 on, so that its estimate leaves starting out."""

    def finish(self) -> dict[str, Any]:
        """Until the model is saved. Raises StopRequested, with the model saved, when somebody asks for a stop."""
        started = time.monotonic()
        fit = Fit(self.job, self.feed, self.tracker.folder.path)
        try:
            self._listen(fit)
        except StopRequested as stop:
            with interrupts.Interrupt.deferred():
                fetch(self.feed.ask_stop.remote(), ENDING_S, "the feed", "asking the workers to stop")
                self._listen(fit)
            where = self.saved.path if self.saved else None
            raise StopRequested(f"{stop}; the model as it was is saved in '{where}'") from None
        finally:
            self._end(fit)
        return self._summary(time.monotonic() - started)

    def _listen(self, fit: "Fit") -> None:
        """Until Ray Train is done. Raises what a worker raised, or DeadlineError after silence."""
        limit = self.job.config.deadline_s
        last = time.monotonic()
        while True:
            interrupts.Interrupt.check()
            done = fit.done
            words = fetch(self.feed.hear.remote(self.heard, 0.2), limit, "the feed", "listening to the workers")
            for word in words:
                self._take(word)
            if done and not words:
                break
            last = time.monotonic() if words else last
            if time.monotonic() - last > limit:
                raise DeadlineError(
                    f"no word from the training workers for {limit:g} s while {self.doing}. If a step only needs "
                    "longer, raise deadline_s; else look at the workers' logs in the Ray session's folder"
                )
        if fit.error is not None:
            raise self._explained(fit.error) from fit.error

    def _take(self, word: Word) -> None:
        self.heard += 1
        match word:
            case Joined(_, actor):
                self.workers.append(actor)
            case At(doing):
                self.doing = doing
            case Logged(step, metrics):
                self.doing = f"training step {step + 1}"
                self.steps.append(word)
                if metrics:
                    self.tracker.log(step, metrics)
                if self.progress is None:
                    self.progress = self.tracker.progress(self.job.steps, self.tracker.stage)
                else:
                    self.progress.advance(loss=metrics[self._loss])
            case Saved():
                self.saved = word
            case Failed():
                self.failed.append(word)

    def _explained(self, error: BaseException) -> RLHFError:
        """A worker's own error first; then a death, of which other workers' errors are only echoes."""
        for word in self.failed:
            if isinstance(word.error, RLHFError):
                return word.error
        deaths = _deaths(error)
        if deaths:
            return TrainingError(f"a training worker died while {self.doing}: {deaths[0]}")
        if self.failed:
            return TrainingError(f"rank {self.failed[0].rank} failed while {self.doing}: {self.failed[0].error}")
        return TrainingError(f"Ray Train failed while {self.doing}: {_short(error)}")

    def _end(self, fit: "Fit") -> None:
        """Workers that do not end by themselves are killed."""
        import ray

        if not fit.done:
            for worker in self.workers:
                ray.kill(worker)
        fit.join(ENDING_S)

    @property
    def _loss(self) -> str:
        return f"{self.tracker.stage}/loss"

    def _summary(self, seconds: float) -> dict[str, Any]:
        losses = [word.metrics[self._loss] for word in self.steps if word.step > 0]
        held_out = [word.metrics for word in self.steps if f"{self._loss}_held_out" in word.metrics]
        last = losses[-LAST_STEPS:]
        measured = {}
        if held_out:
            measured = {"held_out_first": _held_out(held_out[0]), "held_out_last": _held_out(held_out[-1])}
        assert self.saved is not None
        return {
            "model": self.saved.path,
            "loss_first": losses[0],
            "loss_last": sum(last) / len(last),
            **measured,
            **self.saved.report,
            "steps": len(losses),
            "rows": len(self.job.train),
            "rows_held_out": len(self.job.held_out),
            "seconds": seconds,
        }


class Fit:
    """Ray Train's `fit`, which blocks, in a thread of its own."""

    def __init__(self, job: Job, feed: Any, folder: Path) -> None:
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(job, feed, folder), daemon=True, name="ray-train")
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self, job: Job, feed: Any, folder: Path) -> None:
        try:
            _trainer(job, feed, folder).fit()
        except Exception as error:  # noqa: BLE001  the thread that listens raises it
            self.error = error
        finally:
            shutil.rmtree(folder / RAY_TRAIN, ignore_errors=True)  # only marks that Ray Train makes for itself


def _trainer(job: Job, feed: Any, folder: Path) -> Any:
    os.environ.update(ray_train_environment())
    import ray
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    class Trainer(TorchTrainer):
        """Without the detached actor that clears up after a dead controller: a second in every run, and it asks the
        dashboard, or whatever cluster it finds on this machine. The job's end removes the placement group anyway."""

        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [each for each in callbacks if type(each).__name__ != "PlacementGroupCleanerCallback"]

    class Backend(TorchConfig().backend_cls):  # type: ignore[misc]
        """Each worker sees its own device only, as every other actor of ours does."""

        share_cuda_visible_devices = False

    class Torch(TorchConfig):
        @property
        def backend_cls(self) -> type:
            return Backend

    config = job.config
    resources = _worker_resources(config)
    return Trainer(
        train_loop,
        train_loop_config={"job": ray.put(job), "feed": feed},
        torch_config=Torch(timeout_s=max(1, int(config.deadline_s))),
        scaling_config=ScalingConfig(
            num_workers=config.workers.ranks, use_gpu=config.device == "gpu", resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=RAY_TRAIN,
            storage_path=str(folder.resolve()),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            worker_runtime_env={"env_vars": torch_environment(max(1, int(config.workers.cpus)))},
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _worker_resources(config: SupervisedConfig) -> dict[str, float]:
    workers = config.workers
    return {"CPU": workers.cpus, "GPU": workers.gpus} if workers.gpus else {"CPU": workers.cpus}


def _check_resources(config: SupervisedConfig) -> None:
    """Ray Train would wait for what a cluster does not have."""
    import ray

    bundles = tuple(_worker_resources(config) for _ in range(config.workers.ranks))
    lacking = shortage([Group(("workers",), bundles)], [node["Resources"] for node in ray.nodes() if node["Alive"]])
    if lacking:
        raise ResourceError(f"{lacking}. Ask for less in `workers`, or add machines")


def _with_absolute_paths(config: SupervisedConfig) -> SupervisedConfig:
    """A worker's current directory is not the driver's."""
    local = Path(config.model)
    return config.model_copy(update={"model": str(local.resolve())}) if local.exists() else config


def _deaths(error: BaseException) -> list[str]:
    from ray.exceptions import RayActorError

    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    causes = [(rank, getattr(failure, "health_check_failure", failure)) for rank, failure in sorted(failures.items())]
    return [f"rank {rank}: {_short(cause)}" for rank, cause in causes if isinstance(cause, RayActorError)]


def _short(error: BaseException, lines: int = 4) -> str:
    said: Sequence[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " | ".join(said[:lines]) or type(error).__name__


def _held_out(metrics: dict[str, float]) -> dict[str, float]:
    """Those measured on held-out rows, by the names that training rows have."""
    ending = "_held_out"
    return {name.removesuffix(ending): value for name, value in metrics.items() if name.endswith(ending)}
