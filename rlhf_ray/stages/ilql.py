"""Implicit language Q-learning: from answers and what they earned, values of next tokens that steer decoding.

Nothing is sampled. Policy, Q and V are learnt in one pass over the answers at hand; the reward stands at an answer's
last token, its EOS, and reaches those before it through V. Targets follow Q by optimiser steps, never by epochs: were
they synced less often than configured, Q would chase what it was at the start.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_ray.algorithms import q_learning
from rlhf_ray.algorithms.statistics import sequence_sums
from rlhf_ray.config.ilql import ILQLConfig
from rlhf_ray.config.supervised import SupervisedConfig
from rlhf_ray.data.quarantine import Quarantine
from rlhf_ray.data.rows import RewardedAnswer, rewarded_answers
from rlhf_ray.errors import DataError
from rlhf_ray.models import load, zero
from rlhf_ray.models.packed import Packed
from rlhf_ray.models.q_heads import FILE, SETTINGS, QLearner
from rlhf_ray.records import Ragged
from rlhf_ray.stages import supervised
from rlhf_ray.stages.supervised_rank import Objective, Rows
from rlhf_ray.telemetry.tracker import Tracker

KEPT = ("tau", "gamma", "cql", "awac_beta", "decode_beta", "alpha", "sync_every")
"""Settings that the checkpoint's config.json has, besides `reward_unit`."""
TD, EXPECTILE, CONSERVATIVE, AWAC, CROSS_ENTROPY, Q, V, ADVANTAGE_SQUARED = range(8)
"""A row's outputs, each summed over its answer tokens."""
QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}


def run(config: ILQLConfig, address: str | None = None) -> dict[str, Any]:
    """The whole stage; returns what summary.json says. Any failure ends it with an RLHFError."""
    with Tracker(config, "ilql") as tracker:
        tokenizer, context = supervised.read_model(config)
        answers = rewarded_answers(config.data, tokenizer, Quarantine(tracker.folder.path / "quarantine.jsonl"))
        objective = ImplicitQ(answers, config)
        longest = int(objective.lengths.max())
        supervised.check_lengths(config, longest, longest, context)
        summary = supervised.train(config, objective, tracker, address)
        tracker.summary(summary)
        return summary


class ImplicitQ(Objective):
    """Losses of Q, V and policy. All are sums over tokens, and so are a row's outputs."""

    outputs = 8

    def __init__(self, answers: Sequence[RewardedAnswer], config: ILQLConfig) -> None:
        """Raises DataError when all rewards are the same."""
        self.config = config
        self.sequences = Ragged.of([np.concatenate([row.prompt, row.answer]) for row in answers], np.int32)
        self.prompt_lengths = np.array([len(row.prompt) for row in answers])
        self.lengths = self.sequences.lengths.astype(np.int64)
        self.weights = self.lengths - self.prompt_lengths
        self.sources = np.array([row.source for row in answers])
        rewards = np.array([row.reward for row in answers], np.float64)
        if rewards.min() == rewards.max():
            raise DataError(
                f"all {len(rewards)} rows have the reward {rewards[0]:g}, so no answer is better than another; give "
                "rows whose rewards differ"
            )
        self.unit = float(rewards.std()) if config.scale_rewards else 1.0
        """What one unit of Q and V is in the data's rewards."""
        self.rewards = (rewards / self.unit).astype(np.float32)
        self.syncs = 0

    def module(self, config: SupervisedConfig) -> nn.Module:
        module = QLearner(load.causal_lm(config.model, config.device, config.trust_remote_code))
        if config.training.zero.stage == 3:
            module.keep_in_step(config.training.tokens_per_micro_batch)
        settings = {name: getattr(self.config, name) for name in KEPT} | {"reward_unit": self.unit}
        setattr(module.model.config, SETTINGS, settings)
        return module

    def forward(self, engine: Any, rows: Rows, device: torch.device) -> Tensor:
        config = self.config
        packed = Packed.of([self.sequences[row] for row in rows], self.prompt_lengths[rows].tolist(), device)
        offsets = torch.from_numpy(np.cumsum([0, *self.weights[rows]])).to(device)
        found = engine(packed)
        rewards = torch.zeros_like(found.values)
        rewards[offsets[1:] - 1] = torch.from_numpy(self.rewards[rows]).to(device)
        target = q_learning.td_target(rewards, found.values, offsets, config.gamma)
        advantages = found.target_q - found.values
        terms = {
            TD: q_learning.td_loss(found.q, target),
            EXPECTILE: q_learning.expectile_loss(found.values, found.target_q, config.tau),
            CONSERVATIVE: found.conservative,
            AWAC: q_learning.awac_loss(found.logprobs, found.values, found.target_q, config.awac_beta),
            CROSS_ENTROPY: -found.logprobs,
            Q: found.target_q,
            V: found.values,
            ADVANTAGE_SQUARED: advantages.square(),
        }
        return torch.stack([sequence_sums(terms[place], offsets) for place in range(self.outputs)], 1)

    def losses(self, outputs: Tensor, rows: Rows) -> Tensor:
        return outputs[:, TD] + outputs[:, EXPECTILE] + self.config.cql * outputs[:, CONSERVATIVE] + outputs[:, AWAC]

    def after_step(self, engine: Any, step: int) -> dict[str, float]:
        module: QLearner = engine.module
        names = module.q_names
        heads = [(name, weight) for name, weight in module.named_parameters() if name in names]
        due = step % self.config.sync_every == 0
        self.syncs += due and step > 0  # at step 0 targets become what Q is
        distance = module.follow(zero.whole_weights(engine, iter(heads)), self.config.alpha if due else 0.0)
        return {"ilql/target_distance": distance, "ilql/target_syncs": float(self.syncs)}

    def beside(self, engine: Any) -> dict[str, dict[str, Tensor]]:
        module: QLearner = engine.module
        heads = [(name, weight) for name, weight in module.named_parameters() if not name.startswith("model.")]
        tensors = {
            name: weight.cpu().clone()
            for name, weight in zero.whole_weights(engine, iter(heads))
            if engine.global_rank == 0  # others take part in gathering and keep nothing
        }
        return {FILE: tensors | {name: target.cpu() for name, target in module.targets_by_name.items()}}

    def metrics(self, outputs: Tensor, rows: Rows) -> dict[str, float]:
        """Of a step and of held-out rows alike."""
        tokens = torch.from_numpy(self.weights[rows])
        means = outputs.double().sum(0) / tokens.sum()
        advantage = means[Q] - means[V]
        found = {
            "loss": self.loss(outputs, rows),
            "td_loss": means[TD],
            "expectile_loss": means[EXPECTILE],
            "conservative_loss": means[CONSERVATIVE],
            "awac_loss": means[AWAC],
            "cross_entropy": means[CROSS_ENTROPY],
            "advantage": advantage,
            "advantage_std": (means[ADVANTAGE_SQUARED] - advantage.square()).clamp(min=0).sqrt(),
        }
        for name, place in (("q", Q), ("v", V)):
            of_answers = outputs[:, place] / tokens
            found |= {f"{name}_{ending}": of_answers.quantile(share) for ending, share in QUANTILES.items()}
        return {f"ilql/{name}": float(value) for name, value in found.items()}

    def step_metrics(self, outputs: Tensor, rows: Rows) -> dict[str, float]:
        return {**self.metrics(outputs, rows), "ilql/tokens": float(self.weights[rows].sum())}

    def held_out_metrics(self, outputs: Tensor, rows: Rows) -> dict[str, float]:
        return {f"{name}_held_out": value for name, value in self.metrics(outputs, rows).items()}
