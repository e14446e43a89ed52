"""The reward model: people's preferences between two answers become one score an answer.

Both answers of a pair lie in one pass, because their loss is a function of both scores. What remains of the training
besides the weights is the mean and deviation of the scores on held-out answers, kept in config.json: PPO reads scores
in these units, so that a KL coefficient means the same for every reward model.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rlhf_ray.algorithms import preference_loss
from rlhf_ray.config.supervised import RewardConfig, SupervisedConfig
from rlhf_ray.data.quarantine import Quarantine
from rlhf_ray.data.rows import PreferencePair, preference_pairs
from rlhf_ray.models import load
from rlhf_ray.models.heads import Scores
from rlhf_ray.models.packed import Packed
from rlhf_ray.records import Ragged
from rlhf_ray.stages import supervised
from rlhf_ray.stages.supervised_rank import Objective, Rows
from rlhf_ray.telemetry.plots import plot_reliability
from rlhf_ray.telemetry.tracker import Tracker

ALL = "all"
"""Stands for every source in a table of sources."""


def run(config: RewardConfig, address: str | None = None) -> dict[str, Any]:
    """The whole stage; returns what summary.json says. Any failure ends it with an RLHFError."""
    with Tracker(config, "reward") as tracker:
        tokenizer, context = supervised.read_model(config)
        pairs = preference_pairs(config.data, tokenizer, Quarantine(tracker.folder.path / "quarantine.jsonl"))
        objective = Preferences(pairs, config.centre)
        supervised.check_lengths(config, int(objective.answers.lengths.max()), int(objective.lengths.max()), context)
        summary = supervised.train(config, objective, tracker, address)
        if "reliability" in summary:
            plot_reliability(summary["reliability"], tracker.folder.path / "reliability.png")
        tracker.summary(summary)
        return summary


class Preferences(Objective):
    """Bradley-Terry on pairs. A row's two outputs are the raw scores of its chosen and its rejected answer."""

    outputs = 2

    def __init__(self, pairs: Sequence[PreferencePair], centre: float) -> None:
        self.centre = centre
        self.answers = Ragged.of(
            [np.concatenate([pair.prompt, answer]) for pair in pairs for answer in (pair.chosen, pair.rejected)],
            np.int32,
        )
        """Sequences 2i and 2i + 1 are prompt with chosen and prompt with rejected answer of pair i."""
        self.lengths = self.answers.lengths.astype(np.int64).reshape(-1, 2).sum(1)
        self.answer_lengths = np.array([(len(pair.chosen), len(pair.rejected)) for pair in pairs])
        self.weights = np.ones(len(pairs), np.int64)
        self.sources = np.array([pair.source for pair in pairs])
        self.p = np.array([1.0 if pair.p is None else pair.p for pair in pairs], np.float32)
        self.margins = np.array([pair.margin or 0.0 for pair in pairs], np.float32)

    def module(self, config: SupervisedConfig) -> nn.Module:
        return Scores(load.classifier(config.model, config.device, config.trust_remote_code))

    def forward(self, engine: Any, rows: Rows, device: torch.device) -> Tensor:
        sequences = [self.answers[place] for row in rows for place in (2 * row, 2 * row + 1)]
        return engine(Packed.of(sequences, [len(sequence) for sequence in sequences], device)).view(-1, 2)

    def losses(self, outputs: Tensor, rows: Rows) -> Tensor:
        p = torch.from_numpy(self.p[rows]).to(outputs.device)
        margins = torch.from_numpy(self.margins[rows]).to(outputs.device)
        chosen, rejected = outputs.unbind(1)
        return preference_loss.bradley_terry(chosen, rejected, p, margins, self.centre)

    def step_metrics(self, outputs: Tensor, rows: Rows) -> dict[str, float]:
        predicted, labels = self._predicted(outputs, rows)
        return {
            "reward/loss": float(self.loss(outputs, rows)),
            "reward/accuracy": float(preference_loss.accuracy(predicted, labels)),
            "reward/margin": float((outputs[:, 0] - outputs[:, 1]).mean()),
            "reward/tokens": float(self.lengths[rows].sum()),
        }

    def held_out_metrics(self, outputs: Tensor, rows: Rows) -> dict[str, float]:
        found = {"reward/loss_held_out": float(self.loss(outputs, rows))}
        for source, some in self._by_source(rows).items():
            prefix = f"reward/{source}/" if source else "reward/"
            measures = self._measures(outputs[some], rows[some])
            found |= {f"{prefix}{name}_held_out": value for name, value in measures.items()}
        return found

    def report(self, outputs: Tensor, rows: Rows) -> dict[str, Any]:
        """Reliability of all rows and of each source: of each bin of confidence, the empty ones left out, the count of
        pairs, the mean predicted probability, and the share of pairs in which the prediction is right."""
        tables = {}
        for source, some in self._by_source(rows).items():
            found = preference_loss.reliability(*self._predicted(outputs[some], rows[some]))
            full = found.counts > 0
            counts, predicted, share = (column[full].tolist() for column in found)
            tables[source or ALL] = {"count": counts, "predicted": predicted, "share": share}
        return {"reliability": tables}

    def describe(self, model_config: Any, outputs: Tensor) -> None:
        """Scores that are all the same have no scale to keep."""
        scores = outputs.double()
        if scores.std(correction=0) > 0:
            found = {"mean": float(scores.mean()), "sd": float(scores.std(correction=0))}
            setattr(model_config, load.NORMALISATION, found)

    def _by_source(self, rows: Rows) -> dict[str, NDArray[np.bool_]]:
        """[n] which of `rows` are of each source, by its name; all of them by an empty name, which comes first."""
        sources = self.sources[rows]
        return {"": np.full(len(rows), True)} | {str(name): sources == name for name in np.unique(sources)}

    def _measures(self, outputs: Tensor, rows: Rows) -> dict[str, float]:
        """What does not apply is left out: without pairs on both sides no accuracy is controlled for length."""
        predicted, labels = self._predicted(outputs, rows)
        lengths = torch.from_numpy(self.answer_lengths[rows])
        found = {
            "accuracy": preference_loss.accuracy(predicted, labels),
            "length_controlled_accuracy": preference_loss.length_controlled_accuracy(predicted, labels, lengths),
            "margin": (outputs[:, 0] - outputs[:, 1]).mean(),
            "ece": preference_loss.expected_calibration_error(predicted, labels),
            "brier": preference_loss.brier(predicted, labels),
        }
        return {name: float(value) for name, value in found.items() if not value.isnan()}

    def _predicted(self, outputs: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """[n] probability that chosen is better, [n] label."""
        return (outputs[:, 0] - outputs[:, 1]).sigmoid(), torch.from_numpy(self.p[rows])
