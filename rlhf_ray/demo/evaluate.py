"""How good a model's answers really are: gold, which nobody trained on, beside the proxy that was trained against.

Answers are sampled with transformers, not with the rollout engine: a second road to the same policy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_ray.actors.reward import RewardModel
from rlhf_ray.algorithms import intervals
from rlhf_ray.data.templates import answer_ids, prompt_ids
from rlhf_ray.demo import gold
from rlhf_ray.models import load
from rlhf_ray.records import Trajectories

TOKENS_PER_PASS = 4096


@dataclass(frozen=True)
class Measured:
    """Answers of one policy to held-out prompts."""

    responses: list[str]
    gold: np.ndarray
    """[P]"""
    proxy: np.ndarray
    """[P] normalised scores of the reward model."""


def mean_and_se(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Mean and its standard error, sd / sqrt(n), sd with Bessel's correction."""
    mean, se = intervals.mean_and_se([float(value) for value in values])
    return {"mean": mean, "se": se}


def measure(policy: str, reward: RewardModel, prompts: list[str], max_new_tokens: int, seed: int) -> Measured:
    """One sampled answer a prompt at temperature 1; the same seed draws the same random numbers for every policy."""
    tokenizer = load.tokenizer(policy, "policy")
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    answers = sample(causal_model(policy), tokenizer, ids, max_new_tokens, seed)
    responses = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return Measured(
        responses,
        np.asarray(gold.scores(prompts, responses)),
        reward.scores(Trajectories.given(ids, answers)),
    )


def reward_model_accuracy(reward: RewardModel, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Share of pairs in which the reward model agrees with the people's labels, and with gold where gold differs."""
    tokenizer = load.tokenizer(reward.path, "reward.model")
    scores = {}
    for side in ("chosen", "rejected"):
        ids = [prompt_ids(tokenizer, row["prompt"]) for row in rows]
        answers = [answer_ids(tokenizer, row["prompt"], row[side]) for row in rows]
        scores[side] = reward.scores(Trajectories.given(ids, answers))
    truth = np.array([gold.score(r["prompt"], r["chosen"]) - gold.score(r["prompt"], r["rejected"]) for r in rows])
    prefers_chosen = scores["chosen"] > scores["rejected"]
    decided = truth != 0
    return {
        "accuracy_labels": float(prefers_chosen.mean()),
        "accuracy_gold": float((prefers_chosen == (truth > 0))[decided].mean()),
    }


def causal_model(folder: str | Path) -> Any:
    """The model in a Hugging Face folder, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    load.quiet()
    return AutoModelForCausalLM.from_pretrained(Path(folder), dtype=torch.float32).eval()


def sample(model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int, seed: int) -> list[list[int]]:
    """Ids of one answer a prompt at temperature 1, EOS included."""
    import torch

    longest = max(map(len, prompts))
    # Padded on the left, so that all answers begin in the same column.
    padded = torch.tensor([[tokenizer.pad_token_id] * (longest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=padded,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    return [_until_eos(row, tokenizer.eos_token_id) for row in output[:, longest:].tolist()]


def _until_eos(ids: list[int], eos: int) -> list[int]:
    return ids[: ids.index(eos) + 1] if eos in ids else ids
