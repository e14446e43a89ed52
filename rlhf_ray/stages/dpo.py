"""Direct preference learning: a language model is its own reward model, and no other is trained.

The reward of an answer is beta (log pi - log pi_ref). The reference is the model as it was before the first step: its
log-probabilities of every row are noted then, by the workers that go on to train it, so no second model is ever in
memory and every log-ratio starts at zero. A reference must never be taken of a model that has already moved.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rlhf_ray.algorithms import preference_loss
from rlhf_ray.algorithms.statistics import sequence_sums
from rlhf_ray.config.supervised import DPOConfig, SupervisedConfig
from rlhf_ray.data.quarantine import Quarantine
from rlhf_ray.data.rows import Int32, JudgedAnswer, PreferencePair, judged_answers, preference_pairs
from rlhf_ray.errors import DataError
from rlhf_ray.models.packed import Packed
from rlhf_ray.records import Ragged
from rlhf_ray.stages import supervised
from rlhf_ray.stages.supervised_rank import Measure, Measured, Objective, Rows, language_model
from rlhf_ray.telemetry.tracker import Tracker


def run(config: DPOConfig, address: str | None = None) -> dict[str, Any]:
    """The whole stage; returns what summary.json says. Any failure ends it with an RLHFError."""
    with Tracker(config, "dpo") as tracker:
        tokenizer, context = supervised.read_model(config)
        quarantine = Quarantine(tracker.folder.path / "quarantine.jsonl")
        objective: Direct
        if config.loss == "kto":
            objective = Judged(judged_answers(config.data, tokenizer, quarantine), config)
        else:
            objective = Pairs(preference_pairs(config.data, tokenizer, quarantine), config)
        supervised.check_lengths(config, objective.longest_sequence, objective.longest_row, context)
        summary = supervised.train(config, objective, tracker, address)
        tracker.summary(summary)
        return summary


class Answers(Measured):
    """K answers to each row's prompt. Outputs are their log-probabilities in nats, summed over an answer's tokens."""

    def __init__(self, prompts: Sequence[Int32], answers: Sequence[Sequence[Int32]]) -> None:
        self.outputs = len(answers[0])
        self.sequences = Ragged.of(
            [np.concatenate([prompt, one]) for prompt, row in zip(prompts, answers, strict=True) for one in row],
            np.int32,
        )
        """K i to K i + K - 1 are the prompt of row i with each of its answers."""
        self.prompt_lengths = np.array([len(prompt) for prompt in prompts])
        self.lengths = self.sequences.lengths.astype(np.int64).reshape(-1, self.outputs).sum(1)
        self.reference = np.full((len(prompts), self.outputs), np.nan, np.float32)
        """[rows, K] outputs of the reference; NaN, which no training survives, until they are noted."""

    def forward(self, engine: Any, rows: Rows, device: torch.device) -> Tensor:
        places = [self.outputs * row + number for row in rows for number in range(self.outputs)]
        prompt_lengths = self.prompt_lengths[rows].repeat(self.outputs)
        packed = Packed.of([self.sequences[place] for place in places], prompt_lengths.tolist(), device)
        offsets = np.cumsum([0, *(self.sequences.lengths[places] - prompt_lengths)])
        sums = sequence_sums(engine(packed).logprobs, torch.from_numpy(offsets).to(device))
        return sums.view(-1, self.outputs)

    def note_reference(self, rows: Rows, measure: Measure) -> None:
        """From now on the model as it is is the reference of `rows`."""
        reference = self.reference.copy()  # what comes out of the object store is read-only
        reference[rows] = measure(self, rows).numpy()
        self.reference = reference

    def log_ratios(self, outputs: Tensor, rows: Rows) -> Tensor:
        """log pi - log pi_ref, [n, K] nats, of outputs [n, K] of `rows`."""
        return outputs - torch.from_numpy(self.reference[rows]).to(outputs.device)


class Direct(Objective):
    """What every loss here has: a policy, its reference, and rewards that are beta times their log-ratio."""

    def __init__(self, answers: Answers, sources: Sequence[str], beta: float) -> None:
        self.answers, self.beta, self.sources = answers, beta, np.array(sources)
        self.outputs, self.lengths = answers.outputs, answers.lengths
        self.weights = np.ones(len(answers.lengths), np.int64)

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt with an answer."""
        return int(self.answers.sequences.lengths.max())

    @property
    def longest_row(self) -> int:
        """Tokens that must lie in one micro-batch."""
        return int(self.lengths.max())

    def module(self, config: SupervisedConfig) -> nn.Module:
        return language_model(config)

    def forward(self, engine: Any, rows: Rows, device: torch.device) -> Tensor:
        return self.answers.forward(engine, rows, device)

    def before_training(self, rows: Rows, measure: Measure) -> None:
        self.answers.note_reference(rows, measure)

    @abstractmethod
    def metrics(self, outputs: Tensor, rows: Rows) -> dict[str, float]:
        """Of a step and of held-out rows alike."""

    def step_metrics(self, outputs: Tensor, rows: Rows) -> dict[str, float]:
        return {**self.metrics(outputs, rows), "dpo/tokens": float(self.lengths[rows].sum())}

    def held_out_metrics(self, outputs: Tensor, rows: Rows) -> dict[str, float]:
        return {f"{name}_held_out": value for name, value in self.metrics(outputs, rows).items()}


