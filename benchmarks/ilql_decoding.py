"""What it costs to decode with ILQL's values: vLLM with and without them, and a loop in Python that has them.

    python benchmarks/ilql_decoding.py

Random weights, one thread, fp32 on CPU. With and without values is one engine, at decode_beta 1 and 0, in turns: at 0
the logits are the model's own and the heads are not asked. The loop is transformers with a KV cache and the same heads,
a whole batch a step. Prints a table for docs/ilql.md and writes benchmarks/results/ilql_decoding.json.
"""

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from rlhf_ray.actors.rollout import RolloutEngine, RolloutSettings, environment
from rlhf_ray.models.q_heads import FILE, SETTINGS, Decoder, decoding_heads, steered, value_head
from rlhf_ray.records import Ragged

RESULTS = Path(__file__).parent / "results/ilql_decoding.json"
PROMPTS, PROMPT_TOKENS, REPEATS = 32, 16, 6


class Shape(NamedTuple):
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    new_tokens: int


SHAPES = {
    "demo": Shape(768, 128, 384, 4, 4, 64),
    "100M, vocabulary of 4k": Shape(4096, 768, 2048, 12, 12, 16),
    "100M, vocabulary of 32k": Shape(32000, 768, 2048, 12, 12, 16),
}


@dataclass
class Row:
    model: str
    policy: int
    """Weights that a token passes without values: body and output head."""
    values: int
    """Weights that it passes besides."""
    plain: float
    """Generated tokens per CPU second; the fastest of REPEATS, and so below."""
    steered: float
    loop: float


def main() -> None:
    spawned = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= environment("cpu", Path(folder) / "vllm")  # for the processes that measure
        with ProcessPoolExecutor(1, mp_context=spawned, max_tasks_per_child=1) as process:
            rows = [
                process.submit(measure, name, Path(folder) / str(place)).result() for place, name in enumerate(SHAPES)
            ]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"prompts": PROMPTS, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    print("| model | weights | of the values | plain | steered | | loop in Python |\n|---|---|---|---|---|---|---|")
    for row in rows:
        share, weights = row.steered / row.plain, f"{row.policy / 1e6:.1f}M | {row.values / 1e6:.1f}M"
        print(f"| {row.model} | {weights} | {row.plain:.0f} | {row.steered:.0f} | {share:.0%} | {row.loop:.0f} |")


def measure(name: str, folder: Path) -> Row:
    torch.set_num_threads(1)
    shape = SHAPES[name]
    policy, values = write_checkpoint(folder, shape)
    engine = RolloutEngine(settings(folder, shape))
    prompts = np.random.default_rng(0).integers(8, shape.vocabulary, (PROMPTS, PROMPT_TOKENS))

    def in_vllm(decode_beta: float) -> None:
        engine.set_decode_beta(decode_beta)
        chunks = engine.generate(Ragged.of(list(prompts), np.int32), np.arange(PROMPTS), 0, 10**9)
        assert sum(chunk.tokens for chunk in chunks) == PROMPTS * shape.new_tokens

    loop = python_loop(folder, torch.from_numpy(prompts), shape.new_tokens)
    ways: list[Callable[[], None]] = [lambda: in_vllm(0.0), lambda: in_vllm(1.0), loop]
    for way in ways:
        way()
    seconds = np.array([[cpu_seconds(way) for way in ways] for _ in range(REPEATS)]).min(0)
    engine.shutdown()
    return Row(name, policy, values, *(PROMPTS * shape.new_tokens / seconds).round(1).tolist())


def cpu_seconds(way: Callable[[], None]) -> float:
    begin = time.process_time()
    way()
    return time.process_time() - begin


def python_loop(folder: Path, prompts: torch.Tensor, new_tokens: int) -> Callable[[], None]:
    from transformers import AutoModelForCausalLM

    decoder = Decoder(folder, AutoModelForCausalLM.from_pretrained(folder))
    model = decoder.model

    @torch.inference_mode()
    def run() -> None:
        ids, cache = prompts, None
        for _ in range(new_tokens):
            found = model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
            hidden, cache = found.last_hidden_state[:, -1], found.past_key_values
            scores = steered(model.get_output_embeddings()(hidden), hidden, decoder.heads, 1.0)
            ids = torch.multinomial(scores.softmax(-1), 1)

    return run


def write_checkpoint(folder: Path, shape: Shape) -> tuple[int, int]:
    """Weights of body and output head, and of the heads."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        **{SETTINGS: {"decode_beta": 1.0}},
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    heads = decoding_heads(shape.vocabulary, lambda outputs: value_head(shape.hidden, outputs, torch.empty(0)))
    for name, weight in heads.named_parameters():
        if name.endswith("2.weight"):
            torch.nn.init.normal_(weight, std=0.02)
    (folder / FILE).parent.mkdir()
    save_file(heads.state_dict(), folder / FILE)
    return count(model), count(heads)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def settings(folder: Path, shape: Shape) -> RolloutSettings:
    return RolloutSettings(
        model=str(folder),
        max_model_len=PROMPT_TOKENS + shape.new_tokens,
        max_new_tokens=shape.new_tokens,
        temperature=1.0,
        samples_per_prompt=1,
        top_k=0,
        kv_cache_bytes=256 << 20,
        dtype="float32",
        tensor_parallel=1,
        transfer_backend=None,
        eos_token_ids=(),
        trust_remote_code=False,
        decode_beta=1.0,
    )


if __name__ == "__main__":
    main()
