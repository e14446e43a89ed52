"""RLlib's PPO and DQN, and our own PPO, on the same walks: do they find the shortest ways, and do the two PPOs agree?

    python benchmarks/token_mdp.py [--who rllib_ppo rllib_dqn ppo] [--seeds 0 1 2] [--folder runs/token_mdp]

Graphs, walks and optimality are those of benchmarks/random_walks.py. RLlib learns by `rlhf-ray rllib`, ours by
`rlhf-ray ppo` with all four roles: an untrained small Llama whose tokens are the nodes, the goal its EOS, a Python
function as its reward. Nothing is paid for KL, and both have the same entropy bonus. Adds its rows to
benchmarks/results/token_mdp.json and prints all that are there as a table for docs/rllib.md.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from random_walks import LONGEST, NAMES, NODES, SHARE, walked
from torch import Tensor

from rlhf_ray.environments.random_walks import GOAL, optimality, random_graph

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/token_mdp.json"
SEEDS = (0, 1, 2)
TARGET = 0.9
"""Optimality of sampled walks, for which tokens are counted."""
UPDATES = {"rllib_ppo": 60, "rllib_dqn": 20, "ppo": 120}
ANSWERS = 20
"""Our PPO's, to each of the 20 starts, in each update."""
ENTROPY, OUR_ENTROPY = 0.03, 0.003
"""Our walks go on after a wrong step, and a bonus there would keep the same nodes undecided on the way to the goal."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--who", nargs="+", default=list(UPDATES), choices=list(UPDATES))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, choices=SEEDS)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/token_mdp")
    told = parser.parse_args()
    from rlhf_ray.runtime import session

    with session.connect():
        for who in told.who:
            for seed in told.seeds:
                row = (ours if who == "ppo" else rllib)(who, seed, told.folder.absolute())
                found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
                found.setdefault(who, {})[str(seed)] = row
                RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    columns = list(row)
    print(f"| | seed | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    for who, rows in found.items():
        for seed, row in rows.items():
            print(f"| {who} | {seed} | {' | '.join(_shown(row[name]) for name in columns)} |")


def rllib(who: str, seed: int, folder: Path) -> dict[str, Any]:
    from rlhf_ray.config.rllib import RLlibConfig
    from rlhf_ray.stages.rllib import run

    algorithm = {"name": "ppo", "entropy_bonus": ENTROPY} if who == "rllib_ppo" else {"name": "dqn"}
    config = RLlibConfig.model_validate(
        {
            "name": f"{who}_{seed}",
            "output_dir": str(folder),
            "seed": seed,
            "environment": {"nodes": NODES, "share": SHARE, "longest": LONGEST},
            "algorithm": algorithm,
            "updates": UPDATES[who],
            "telemetry": {"wandb": "off"},
        }
    )
    summary = run(config)
    return {
        "optimality": summary["optimality"],
        "greedy": summary["optimality_greedy"],
        "KL": summary["kl"],
        **needed(folder / config.name, "rllib/optimality"),
        "tokens": summary["tokens"],
        "seconds": summary["seconds"],
    }


def ours(who: str, seed: int, folder: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    from rlhf_ray.config.ppo import PPOConfig
    from rlhf_ray.stages.ppo import run

    start = folder / f"start_{seed}"
    write_model(start, seed)
    (folder / "starts.jsonl").write_text("".join(json.dumps({"prompt": name * 2}) + "\n" for name in NAMES[1:]))
    config = PPOConfig.model_validate(
        {
            "name": f"{who}_{seed}",
            "output_dir": str(folder),
            "seed": seed,
            "policy": str(start),
            "reward": {"function": f"{Path(__file__).stem}:score_{seed}"},
            "data": {"path": str(folder / "starts.jsonl"), "max_tokens": 2},
            "rollout": {
                "prompts_per_update": NODES - 1,
                "samples_per_prompt": ANSWERS,
                "max_new_tokens": LONGEST,
            },
            "ppo": {
                "updates": UPDATES[who],
                "epochs": 4,
                "minibatches": 8,
                "entropy_bonus": OUR_ENTROPY,
                "missing_eos_penalty": 0.0,
                "kl": {"coefficient": 0.0},
            },
            "learner": {"optimizer": {"learning_rate": 1e-3, "schedule": "constant"}},
            "roles": {"cpus": 0.5},
            "telemetry": {"wandb": "off"},
        }
    )
    began = time.monotonic()
    summary = run(config)
    seconds = time.monotonic() - began
    model = AutoModelForCausalLM.from_pretrained(summary["policy"])
    edges = random_graph(NODES, SHARE, seed)

    def scores(ids: Tensor) -> Tensor:
        return model(torch.cat([ids[:, :1], ids], 1)).logits[:, -1]

    return {
        "optimality": walked(edges, scores, seed),
        "greedy": walked(edges, scores, seed, greedy=True),
        "KL": summary["kl"],
        **needed(folder / config.name, "objective/scores"),
        "tokens": summary["tokens"],
        "seconds": seconds,
    }


def needed(folder: Path, name: str) -> dict[str, Any]:
    """Tokens sampled up to the first update whose walks reach the target."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {f"tokens to {TARGET}": next((int(row["tokens/total"]) for row in lines if row[name] >= TARGET), None)}


def scored(seed: int, prompts: list[str], responses: list[str]) -> list[float]:
    """Optimality of walks that ended: their last token, the goal, is EOS and not in the text."""
    edges = random_graph(NODES, SHARE, seed)
    walks = [[NAMES.index(name) for name in response.replace(" ", "")] for response in responses]
    return [optimality(edges, NAMES.index(p[0]), [*walk, GOAL]) for p, walk in zip(prompts, walks, strict=True)]


score_0, score_1, score_2 = (partial(scored, seed) for seed in SEEDS)


def write_model(folder: Path, seed: int) -> None:
    """An untrained Llama of two layers whose tokens are the nodes alone, the goal its EOS. A prompt is a start, twice:
    weights are compared on prompts of two tokens and more."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({name: node for node, name in enumerate(NAMES)}, unk_token=NAMES[GOAL]))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokens = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=NAMES[GOAL])
    tokens.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokens.save_pretrained(folder)
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=NODES, max_position_embeddings=32, eos_token_id=GOAL, bos_token_id=None, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) and value < 100 else f"{value:,.0f}"


if __name__ == "__main__":
    main()
