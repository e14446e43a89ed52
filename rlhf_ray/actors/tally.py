"""Sums over the tokens of all optimiser steps of an update, on one rank; means over all ranks at the end."""

from collections.abc import Mapping

import torch
from torch import Tensor, distributed

from rlhf_ray.actors.objective import PolicyTokens
from rlhf_ray.algorithms.value_loss import ValueLoss
from rlhf_ray.config.ppo import PPOConfig

POLICY = ("policy/approxkl_avg", "policy/clipfrac_avg", "val/ratio", "loss/policy_avg")
KL = ("loss/kl_avg",)
CRITIC = ("loss/value_avg", "val/clipfrac_avg")


class Tally:
    def __init__(self, config: PPOConfig, device: torch.device) -> None:
        """A rank without any answer sums the same names as the others."""
        with_kl, with_critic = config.ppo.kl.estimator.placement != "reward", config.ppo.algorithm.needs_critic
        self.names = (*POLICY, *(KL if with_kl else ()), *(CRITIC if with_critic else ()))
        self.sums = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)
        self.first_deviation = torch.zeros((), device=device)
        self.norms: dict[str, float] = {}

    def add(self, policy: PolicyTokens, value: ValueLoss | None) -> None:
        """All of n tokens."""
        surrogate = policy.surrogate
        columns: dict[str, Tensor | None] = {
            "policy/approxkl_avg": surrogate.approx_kl,
            "policy/clipfrac_avg": surrogate.clipped,
            "val/ratio": surrogate.ratio,
            "loss/policy_avg": surrogate.loss,
            "loss/kl_avg": policy.kl,
            "loss/value_avg": value.loss if value else None,
            "val/clipfrac_avg": value.clipped if value else None,
        }
        self.sums += torch.stack([_sum(columns[name]) for name in self.names])
        self.tokens += len(surrogate.loss)

    def note_first(self, policy: PolicyTokens) -> None:
        """Of the first minibatch: how far any ratio is from one."""
        deviation = (policy.surrogate.ratio - 1).abs().max()
        self.first_deviation = torch.maximum(self.first_deviation, deviation)

    def largest_first_deviation(self) -> float:
        """Over all ranks. A collective."""
        distributed.all_reduce(self.first_deviation, op=distributed.ReduceOp.MAX)
        return self.first_deviation.item()

    def means(self) -> Mapping[str, float]:
        """A collective."""
        everything = torch.cat([self.sums, self.tokens[None]])
        distributed.all_reduce(everything)
        *sums, tokens = everything.tolist()
        means = {name: total / max(tokens, 1.0) for name, total in zip(self.names, sums, strict=True)}
        return {**means, **self.norms, "val/ratio_max_first": self.first_deviation.item()}


def _sum(column: Tensor | None) -> Tensor:
    assert column is not None
    return column.detach().double().sum()
