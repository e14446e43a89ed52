"""One rank of supervised training under Ray Train: DeepSpeed inside, packed micro-batches, one loss in two forms.

All ranks hold all rows (in the object store, once a machine) and derive the same plan from lengths and seed: which
rows form a step, which rank computes which of them, in which passes. A step's loss is the sum over its rows divided by
their global count, so neither ranks nor micro-batches change the gradient. Every rank makes the same number of passes,
padded with passes that count zero: from ZeRO 2 on an uneven number hangs. A loss that is not finite is never applied.
"""

import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn

from rlhf_ray.config.supervised import SupervisedConfig
from rlhf_ray.data.order import MixedOrder, SampleOrder
from rlhf_ray.data.packing import balanced, micro_batches
from rlhf_ray.data.templates import ensure_chat_template
from rlhf_ray.errors import RLHFError, TrainingError
from rlhf_ray.models import load, zero
from rlhf_ray.models.device import torch_device
from rlhf_ray.models.heads import TokenLogprobs
from rlhf_ray.runtime import checkpoints
from rlhf_ray.runtime.feed import At, Failed, Joined, Logged, Saved, Word

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = NDArray[np.int64]
"""[n] numbers of rows: examples of SFT, pairs of the reward model."""

MEASURING = "measuring held-out rows"


class Measured(ABC):
    """Rows of which a model computes K outputs each."""

    lengths: NDArray[np.int64]
    """[rows] tokens."""
    outputs: int
    """K"""

    @abstractmethod
    def forward(self, engine: Any, rows: Rows, device: torch.device) -> Tensor:
        """[n, K] outputs of `rows`, computed as one packed pass."""


Measure = Callable[[Measured, Rows], Tensor]
"""[n, K] outputs of rows by the model as it is, without gradients, on every rank's CPU. A collective."""


class Objective(Measured):
    """Rows and what is learnt from them. A loss is a function of a row's outputs and of what was noted before."""

    weights: NDArray[np.int64]
    """[rows] what each row adds to the count that a step's loss is divided by."""
    sources: NDArray[np.str_]
    """[rows] name of the source that each row came from."""

    @abstractmethod
    def module(self, config: SupervisedConfig) -> nn.Module:
        """The model with its head; its `model` is what gets saved."""

    def before_training(self, rows: Rows, measure: Measure) -> None:
        """Notes what the untrained model says of `rows`, once for the rows to train on and once for those held out."""

    def before_losses(self, rows: Rows, measure: Measure) -> None:
        """Notes what the losses of `rows`, a step's or those held out, need of all of them together."""

    @abstractmethod
    def losses(self, outputs: Tensor, rows: Rows) -> Tensor:
        """[n] from `outputs` [n, K]."""

    @abstractmethod
    def step_metrics(self, outputs: Tensor, rows: Rows) -> dict[str, float]:
        """What a step logs, besides learning rate, gradient norm and time."""

    @abstractmethod
    def held_out_metrics(self, outputs: Tensor, rows: Rows) -> dict[str, float]:
        """What is measured on rows kept from training."""

    def after_step(self, engine: Any, step: int) -> dict[str, float]:
        """What follows optimiser step `step`, or, as step 0, the model's loading; more metrics. A collective."""
        return {}

    def beside(self, engine: Any) -> dict[str, dict[str, Tensor]]:
        """Files of tensors that are saved with the model, by path in its folder. A collective; rank 0 writes."""
        return {}

    def describe(self, model_config: Any, outputs: Tensor) -> None:
        """Notes in the model's config.json, before it is saved, what `outputs` on held-out rows say of it."""

    def report(self, outputs: Tensor, rows: Rows) -> dict[str, Any]:
        """What the run's summary says, besides metrics, of held-out rows with `outputs`."""
        return {}

    def loss(self, outputs: Tensor, rows: Rows) -> Tensor:
        """[] mean over the count of `rows`."""
        return self.losses(outputs, rows).sum() / int(self.weights[rows].sum())


@dataclass(frozen=True)
class Job:
    """What every rank is told."""

    config: SupervisedConfig
    objective: Objective
    train: Rows
    held_out: Rows
    checkpoints: str
    """Folder for checkpoints, on a file system that driver and ranks share."""

    @property
    def steps(self) -> int:
        training = self.config.training
        return math.ceil(training.epochs * len(self.train) / training.sequences_per_step)

    def order(self) -> SampleOrder:
        """In which places in `train` are trained on."""
        weights, seed = self.config.data.weights, self.config.seed
        if weights is None:
            return SampleOrder(len(self.train), seed)
        return MixedOrder(self.objective.sources[self.train], weights, seed)

    def ends_epoch(self, step: int) -> bool:
        """Whether the rows drawn up to `step` (from 1) complete an epoch that those before it did not."""
        size = self.config.training.sequences_per_step
        taken = min(step * size, self.config.training.epochs * len(self.train))
        return taken // len(self.train) > (step - 1) * size // len(self.train)


