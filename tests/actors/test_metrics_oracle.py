"""Every metric that an update reports, computed again from its batch by loops over tokens in float64.

The model, its critic and Adam are plain PyTorch; advantages, ratios, losses and weights are the oracle's loops, which
know neither packing nor columns.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from algorithms import oracle
from learner_ranks import ANSWERS, BETA, Ranks, config
from torch import Tensor, nn

from rlhf_ray.records import Finish, ReferenceColumns, Trajectories
from rlhf_ray.telemetry.catalogue import CATALOGUE

pytestmark = pytest.mark.real

TEMPERATURE, CLIP, CAP, LONGEST = 0.7, 0.05, 1.5, 16
ELSEWHERE = ("wire/bytes", "wire/bytes_per_token", "lr/policy", "lr/critic")
"""Of no loss."""


class Plain:
    """Policy and critic in float64, trained as the text books have it."""

    def __init__(self, folder: str, with_critic: bool) -> None:
        from transformers import AutoModelForCausalLM

        self.policy = AutoModelForCausalLM.from_pretrained(Path(folder), dtype=torch.float64)
        self.body = AutoModelForCausalLM.from_pretrained(Path(folder), dtype=torch.float64).model
        self.head = nn.Linear(64, 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.head.weight)
        critic = [*self.body.parameters(), *self.head.parameters()] if with_critic else []
        self.groups = [list(self.policy.parameters()), critic]
        self.adams = [
            torch.optim.AdamW(group, lr=1e-2, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
            for group in self.groups
            if group
        ]

    def says(self, trajectories: Trajectories) -> tuple[Tensor, Tensor, Tensor]:
        """[N] log-probabilities, entropies, values."""
        logprobs, entropies, values = [], [], []
        for row in range(len(trajectories)):
            ids = torch.from_numpy(trajectories.sequence(row).astype(np.int64))
            begin = len(trajectories.prompt(row)) - 1
            table = (self.policy(ids[None]).logits[0, begin:-1] / TEMPERATURE).log_softmax(-1)
            logprobs.append(table.gather(1, ids[begin + 1 :, None])[:, 0])
            entropies.append(-(table.exp() * table).sum(-1))
            values.append(self.head(self.body(ids[None]).last_hidden_state[0, begin:-1])[:, 0])
        return torch.cat(logprobs), torch.cat(entropies), torch.cat(values)

    def step(self, loss: Tensor) -> list[float]:
        """Gradient norms before clipping."""
        loss.backward()
        norms = [float(nn.utils.clip_grad_norm_(group, 0.5)) for group in self.groups if group]
        for adam in self.adams:
            adam.step()
            adam.zero_grad()
        return norms


FORMS: dict[str, dict[str, Any]] = {
    "ppo": {"algorithm": {"name": "ppo", "clip_ratio": CLIP, "whiten_rewards": True}},
    "grpo": {
        "algorithm": {"name": "grpo", "clip_ratio": CLIP},
        "kl": {"estimator": {"name": "k2", "placement": "loss"}},
    },
    "gspo": {
        "algorithm": {"name": "gspo", "clip_ratio": CLIP / 5},
        "kl": {"estimator": {"name": "k3", "placement": "loss"}},
    },
    "dr_grpo": {"algorithm": {"name": "dr_grpo", "clip_ratio": CLIP, "dual_clip": 1.02}},
    "rloo": {"algorithm": {"name": "rloo", "clip_ratio": CLIP}},
    "reinforce_pp": {"algorithm": {"name": "reinforce_pp", "clip_ratio": CLIP, "gamma": 0.9}},
}


@pytest.mark.parametrize("name", FORMS)
def test_every_metric_of_an_update_is_what_loops_over_tokens_give(
    one: Ranks,
    policy: str,
    columns: tuple[Trajectories, ReferenceColumns, np.ndarray],
    name: str,
) -> None:
    form = {"entropy_bonus": 0.01, "correction": {"name": "truncate", "cap": CAP}, **FORMS[name]}
    chosen = config(policy, epochs=3, minibatches=1, rollout={"samples_per_prompt": ANSWERS}, **form)
    found, _ = one.run(chosen, columns)
    expected = by_loops(chosen, policy, *columns)
    for metric, value in expected.items():
        assert found[metric] == pytest.approx(value, rel=2e-3, abs=2e-5), metric
    # Nothing that a loss produces is left unchecked.
    assert set(found) - set(expected) == set(ELSEWHERE) - (set() if name == "ppo" else {"lr/critic"})
    assert set(found) <= set(CATALOGUE)


def by_loops(
    chosen: Any, folder: str, trajectories: Trajectories, sent: ReferenceColumns, scores: np.ndarray
) -> dict[str, float]:
    ppo, algorithm = chosen.ppo, chosen.ppo.algorithm
    plain = Plain(folder, with_critic=algorithm.name == "ppo")
    offsets = trajectories.responses.offsets.tolist()
    reference, sampler = sent.logprobs.tolist(), trajectories.sampler_logprobs.tolist()
    with torch.no_grad():
        old, entropy, values = (column.tolist() for column in plain.says(trajectories))
    paid = [
        -1.0 if finish == Finish.LENGTH else s for finish, s in zip(trajectories.finish, scores.tolist(), strict=True)
    ]
    kl = [estimate(ppo.kl.estimator.name, p, r) for p, r in zip(old, reference, strict=True)]
    beta = BETA if ppo.kl.estimator.placement == "reward" else 0.0
    rewards = oracle.token_rewards(kl, paid, offsets, beta)
    advantages, returns = advantages_of(algorithm, rewards, values, offsets)
    corrected = [oracle.truncate(w, CAP) for w in oracle.log_weights(old, sampler, offsets, "token")]
    weights = [weight for weight, _ in corrected]

    tallies: dict[str, list[float]] = {}
    norms: list[float] = []
    first_deviation = 0.0
    for step in range(ppo.epochs):
        logprobs, entropies, now = plain.says(trajectories)
        ratio_of = {"token": oracle.token_log_ratio, "sequence": oracle.sequence_log_ratio}[algorithm.ratio]
        low, high = algorithm.clip_ratio
        tokens = [
            oracle.clipped(x, w * a, low, high, algorithm.dual_clip)
            for x, w, a in zip(ratio_of(logprobs.tolist(), old, offsets), weights, advantages, strict=True)
        ]
        if step == 0:
            first_deviation = max(abs(ratio - 1) for _, ratio, *_ in tokens)
        note(tallies, "loss/policy_avg", [loss for loss, *_ in tokens])
        note(tallies, "val/ratio", [ratio for _, ratio, *_ in tokens])
        note(tallies, "policy/clipfrac_avg", [float(clipped) for _, _, clipped, *_ in tokens])
        note(tallies, "policy/approxkl_avg", [approx for *_, approx, _ in tokens])
        slopes = torch.tensor([slope for *_, slope in tokens], dtype=torch.float64)
        surrogate = slopes * differentiable_log_ratio(logprobs, algorithm.ratio, offsets)
        per_token = surrogate - ppo.entropy_bonus * entropies
        if ppo.kl.estimator.placement == "loss":
            x = logprobs - torch.tensor(reference, dtype=torch.float64)
            penalty = x.square() / 2 if ppo.kl.estimator.name == "k2" else (-x).exp() - 1 + x
            note(tallies, "loss/kl_avg", penalty.tolist())
            per_token = per_token + BETA * penalty
        total = sum(
            oracle_weight(algorithm.aggregation, offsets, place) * per_token[place] for place in range(len(old))
        )
        if algorithm.name == "ppo":
            pairs = [
                oracle.clipped_value(v, o, r, algorithm.clip_value)
                for v, o, r in zip(now.tolist(), values, returns, strict=True)
            ]
            note(tallies, "loss/value_avg", [loss for loss, _ in pairs])
            note(tallies, "val/clipfrac_avg", [float(held) for _, held in pairs])
            free = torch.tensor([not held for _, held in pairs])
            target = torch.tensor(returns, dtype=torch.float64)
            total = total + (0.5 * (now - target).square() * free).sum() / len(old)
        norms = plain.step(total)

    mean_paid, sums = [*paid], oracle.sequence_sums(kl, offsets)
    sampled = oracle.sequence_sums([p - r for p, r in zip(old, reference, strict=True)], offsets)
    gap = oracle.gap(old, sampler)
    result = {
        **{metric: math.fsum(values_) / len(values_) for metric, values_ in tallies.items()},
        "val/ratio_max_first": first_deviation,
        "policy/grad_norm": norms[0],
        "objective/kl": math.fsum(sampled) / ANSWERS,
        "objective/kl_per_token": math.fsum(sampled) / len(old),
        "objective/kl_coefficient": BETA,
        "objective/scores": math.fsum(scores.tolist()) / ANSWERS,
        "objective/scores_std": float(np.std(scores.astype(np.float64))),
        "objective/rlhf_reward": math.fsum(s - BETA * k for s, k in zip(mean_paid, sums, strict=True)) / ANSWERS,
        "objective/entropy": math.fsum(entropy) / len(entropy),
        "rollout/eos_share": 6 / 7,
        "rollout/logprob_gap_mean": gap[0],
        "rollout/logprob_gap_p99": gap[1],
        "rollout/logprob_gap_max": gap[2],
        "correction/weight_mean": math.fsum(weights) / len(weights),
        "correction/clipped_share": sum(cut for _, cut in corrected) / len(corrected),
        "correction/effective_sample_share": oracle.effective_sample_share(weights),
        "tokens/prompt": 14.0,
        "tokens/trained": 46.0,
        "tokens/response_length": 46 / 7,
    }
    if algorithm.name == "ppo":
        result["critic/grad_norm"] = norms[1]
        target = np.array(returns)
        result["val/explained_variance"] = 1 - float(np.var(target - np.array(values)) / np.var(target))
    return result


def estimate(name: str, p: float, r: float) -> float:
    x = p - r
    return {"k1": x, "k2": x * x / 2, "k3": math.exp(-x) - 1 + x}[name]


def advantages_of(
    algorithm: Any, rewards: list[float], values: list[float], offsets: list[int]
) -> tuple[list[float], list[float]]:
    own = [True] * len(rewards)
    if algorithm.name == "ppo":
        whitened = oracle.whiten(rewards, keep_mean=True)
        raw, returns = oracle.gae(whitened, values, offsets, algorithm.gamma, algorithm.gae_lambda, own)
        return oracle.whiten(raw, keep_mean=False), returns
    if algorithm.name == "reinforce_pp":
        return oracle.whiten(oracle.rewards_to_go(rewards, offsets, algorithm.gamma, own), keep_mean=False), []
    returns, groups = oracle.sequence_sums(rewards, offsets), [0] * ANSWERS
    of_answer = (
        oracle.leave_one_out(returns, groups)
        if algorithm.name == "rloo"
        else oracle.group(returns, groups, scale=algorithm.name != "dr_grpo")
    )
    return [of_answer[row] for row, span in enumerate(oracle.spans(offsets)) for _ in span], []


def differentiable_log_ratio(logprobs: Tensor, ratio: str, offsets: list[int]) -> Tensor:
    """[N] whose slope is that of the log ratio: old log-probabilities are constants."""
    if ratio == "token":
        return logprobs
    spans = [logprobs[span.start : span.stop] for span in oracle.spans(offsets)]
    return torch.cat([part.mean().expand(len(part)) for part in spans])


def oracle_weight(kind: str, offsets: list[int], place: int) -> float:
    """What the loss of one token counts: the aggregate of a loss that is one there and zero elsewhere."""
    return oracle.aggregate([float(other == place) for other in range(offsets[-1])], offsets, kind, LONGEST)


def note(tallies: dict[str, list[float]], name: str, values: list[float]) -> None:
    tallies.setdefault(name, []).extend(values)
