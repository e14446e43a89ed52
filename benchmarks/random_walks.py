"""Q-learning from walks of mixed quality: does steering by values find shorter ways than imitating them does?

    OMP_NUM_THREADS=1 python benchmarks/random_walks.py [--seeds 0 1 2] [--folder runs/random_walks]

A graph of 21 nodes and 1000 walks of at most 10 steps, 1 for those that reach the goal and 0 for the others, discounted
by 0.8 a step. Half of the walkers go to any neighbour; the others take a step in two towards the goal. The same
untrained small model learns from them by `rlhf-ray ilql` and, in as many steps, by `rlhf-ray sft`: from all walks
and from those alone that reached the goal. Plain PyTorch then samples walks from every node. A walk's optimality is the
fewest steps by the steps taken, 0 if it does not reach the goal or uses an edge that is none. Prints a table for
docs/ilql.md and writes benchmarks/results/random_walks.json. What is finished in the folder is not run again.
"""

import argparse
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_ray.environments.random_walks import GOAL, Edges, optimality, random_graph, walk

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/random_walks.json"
NODES, SHARE, LONGEST, SAMPLES, WALKS = 21, 0.15, 10, 50, 1000
SKILLS = (0.0, 0.5)
"""Of the walkers, in turns: the probability that a step goes towards the goal."""
NAMES = string.ascii_lowercase[:NODES]
Scores = Callable[[Tensor], Tensor]
"""Of token ids [B, T]: log-probabilities of the next token [B, V], not normalised."""
BETAS = (1.0, 4.0, 16.0)
EPOCHS = 30
TRAINING = {
    "sequences_per_step": 100,
    "held_out_share": 0.05,
    "optimizer": {"learning_rate": 2e-3, "schedule": "constant"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/random_walks")
    told = parser.parse_args()
    found = {}
    for seed in told.seeds:
        folder = told.folder.absolute() / str(seed)
        result = folder / "result.json"
        if not result.exists():
            result.write_text(json.dumps(measured(seed, folder)))
        found[seed] = json.loads(result.read_text())
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"| optimality | {' | '.join(f'seed {seed}' for seed in found)} |\n|---|{'---|' * len(found)}")
    for name in next(iter(found.values())):
        print(f"| {name} | {' | '.join(f'{row[name]:.3f}' for row in found.values())} |")


def measured(seed: int, folder: Path) -> dict[str, float]:
    """Mean optimality over starts, by who walks."""
    from transformers import AutoModelForCausalLM

    from rlhf_ray.models.q_heads import Decoder

    edges = random_graph(NODES, SHARE, seed)
    random = np.random.default_rng(seed)
    starts = random.integers(1, NODES, WALKS)
    data = [walk(edges, int(start), LONGEST, random, SKILLS[n % len(SKILLS)]) for n, start in enumerate(starts)]
    cloned, filtered, valued = trained(seed, folder, starts, data)
    decoder = Decoder(Path(valued), AutoModelForCausalLM.from_pretrained(valued))

    def imitator(path: str) -> Scores:
        model = AutoModelForCausalLM.from_pretrained(path)
        return lambda ids: model(ids).logits[:, -1].log_softmax(-1)

    def steered(decode_beta: float) -> Scores:
        return lambda ids: decoder.scores(ids, decode_beta)

    clone, best = imitator(cloned), imitator(filtered)
    random_starts = [start for start in range(1, NODES) for _ in range(SAMPLES)]
    found = {
        "random walks": mean(edges, random_starts, [walk(edges, start, LONGEST, random) for start in random_starts]),
        "the data": mean(edges, starts.tolist(), data),
        "behaviour cloning": walked(edges, clone, seed),
        "behaviour cloning, greedy": walked(edges, clone, seed, greedy=True),
        "filtered behaviour cloning": walked(edges, best, seed),
        "filtered behaviour cloning, greedy": walked(edges, best, seed, greedy=True),
        "ILQL's policy alone": walked(edges, steered(0.0), seed),
    }
    found |= {f"ILQL, decode_beta {beta:g}": walked(edges, steered(beta), seed) for beta in BETAS}
    return found | {"ILQL, decode_beta 16, greedy": walked(edges, steered(16.0), seed, greedy=True)}


def trained(seed: int, folder: Path, starts: NDArray[np.int64], data: list[list[int]]) -> tuple[str, str, str]:
    """Checkpoints of behaviour cloning, of the filtered one and of Q-learning."""
    from rlhf_ray.config.ilql import ILQLConfig
    from rlhf_ray.config.supervised import SFTConfig
    from rlhf_ray.runtime import session
    from rlhf_ray.stages import ilql, sft
    from rlhf_ray.telemetry.run_folder import write_rows

    rows = [
        {
            "prompt": NAMES[start],
            "completion": "".join(NAMES[node] for node in nodes),
            "reward": float(nodes[-1] == GOAL),
        }
        for start, nodes in zip(starts, data, strict=True)
    ]
    write_model(folder / "start", seed)

    def settings(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        path = folder / f"{name}.jsonl"
        write_rows(path, rows)
        return {
            "name": name,
            "output_dir": str(folder),
            "model": str(folder / "start"),
            "data": {"path": str(path), "max_tokens": 2 + LONGEST},
            "training": {**TRAINING, "epochs": round(EPOCHS * WALKS / len(rows))},
            "seed": seed,
            "telemetry": {"wandb": "off"},
        }

    reached = [row for row in rows if row["reward"] == 1]
    values = {"gamma": 0.8, "tau": 0.8, "alpha": 0.1}
    with session.connect():
        cloned = sft.run(SFTConfig.model_validate(settings("clone", rows)))
        filtered = sft.run(SFTConfig.model_validate(settings("filtered", reached)))
        valued = ilql.run(ILQLConfig.model_validate({**settings("ilql", rows), **values}))
    return cloned["model"], filtered["model"], valued["model"]


def write_model(folder: Path, seed: int) -> None:
    """An untrained Llama of two layers, and a tokenizer of one token a node."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = [*NAMES, "<eos>", "<unk>", "<pad>"]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokens = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>", pad_token="<pad>")
    tokens.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    )
    tokens.save_pretrained(folder)
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), max_position_embeddings=32, **shape)).save_pretrained(folder)


@torch.no_grad()
def walked(edges: Edges, scores: Scores, seed: int, greedy: bool = False) -> float:
    """Mean optimality of walks from every node but the goal."""
    torch.manual_seed(seed)
    starts = torch.arange(1, NODES).repeat(1 if greedy else SAMPLES)
    ids = starts[:, None]
    for _ in range(LONGEST):
        found = scores(ids)
        chosen = found.argmax(-1) if greedy else torch.multinomial(found.softmax(-1), 1)[:, 0]
        ids = torch.cat([ids, chosen[:, None]], 1)
    return mean(edges, ids[:, 0].tolist(), [until_the_end(row) for row in ids[:, 1:].tolist()])


def mean(edges: Edges, starts: list[int], walks: list[list[int]]) -> float:
    """Mean optimality."""
    return float(np.mean([optimality(edges, start, nodes) for start, nodes in zip(starts, walks, strict=True)]))


def until_the_end(tokens: list[int]) -> list[int]:
    """Up to the goal, or to the first token that is no node; then the walk has failed, wherever it is."""
    for place, token in enumerate(tokens):
        if token >= NODES:
            return tokens[:place]
        if token == GOAL:
            return tokens[: place + 1]
    return tokens


if __name__ == "__main__":
    main()
