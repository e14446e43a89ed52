"""What tests with real engines need besides the engines: prompts, answers, and an independent forward pass."""

from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from transformers import AutoModelForCausalLM

from rlhf_ray.records import Ragged, Trajectories

VOCABULARY = 128
EOS = 5


def learner_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def oracle(model: Any, sequences: list[np.ndarray], prompt_lengths: list[int], temperature: float) -> np.ndarray:
    """[N] log-probabilities of the tokens after the prompts, one plain forward pass a sequence."""
    found = []
    for sequence, length in zip(sequences, prompt_lengths, strict=True):
        ids = torch.from_numpy(sequence.astype(np.int64))
        table = (model(ids[None]).logits[0] / temperature).log_softmax(-1)
        found.append(table[length - 1 : -1].gather(1, ids[length:, None])[:, 0].numpy())
    return np.concatenate(found)


def oracle_of(model: Any, answers: Trajectories, temperature: float) -> np.ndarray:
    rows = range(len(answers))
    return oracle(model, [answers.sequence(row) for row in rows], answers.prompt_lengths.tolist(), temperature)


@torch.no_grad()
def logprob_tables(model: Any, answers: Trajectories) -> np.ndarray:
    """[N, V] log-probabilities of every token at each place of the answers, at temperature 1."""
    tables = []
    for row in range(len(answers)):
        ids, length = torch.from_numpy(answers.sequence(row).astype(np.int64)), len(answers.prompt(row))
        tables.append(model(ids[None]).logits[0, length - 1 : -1].log_softmax(-1).numpy())
    return np.concatenate(tables)


def prompts_of(count: int, length: int, seed: int = 0) -> Ragged:
    numbers = np.random.default_rng(seed)
    return Ragged.of([numbers.integers(8, VOCABULARY, length) for _ in range(count)], np.int32)


def chunks(
    engine: Any, prompts: Ragged, sample_ids: Any, seed: int = 0, chunk_tokens: int = 10**9
) -> list[Trajectories]:
    stream = engine.generate.remote(prompts, np.asarray(sample_ids, dtype=np.int64), seed, chunk_tokens)
    return [ray.get(ref, timeout=60) for ref in stream]


def generate(engine: Any, prompts: Ragged, sample_ids: Any, seed: int = 0) -> Trajectories:
    return Trajectories.concatenate(chunks(engine, prompts, sample_ids, seed))
