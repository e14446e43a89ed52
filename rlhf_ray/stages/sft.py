"""Supervised fine-tuning: a language model learns to write the completions, and only those.

Prompts are read and never learnt: the loss is on the tokens that the mask names, each counting alike, so a step's loss
is the mean over its completion tokens whatever rows they stand in.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_ray.config.supervised import SFTConfig, SupervisedConfig
from rlhf_ray.data.quarantine import Quarantine
from rlhf_ray.data.rows import SFTExample, sft_examples
from rlhf_ray.models.packed import Packed
from rlhf_ray.records import Ragged
from rlhf_ray.stages import supervised
from rlhf_ray.stages.supervised_rank import Objective, Rows, language_model
from rlhf_ray.telemetry.tracker import Tracker


def run(config: SFTConfig, address: str | None = None) -> dict[str, Any]:
    """The whole stage; returns what summary.json says. Any failure ends it with an RLHFError."""
    with Tracker(config, "sft") as tracker:
        tokenizer, context = supervised.read_model(config)
        examples = sft_examples(config.data, tokenizer, Quarantine(tracker.folder.path / "quarantine.jsonl"))
        objective = NextToken(examples)
        longest = int(objective.lengths.max())
        supervised.check_lengths(config, longest, longest, context)
        summary = supervised.train(config, objective, tracker, address)
        tracker.summary(summary)
        return summary


class NextToken(Objective):
    """Cross-entropy of completion tokens. A row's one output is its summed loss in nats."""

    outputs = 1

    def __init__(self, examples: Sequence[SFTExample]) -> None:
        self.ids = Ragged.of([example.ids for example in examples], np.int32)
        self.masks = Ragged.of([example.loss_mask for example in examples], np.bool_)
        self.lengths = self.ids.lengths.astype(np.int64)
        # Nothing predicts a row's first token.
        self.sources = np.array([example.source for example in examples])
        self.weights = np.array([int(example.loss_mask[1:].sum()) for example in examples])

    def module(self, config: SupervisedConfig) -> nn.Module:
        return language_model(config)

    def forward(self, engine: Any, rows: Rows, device: torch.device) -> Tensor:
        packed = Packed.masked([self.ids[row] for row in rows], [self.masks[row] for row in rows], device)
        logprobs = engine(packed).logprobs
        row_of = torch.from_numpy(np.repeat(np.arange(len(rows)), self.weights[rows])).to(device)
        return torch.zeros(len(rows), device=device).index_add(0, row_of, -logprobs)[:, None]

    def losses(self, outputs: Tensor, rows: Rows) -> Tensor:
        return outputs[:, 0]

    def step_metrics(self, outputs: Tensor, rows: Rows) -> dict[str, float]:
        return {"sft/loss": float(self.loss(outputs, rows)), "sft/tokens": float(self.weights[rows].sum())}

    def held_out_metrics(self, outputs: Tensor, rows: Rows) -> dict[str, float]:
        return {"sft/loss_held_out": float(self.loss(outputs, rows))}
