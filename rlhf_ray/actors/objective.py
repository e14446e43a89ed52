"""From one forward pass over some answers to the losses whose gradients train. Pure functions of tensors.

A token's loss is multiplied by its weight in the whole minibatch before anything is summed; nothing here may depend on
which rank or micro-batch an answer lies in.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_ray.actors.experience import Batch, Experience, kl_tokens
from rlhf_ray.actors.reference import to_torch
from rlhf_ray.algorithms import policy_loss, value_loss
from rlhf_ray.algorithms.aggregation import AGGREGATIONS
from rlhf_ray.algorithms.logprobs import Reference, TokenStatistics
from rlhf_ray.algorithms.policy_loss import PolicyLoss
from rlhf_ray.algorithms.value_loss import ValueLoss
from rlhf_ray.algorithms.vocabulary_kl import FullReference, TopKReference
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.models.heads import Head
from rlhf_ray.records import token_places


class PolicyTokens(NamedTuple):
    """The policy's losses of n tokens."""

    total: Tensor
    """[n] what is weighed and summed: corrected surrogate, less the entropy bonus, plus the KL where it is a loss."""
    surrogate: PolicyLoss
    kl: Tensor | None
    """[n] nats, where it is a loss."""


@dataclass(frozen=True)
class Rows:
    """Some answers of a batch, which one forward pass takes together."""

    batch: Batch
    rows: np.ndarray

    @property
    def places(self) -> Tensor:
        """[n] of their tokens in the batch's columns."""
        return torch.from_numpy(token_places(self.batch.trajectories.responses.offsets, self.rows))

    @property
    def offsets(self) -> Tensor:
        """[b + 1] where each answer's tokens begin among their own."""
        lengths = self.batch.trajectories.responses.lengths[self.rows]
        return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))


def token_weights(batch: Batch, rows: np.ndarray, config: PPOConfig) -> Tensor:
    """[B] what each token of an answer weighs in the minibatch `rows`; zero for answers outside it."""
    lengths = torch.from_numpy(batch.trajectories.responses.lengths[rows].astype(np.float32))
    weights = torch.zeros(len(batch))
    weigh = AGGREGATIONS[config.ppo.algorithm.aggregation]
    weights[torch.from_numpy(rows)] = weigh(lengths, config.rollout.max_new_tokens)
    return weights


def policy_tokens(
    policy: TokenStatistics, old: Experience, some: Rows, config: PPOConfig, coefficient: float
) -> PolicyTokens:
    """Losses of the tokens of `some`, on the device that `policy` is on. `coefficient` is the KL penalty's beta."""
    ppo, device = config.ppo, policy.logprobs.device
    columns = (old.old_logprobs, old.advantages, old.weights)
    old_logprobs, advantages, weights = (column[some.places].to(device) for column in columns)
    log_ratio = policy_loss.RATIOS[ppo.algorithm.ratio](policy.logprobs, old_logprobs, some.offsets.to(device))
    low, high = ppo.algorithm.clip_ratio
    # Weights are not negative, so they may as well multiply the advantages: a masked token then is one without an
    # advantage, and not zero times whatever its ratio has become.
    surrogate = policy_loss.clipped(log_ratio, weights * advantages, low, high, dual=ppo.algorithm.dual_clip)
    total = surrogate.loss - ppo.entropy_bonus * policy.entropy
    if ppo.kl.estimator.placement == "reward":
        return PolicyTokens(total, surrogate, None)
    penalty = kl_tokens(policy, old.reference_logprobs[some.places].to(device), ppo.kl.estimator.name)
    return PolicyTokens(total + coefficient * penalty, surrogate, penalty)


def value_tokens(values: Tensor, old: Experience, some: Rows, clip: float) -> ValueLoss:
    assert old.values is not None and old.returns is not None
    old_values, returns = (column[some.places].to(values.device) for column in (old.values, old.returns))
    return value_loss.clipped(values, old_values, returns, clip)


def reference_rows(some: Rows, config: PPOConfig, head: Head | None, device: torch.device) -> Reference | None:
    """What a KL over the vocabulary is computed from, for the tokens of `some`; none where it is not wanted.

    `head` is the reference's own output head, where hidden states are what it sends.
    """
    if config.ppo.kl.estimator.name != "full":
        return None
    places = some.places.numpy()
    columns = some.batch.reference.take(places)
    if config.ppo.kl.estimator.top_k:
        ids = torch.from_numpy(some.batch.trajectories.top_ids[places].astype(np.int64))
        return TopKReference(ids.to(device), torch.from_numpy(columns.top_logprobs).to(device))
    assert head is not None
    return FullReference(to_torch(columns.hidden).to(device), head)
