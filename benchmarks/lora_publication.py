"""Two ways by which a policy's adapters can reach an engine: merged into all weights, or as they are.

    python benchmarks/lora_publication.py

Merged weights travel through shared memory, as in a run. Adapters alone travel as a PEFT folder in /dev/shm, into an
engine that computes with LoRA kernels. Models are random Llamas in fp32; adapters of rank 16 lie on every linear layer.
Prints a table and writes benchmarks/results/lora_publication.json. CPU, one thread a process.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from rlhf_ray.actors.rollout import RolloutEngine, RolloutSettings, environment
from rlhf_ray.actors.weight_transfer import make_sender
from rlhf_ray.actors.weight_transfer.senders import SHARED_MEMORY
from rlhf_ray.models import load
from rlhf_ray.models.heads import TokenLogprobs
from rlhf_ray.models.lora import add_adapters, base_weights, merged, save_adapter
from rlhf_ray.models.packed import Packed
from rlhf_ray.records import Ragged, Trajectories

RESULTS = Path(__file__).parent / "results" / "lora_publication.json"
RANK, ALPHA = 16, 32.0
REPEATS = 5
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 16, 16, 32
DEADLINE_S = 300.0


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int


SHAPES = {"2M parameters": Shape(192, 512, 4, 4, 768), "110M parameters": Shape(768, 2048, 12, 12, 32_000)}


@dataclass(frozen=True)
class Row:
    shape: str
    way: str
    publication_s: float
    """From the learner's adapters to an engine that may generate; the fastest of some."""
    nbytes: int
    tokens_per_cpu_s: float
    """Generated afterwards; the faster of two."""
    mean_gap: float
    """Mean |engine - learner| of the sampled tokens' log-probabilities, nats."""
    largest_gap: float
    moved: float
    """The same mean between the learner with and without its adapters: what a lost adapter would show."""


class MergedEngine(RolloutEngine):
    def timed(self, prompts: Ragged) -> tuple[Trajectories, float]:
        """Answers, and the CPU seconds they took."""
        begin = time.process_time()
        chunks = list(self.generate(prompts, np.arange(len(prompts)), seed=0, chunk_tokens=10**9))
        return Trajectories.concatenate(chunks), time.process_time() - begin


class AdapterEngine(MergedEngine):
    """Serves every prompt with one adapter."""

    def __init__(self, settings: RolloutSettings) -> None:
        import vllm

        vllm.EngineArgs = partial(vllm.EngineArgs, enable_lora=True, max_lora_rank=RANK, max_loras=1)
        super().__init__(settings)

    def load_adapter(self, folder: str) -> None:
        from vllm.lora.request import LoRARequest

        self.adapter = LoRARequest("policy", 1, folder)
        # Without `load_inplace` an engine that knows the number goes on with what it read the first time.
        self._engine.add_lora(LoRARequest("policy", 1, folder, load_inplace=True))
        assert self._engine.reset_prefix_cache()

    def _add(self, name: str, ids: Any, params: Any) -> None:
        prompt = {"prompt_token_ids": list(map(int, ids))}
        self._engine.add_request(name, prompt, params, lora_request=self.adapter)


def main() -> None:
    torch.set_num_threads(1)
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as memory:
        rows = [row for shape in SHAPES for row in measure(shape, Path(cache), Path(memory))]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"rank": RANK, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    Console(width=140).print(table(rows))


def measure(name: str, cache: Path, memory: Path) -> list[Row]:
    folder = cache / name.replace(" ", "-")
    write_model(folder, SHAPES[name])
    policy = load.causal_lm(str(folder), "cpu")
    add_adapters(policy, RANK, ALPHA, "all-linear", seed=0)
    adapter = memory / folder.name

    def connect_merged(engine: Any) -> Callable[[], float]:
        metadata = [(key, weight.dtype, tuple(weight.shape)) for key, weight in base_weights(policy)]
        sender = make_sender("shm", [engine], metadata, DEADLINE_S)
        return lambda: sender.send(merged(None, policy), version=1)["bytes"]

    def connect_adapter(engine: Any) -> Callable[[], float]:
        def publish() -> float:
            save_adapter(None, policy, adapter)
            ray.get(engine.load_adapter.remote(str(adapter)), timeout=DEADLINE_S)
            return sum(file.stat().st_size for file in adapter.iterdir())

        return publish

    ways = {"merged": (MergedEngine, connect_merged), "adapter": (AdapterEngine, connect_adapter)}
    return [publication(name, way, policy, kind, connect, folder) for way, (kind, connect) in ways.items()]


def publication(name: str, way: str, policy: nn.Module, kind: type, connect: Callable[..., Any], folder: Path) -> Row:
    variables = environment("cpu", folder.parent / "vllm")
    engine = ray.remote(kind).options(num_cpus=1, runtime_env={"env_vars": variables}).remote(settings(folder))
    publish, nbytes, seconds, speeds = connect(engine), 0.0, [], []
    prompts = Ragged.of(
        list(np.random.default_rng(0).integers(8, SHAPES[name].vocabulary, (PROMPTS, PROMPT_TOKENS))), np.int32
    )
    for _ in range(REPEATS):
        move(policy)
        begin = time.perf_counter()
        nbytes = publish()
        seconds.append(time.perf_counter() - begin)
    for _ in range(2):
        answers, cpu_s = ray.get(engine.timed.remote(prompts), timeout=DEADLINE_S)
        speeds.append(len(answers.sampler_logprobs) / cpu_s)
    ray.get(engine.shutdown.remote(), timeout=DEADLINE_S)
    ray.kill(engine)
    own = logprobs(policy, answers)
    gaps = np.abs(own - answers.sampler_logprobs)
    moved = np.abs(own - logprobs(load.causal_lm(str(folder), "cpu"), answers)).mean()
    return Row(name, way, min(seconds), int(nbytes), max(speeds), float(gaps.mean()), float(gaps.max()), float(moved))


def write_model(folder: Path, shape: Shape) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def settings(folder: Path) -> RolloutSettings:
    return RolloutSettings(
        model=str(folder),
        max_model_len=PROMPT_TOKENS + NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        temperature=1.0,
        samples_per_prompt=1,
        top_k=0,
        kv_cache_bytes=256 << 20,
        dtype="float32",
        tensor_parallel=1,
        transfer_backend="shm",
        eos_token_ids=(1,),
        trust_remote_code=False,
    )


@torch.no_grad()
def move(policy: nn.Module) -> None:
    """As a step of training does: every adapter is somewhere else."""
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter += 0.005 * torch.randn_like(parameter)


@torch.no_grad()
def logprobs(policy: nn.Module, answers: Trajectories) -> np.ndarray:
    """[N] by the learner's own forward pass."""
    sequences = [answers.sequence(place) for place in range(len(answers))]
    packed = Packed.of(sequences, answers.prompt_lengths.tolist(), torch.device("cpu"))
    return TokenLogprobs(policy, 1.0)(packed).logprobs.numpy()


def table(rows: list[Row]) -> Table:
    headings = ["model", "published", "seconds", "bytes", "tokens/CPU s", "mean gap", "largest gap", "adapters move"]
    drawn = Table(*headings, title=f"Publication of adapters of rank {RANK}, one engine on CPU")
    for row in rows:
        drawn.add_row(
            row.shape,
            row.way,
            f"{row.publication_s:.3f}",
            f"{row.nbytes:,}",
            f"{row.tokens_per_cpu_s:,.0f}",
            f"{row.mean_gap:.1e}",
            f"{row.largest_gap:.1e}",
            f"{row.moved:.2f}",
        )
    return drawn


if __name__ == "__main__":
    main()