def train_loop(told: dict[str, Any]) -> None:
    """What Ray Train runs in each worker."""
    import ray
    import ray.train

    job: Job = ray.get(told["job"])
    rank = ray.train.get_context().get_world_rank()

    def tell(word: Word) -> bool:
        return ray.get(told["feed"].tell.remote(word), timeout=job.config.deadline_s)

    tell(Joined(rank, ray.get_runtime_context().current_actor))
    # A worker sees its own device only, whatever its number on this machine.
    os.environ["LOCAL_RANK"] = "0"
    try:
        Rank(job, rank, distributed.get_world_size(), tell).train()
    except RLHFError as error:
        tell(Failed(rank, error))
        raise
    except Exception as error:
        tell(Failed(rank, f"{type(error).__name__}: {error}"))
        raise


@dataclass(frozen=True)
class Pass:
    """Some of the rows of a step, which one forward pass takes together."""

    places: list[int]
    """Where they stand in the step's rows; a small data set may be drawn twice in one step."""
    real: bool
    """False for a pass that only keeps ranks in step; its loss counts zero."""


def passes(lengths: list[int], budget: int, rank: int, world: int) -> list[Pass]:
    """The share of `rank` in rows of `lengths` tokens: as many passes as every other rank makes, at least one."""
    shares = [
        [[part[place] for place in pack] for pack in micro_batches([lengths[place] for place in part], budget)]
        for part in balanced(lengths, world)
    ]
    mine = [Pass(places, real=True) for places in shares[rank]]
    missing = max(len(share) for share in shares) - len(mine)
    return mine + [Pass([0], real=False)] * missing