class Pairs(Direct):
    """DPO or IPO on pairs. A row's two outputs are of its chosen and its rejected answer."""

    def __init__(self, pairs: Sequence[PreferencePair], config: DPOConfig) -> None:
        answers = Answers([pair.prompt for pair in pairs], [(pair.chosen, pair.rejected) for pair in pairs])
        super().__init__(answers, [pair.source for pair in pairs], config.beta)
        self.loss_name, self.label_smoothing = config.loss, config.label_smoothing
        self.p = np.array([1.0 if pair.p is None else pair.p for pair in pairs], np.float32)

    def losses(self, outputs: Tensor, rows: Rows) -> Tensor:
        chosen, rejected = self.answers.log_ratios(outputs, rows).unbind(1)
        # Smoothing turns a label round with this probability.
        p = torch.from_numpy(self.p[rows]).to(outputs.device) * (1 - 2 * self.label_smoothing) + self.label_smoothing
        return preference_loss.PAIRED[self.loss_name](chosen, rejected, p, self.beta)

    def metrics(self, outputs: Tensor, rows: Rows) -> dict[str, float]:
        chosen, rejected = (self.beta * self.answers.log_ratios(outputs, rows)).unbind(1)
        margins = chosen - rejected
        return {
            "logps/chosen": float(outputs[:, 0].mean()),
            "logps/rejected": float(outputs[:, 1].mean()),
            "dpo/loss": float(self.loss(outputs, rows)),
            "rewards/chosen": float(chosen.mean()),
            "rewards/rejected": float(rejected.mean()),
            "rewards/margins": float(margins.mean()),
            "rewards/accuracies": float(preference_loss.accuracy(margins.sigmoid(), torch.from_numpy(self.p[rows]))),
        }


class Judged(Direct):
    """KTO on single answers. Its reference point is taken of the step's prompts with answers to other prompts."""

    def __init__(self, rows: Sequence[JudgedAnswer], config: DPOConfig) -> None:
        prompts, answers = [row.prompt for row in rows], [row.answer for row in rows]
        sources = [row.source for row in rows]
        super().__init__(Answers(prompts, [[answer] for answer in answers]), sources, config.beta)
        self.desirable = np.array([row.desirable for row in rows])
        self.desirable_weight, self.undesirable_weight = config.desirable_weight, config.undesirable_weight
        # Cut where need be: these answers are only read, and a prompt with another's answer may be the longest of all.
        foreign = [
            answers[partner][: config.data.max_tokens - len(prompt)]
            for prompt, partner in zip(prompts, partners(prompts, config.seed), strict=True)
        ]
        self.mismatched = Answers(prompts, [[answer] for answer in foreign])
        self.reference_point = torch.tensor(torch.nan)
        """[] nats, of the rows that losses are asked for."""

    @property
    def longest_sequence(self) -> int:
        return max(super().longest_sequence, int(self.mismatched.lengths.max()))

    @property
    def longest_row(self) -> int:
        return self.longest_sequence

    def before_training(self, rows: Rows, measure: Measure) -> None:
        super().before_training(rows, measure)
        self.mismatched.note_reference(rows, measure)

    def before_losses(self, rows: Rows, measure: Measure) -> None:
        log_ratios = self.mismatched.log_ratios(measure(self.mismatched, rows), rows)
        self.reference_point = preference_loss.kto_reference_point(log_ratios)

    def losses(self, outputs: Tensor, rows: Rows) -> Tensor:
        return preference_loss.kto(
            self.answers.log_ratios(outputs, rows)[:, 0],
            torch.from_numpy(self.desirable[rows]).to(outputs.device),
            self.reference_point.to(outputs.device),
            self.beta,
            self.desirable_weight,
            self.undesirable_weight,
        )

    def metrics(self, outputs: Tensor, rows: Rows) -> dict[str, float]:
        """A step may lack one of the two sides; then its means and the margin are absent."""
        desirable = torch.from_numpy(self.desirable[rows])
        sides = {"chosen": desirable, "rejected": ~desirable}
        there = {side: members for side, members in sides.items() if members.any()}
        log_ratios = self.answers.log_ratios(outputs, rows)[:, 0]
        rewards = {side: float(self.beta * log_ratios[members].mean()) for side, members in there.items()}
        found = (self.beta * (log_ratios - self.reference_point)).sigmoid()
        return {
            **{f"logps/{side}": float(outputs[members].mean()) for side, members in there.items()},
            "dpo/loss": float(self.loss(outputs, rows)),
            **{f"rewards/{side}": reward for side, reward in rewards.items()},
            **({"rewards/margins": rewards["chosen"] - rewards["rejected"]} if len(rewards) == 2 else {}),
            "rewards/accuracies": float(preference_loss.accuracy(found, desirable.float())),
            "kto/kl": float(self.reference_point),
        }


def partners(prompts: Sequence[Int32], seed: int) -> NDArray[np.int64]:
    """[rows] whose answer each row's prompt is mismatched with: every row once, never one of the same prompt.

    Depends on prompts and seed alone. Raises DataError when one prompt has more than half of the rows.

    Rows that share a prompt lie side by side in a shuffled circle, and each row's partner is as far along the circle
    as the largest such group is long.
    """
    numbers: dict[bytes, int] = {}
    group = np.array([numbers.setdefault(prompt.tobytes(), len(numbers)) for prompt in prompts])
    largest = int(np.bincount(group).max())
    if 2 * largest > len(prompts):
        raise DataError(
            f"loss kto compares answers with those to other prompts, but one prompt has {largest} of the "
            f"{len(prompts)} rows; add rows with other prompts"
        )
    # A spawn key sets this stream apart from those of the epochs and of the held-out rows.
    shuffle = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2,))).permutation(len(numbers))
    circle = np.argsort(shuffle[group], kind="stable")
    found = np.empty(len(prompts), np.int64)
    found[circle] = np.roll(circle, -largest)
    return found
