"""What each form of KL to the reference costs between two actors, and what it loses: bytes, time, error.

    python benchmarks/kl_transport.py

Models are random: hidden states of unit root mean square and a Gaussian output head, scaled to a given mean entropy;
the policy's hidden states are the reference's, disturbed. Unlike in real models, entropy and KL hardly differ from one
token to the next, and the disturbance prefers no token.
Prints a table and writes benchmarks/results/kl_transport.json. One thread.
"""

import json
import pickle
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rlhf_ray.algorithms.logprobs import log_softmax
from rlhf_ray.algorithms.vocabulary_kl import exact, top_k

T = TypeVar("T")

RESULTS = Path(__file__).parent / "results" / "kl_transport.json"
SHAPES = {"demo": (128, 768), "100M parameters": (768, 32_000)}
"""Hidden size and vocabulary."""
TOKENS = 512
ENTROPY = 2.5
"""Mean entropy of the reference, nats."""
DISTURBANCE = 0.1
"""Of the policy's hidden states, relative to their own size."""
REPEATS = 5


@dataclass(frozen=True)
class Row:
    shape: str
    form: str
    bytes_per_token: int
    """What leaves the reference, and for top-k the ids, which leave the sampler."""
    transport_ms: float
    """Pickled, and unpickled into memory of its own."""
    learner_ms: float
    """From the columns to the KL, the policy's log-probabilities given."""
    mean_kl: float
    """Nats a token, exact."""
    absolute_error: float
    """Mean over tokens, nats."""
    relative_error: float
    """Sum of absolute errors by sum of the exact KL."""


@dataclass(frozen=True)
class Form:
    name: str
    columns: list[Tensor]
    kl: Callable[..., Tensor]
    """From the columns to [N]."""


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [row for shape in SHAPES for row in measure(shape)]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"tokens": TOKENS, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    Console(width=140).print(table(rows))


@torch.inference_mode()
def measure(shape: str) -> list[Row]:
    size, vocabulary = SHAPES[shape]
    head, hidden = models(size, vocabulary)
    logp = log_softmax(unit(hidden + DISTURBANCE * torch.randn_like(hidden)) @ head.T, 1.0)
    logits = hidden @ head.T
    reference = log_softmax(logits, 1.0)
    truth = exact(logp.double(), reference.double())
    rows = []
    for form in forms(hidden, head, logits, reference, logp):
        transport_ms, received = timed(lambda columns=form.columns: pickle.loads(pickle.dumps(columns, protocol=5)))
        learner_ms, kl = timed(lambda form=form, received=received: form.kl(*received))
        error = (kl - truth).abs()
        width = sum(column.nbytes for column in form.columns) // TOKENS
        rows.append(
            Row(
                shape,
                form.name,
                width,
                transport_ms,
                learner_ms,
                truth.mean().item(),
                error.mean().item(),
                (error.sum() / truth.sum()).item(),
            )
        )
    return rows


def models(size: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """An output head [V, H] and hidden states [N, H] with the wanted mean entropy, by bisection of the head's scale."""
    head, hidden = torch.randn(vocabulary, size) / size**0.5, unit(torch.randn(TOKENS, size))
    logits = hidden @ head.T
    low, high = 0.0, 20.0
    for _ in range(20):
        scale = (low + high) / 2
        logp = log_softmax(scale * logits, 1.0)
        too_flat = -(logp.exp() * logp).sum(-1).mean() > ENTROPY
        low, high = (scale, high) if too_flat else (low, scale)
    return scale * head, hidden


def forms(hidden: Tensor, head: Tensor, logits: Tensor, reference: Tensor, logp: Tensor) -> list[Form]:
    def recompute(rows: Tensor) -> Tensor:
        return exact(logp, log_softmax(rows.float() @ head.T, 1.0))

    def few(k: int) -> Form:
        ids = logp.topk(k, -1).indices
        columns = [ids.int(), reference.gather(-1, ids)]
        return Form(f"top-{k}", columns, lambda ids, logprobs: top_k(logp, ids, logprobs))

    return [
        Form("hidden states, fp32", [hidden], recompute),
        Form("hidden states, bf16", [hidden.bfloat16()], recompute),
        few(20),
        few(100),
        Form("logits, fp32", [logits], lambda logits: exact(logp, log_softmax(logits, 1.0))),
    ]


def unit(hidden: Tensor) -> Tensor:
    """Root mean square one, as after a final norm."""
    return hidden * hidden.square().mean(-1, keepdim=True).rsqrt()


def timed(function: Callable[[], T]) -> tuple[float, T]:
    """Milliseconds of the fastest of some calls, after one that is not counted, and what the last one returned."""
    result = function()
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        result = function()
        times.append(1000 * (time.perf_counter() - begin))
    return min(times), result


def table(rows: list[Row]) -> Table:
    headings = ["shape", "form", "bytes/token", "transport ms", "learner ms", "mean KL", "mean |error|", "relative"]
    drawn = Table(*headings, title=f"KL to the reference between actors, {TOKENS} tokens, one thread")
    for row in rows:
        drawn.add_row(
            row.shape,
            row.form,
            f"{row.bytes_per_token:,}",
            f"{row.transport_ms:.2f}",
            f"{row.learner_ms:.1f}",
            f"{row.mean_kl:.4f}",
            f"{row.absolute_error:.1e}",
            f"{row.relative_error:.2%}",
        )
    return drawn


if __name__ == "__main__":
    main()