class Rank:
    """`tell` brings a word to the driver and answers whether a stop was asked for."""

    def __init__(self, job: Job, rank: int, world: int, tell: Callable[[Word], bool]) -> None:
        config, training = job.config, job.config.training
        self.job, self.rank, self.world, self.tell = job, rank, world, tell
        self.device = torch_device(config.device)
        self.stop_asked = False
        self.measured: tuple[int, Tensor] | None = None
        """Step, and outputs of the held-out rows after it."""
        self._at(f"loading '{config.model}'")
        torch.manual_seed(config.seed)
        sharded = zero.sharded_loading(training.optimizer, training.zero, config.device)
        self.module: Any = job.objective.module(config)
        del sharded
        self.engine = zero.make_engine(self.module, training.optimizer, training.zero, config.device, job.steps)
        self.engine.train()
        job.objective.after_step(self.engine, 0)

    def train(self) -> None:
        """All steps, measuring held-out rows before the first and after every epoch; saves the model."""
        config, training = self.job.config, self.job.config.training
        order = self.job.order()
        self._note_reference()
        self._log(0, self._measure(0))
        left = training.epochs * len(self.job.train)
        for step in range(1, self.job.steps + 1):
            if self._stop_agreed():
                self._save("stopped", step - 1)
                return
            started = time.monotonic()
            rows = self.job.train[order.take(min(left, training.sequences_per_step))]
            left -= len(rows)
            metrics = self._step(rows, step)
            metrics["time/step"] = time.monotonic() - started
            metrics["epoch"] = training.epochs - left / len(self.job.train)
            if self.job.ends_epoch(step):
                metrics |= self._measure(step)
            self._log(step, metrics)
            if step < self.job.steps and config.checkpoint.every and step % config.checkpoint.every == 0:
                self._save(f"step_{step:06d}", step)
        self._save("final", self.job.steps)

    def _step(self, rows: Rows, step: int) -> dict[str, float]:
        """One optimiser step. Raises TrainingError, with parameters unchanged, when the loss is not finite."""
        objective = self.job.objective
        # DeepSpeed averages gradients over ranks; sums over rows need the world back.
        scale = self.world / int(objective.weights[rows].sum())
        objective.before_losses(rows, partial(self._outputs, f"training step {step}"))
        table = Table(len(rows), objective.outputs, self.device)
        for batch in self._passes(objective, rows):
            some = rows[batch.places]
            outputs = objective.forward(self.engine, some, self.device)
            self.engine.backward(objective.losses(outputs, some).sum() * scale * batch.real)
            table.fill(batch, outputs)
        outputs = table.gather()
        loss = float(objective.loss(outputs, rows))
        learning_rate = self.engine.get_lr()[0]
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss of step {step} is {loss} (learning rate {learning_rate:g}, {len(rows)} rows of "
                f"{int(objective.lengths[rows].sum())} tokens); the step was not taken. Usual causes are a learning "
                "rate too high and a model whose weights are not finite"
            )
        norm = zero.step(self.engine, f"step {step}")
        metrics = objective.step_metrics(outputs, rows) | objective.after_step(self.engine, step)
        return {**metrics, "lr/model": learning_rate, "model/grad_norm": norm}

    def _note_reference(self) -> None:
        measure = partial(self._outputs, "measuring the model before its training")
        for rows in (self.job.train, self.job.held_out):
            self.job.objective.before_training(rows, measure)

    def _measure(self, step: int) -> dict[str, float]:
        """Metrics of the held-out rows after `step`; none where no row is held out."""
        objective, rows = self.job.objective, self.job.held_out
        if len(rows) == 0:
            return {}
        objective.before_losses(rows, partial(self._outputs, MEASURING))
        return objective.held_out_metrics(self._held_out_outputs(step), rows)

    def _held_out_outputs(self, step: int) -> Tensor:
        if self.measured is None or self.measured[0] != step:
            self.measured = (step, self._outputs(MEASURING, self.job.objective, self.job.held_out))
        return self.measured[1]

    @torch.no_grad()
    def _outputs(self, doing: str, measured: Measured, rows: Rows) -> Tensor:
        """What the driver hears that the workers are `doing`; else see `Measure`."""
        if len(rows) == 0:
            return torch.zeros(0, measured.outputs)
        table = Table(len(rows), measured.outputs, self.device)
        for batch in self._passes(measured, rows):
            self._at(doing)
            table.fill(batch, measured.forward(self.engine, rows[batch.places], self.device))
        return table.gather()

    def _save(self, name: str, step: int) -> None:
        """Writes the model as a Hugging Face folder. A collective; rank 0 writes."""
        config = self.job.config
        self._at(f"saving checkpoint '{name}'")
        report: dict[str, Any] = {}
        if len(self.job.held_out):
            outputs = self._held_out_outputs(step)
            self.job.objective.describe(self.module.model.config, outputs)
            report = self.job.objective.report(outputs, self.job.held_out)
        weights = {
            name: weight.cpu().clone() if self.rank == 0 else None
            for name, weight in zero.whole_weights(self.engine, self.module.model.named_parameters())
        }
        beside = self.job.objective.beside(self.engine)
        if self.rank > 0:
            return
        tokens = training_tokenizer(config)
        self.module.model.config.pad_token_id = tokens.pad_token_id
        place = checkpoints.write(
            Path(self.job.checkpoints),
            name,
            lambda folder: load.save(self.module.model, tokens, folder, weights, beside),
            {"step": step},
            config.checkpoint.keep,
            sum(t.nbytes for tensors in (weights, *beside.values()) for t in tensors.values() if t is not None),
        )
        self._tell(Saved(str(place), report))

    def _passes(self, measured: Measured, rows: Rows) -> list[Pass]:
        budget = self.job.config.training.tokens_per_micro_batch
        return passes(measured.lengths[rows].tolist(), budget, self.rank, self.world)

    def _stop_agreed(self) -> bool:
        asked = torch.tensor(float(self.stop_asked), device=self.device)
        distributed.all_reduce(asked, op=distributed.ReduceOp.MAX)
        return asked.item() > 0

    def _at(self, doing: str) -> None:
        self._tell(At(doing))

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        self._tell(Logged(step, metrics))

    def _tell(self, word: Word) -> None:
        """Rank 0 speaks for all."""
        if self.rank == 0:
            self.stop_asked = self.tell(word)


class Table:
    """Outputs [n, K] of n rows that ranks compute in parts."""

    def __init__(self, rows: int, outputs: int, device: torch.device) -> None:
        self.values = torch.zeros(rows, outputs, device=device)

    def fill(self, batch: Pass, outputs: Tensor) -> None:
        if batch.real:
            self.values[batch.places] = outputs.detach()

    def gather(self) -> Tensor:
        """The whole table on every rank, on the CPU. A collective."""
        distributed.all_reduce(self.values)
        return self.values.cpu()


def language_model(config: SupervisedConfig) -> TokenLogprobs:
    """What an objective on log-probabilities of tokens trains."""
    module = TokenLogprobs(load.causal_lm(config.model, config.device, config.trust_remote_code), temperature=1.0)
    if config.training.zero.stage == 3:
        module.keep_in_step(config.training.tokens_per_micro_batch)
    return module


def training_tokenizer(config: SupervisedConfig) -> "PreTrainedTokenizerBase":
    """The model's tokenizer with a chat template and a pad token, as it is trained with and saved.

    Padding is ours nowhere, but others who load the model pad. A token of its own is best: were it the EOS, a padded
    batch would be scored one token before the end.
    """
    tokens = ensure_chat_template(load.tokenizer(config.model, "model", config.trust_remote_code))
    if tokens.pad_token is None:
        named = [token for token in tokens.get_vocab() if "pad" in token and token in tokens.all_special_tokens]
        tokens.pad_token = next(iter([*named, tokens.unk_token or tokens.eos_token]))
    return tokens
