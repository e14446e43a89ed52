"""Q-learning from random walks: does steering by values find shorter ways than anybody in the data went?

    python benchmarks/random_walks.py [--seeds 0 1 2] [--walks 1000] [--folder runs/random_walks]

A graph of 21 nodes, random walks of at most 10 steps, 1 for those that reach the goal and 0 for the others, discounted
by 0.8 a step. The same untrained small model learns them by `rlhf-ray sft` and by `rlhf-ray ilql`; plain PyTorch then
samples walks from every node. A walk's optimality is the fewest steps by the steps taken, 0 if it does not reach the
goal or uses an edge that is none. Prints a table for docs/ilql.md and writes benchmarks/results/random_walks.json.
"""

import argparse
import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_ray.environments.random_walks import GOAL, Edges, optimality, random_graph, walk

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/random_walks.json"
NODES, SHARE, LONGEST, SAMPLES = 21, 0.15, 10, 50
NAMES = string.ascii_lowercase[:NODES]
BETAS = (1.0, 4.0, 16.0)
TRAINING = {
    "epochs": 30,
    "sequences_per_step": 100,
    "held_out_share": 0.05,
    "optimizer": {"learning_rate": 2e-3, "schedule": "constant"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--walks", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/random_walks")
    told = parser.parse_args()
    found = {seed: measured(seed, told.walks, told.folder.absolute() / str(seed)) for seed in told.seeds}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"| optimality | {' | '.join(f'seed {seed}' for seed in found)} |\n|---|{'---|' * len(found)}")
    for name in next(iter(found.values())):
        print(f"| {name} | {' | '.join(f'{row[name]:.3f}' for row in found.values())} |")


def measured(seed: int, walks: int, folder: Path) -> dict[str, float]:
    """Mean optimality over starts, by who walks."""
    from transformers import AutoModelForCausalLM

    from rlhf_ray.models.q_heads import Decoder

    edges = random_graph(NODES, SHARE, seed)
    random = np.random.default_rng(seed)
    starts = random.integers(1, NODES, walks)
    data = [walk(edges, int(start), LONGEST, random) for start in starts]
    cloned, valued = trained(seed, folder, starts, data)
    clone = AutoModelForCausalLM.from_pretrained(cloned)
    model = AutoModelForCausalLM.from_pretrained(valued)
    decoder = Decoder(Path(valued), model)

    def by_clone(ids: Tensor) -> Tensor:
        return clone(ids).logits[:, -1].log_softmax(-1)

    pairs = zip(starts, data, strict=True)
    found = {"random walks (the data)": float(np.mean([optimality(edges, int(s), nodes) for s, nodes in pairs]))}
    found["behaviour cloning"] = walked(edges, by_clone, seed)
    found["behaviour cloning, greedy"] = walked(edges, by_clone, seed, greedy=True)
    found["ILQL's policy alone"] = walked(edges, lambda ids: decoder.scores(ids, 0.0), seed)
    for beta in BETAS:
        found[f"ILQL, decode_beta {beta:g}"] = walked(edges, lambda ids, beta=beta: decoder.scores(ids, beta), seed)
    found["ILQL, decode_beta 16, greedy"] = walked(edges, lambda ids: decoder.scores(ids, 16.0), seed, greedy=True)
    return found


def trained(seed: int, folder: Path, starts: NDArray[np.int64], data: list[list[int]]) -> tuple[str, str]:
    """Checkpoints of behaviour cloning and of Q-learning."""
    from rlhf_ray.config.ilql import ILQLConfig
    from rlhf_ray.config.supervised import SFTConfig
    from rlhf_ray.runtime import session
    from rlhf_ray.stages import ilql, sft

    rows = [
        {
            "prompt": NAMES[start],
            "completion": "".join(NAMES[node] for node in nodes),
            "reward": float(nodes[-1] == GOAL),
        }
        for start, nodes in zip(starts, data, strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "walks.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    write_model(folder / "start", seed)
    told: dict[str, Any] = {
        "output_dir": str(folder),
        "model": str(folder / "start"),
        "data": {"path": str(folder / "walks.jsonl"), "max_tokens": 2 + LONGEST},
        "training": TRAINING,
        "seed": seed,
        "telemetry": {"wandb": "off"},
    }
    values = {"gamma": 0.8, "tau": 0.8, "alpha": 0.1}
    with session.connect():
        cloned = sft.run(SFTConfig.model_validate({"name": "sft", **told}))
        valued = ilql.run(ILQLConfig.model_validate({"name": "ilql", **told, **values}))
    return cloned["model"], valued["model"]


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
def walked(edges: Edges, scores: Any, seed: int, greedy: bool = False) -> float:
    """Mean optimality of walks from every node but the goal, by `scores` [B, V] of the token after ids [B, T]."""
    torch.manual_seed(seed)
    starts = torch.arange(1, NODES).repeat(1 if greedy else SAMPLES)
    ids = starts[:, None]
    for _ in range(LONGEST):
        found = scores(ids)
        chosen = found.argmax(-1) if greedy else torch.multinomial(found.softmax(-1), 1)[:, 0]
        ids = torch.cat([ids, chosen[:, None]], 1)
    return float(np.mean([optimality(edges, row[0], until_the_end(row[1:])) for row in ids.tolist()]))


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
