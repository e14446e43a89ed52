"""Peak memory and time of log-probabilities with their backward pass: all logits at once, or a chunk at a time.

    python benchmarks/logprob_memory.py

Each measurement has a process of its own: its peak resident memory, less what it held before (model and inputs).
The allocator returns what is freed at once, or its habit of keeping blocks below 32 MiB would be measured instead.
Gradients of both ways are compared. Prints a table and writes benchmarks/results/logprob_memory.json. One thread.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rlhf_ray.algorithms.logprobs import TokenStatistics, chunked
from rlhf_ray.algorithms.vocabulary_kl import FullReference, exact

RESULTS = Path(__file__).parent / "results" / "logprob_memory.json"
CHUNK = 256
"""Tokens whose logits exist at the same time."""
TOLERANCE = 1e-5
"""Of gradients, relative to the largest."""


@dataclass(frozen=True)
class Case:
    tokens: int
    vocabulary: int
    hidden: int
    kl: bool
    """Whether the exact KL to a reference is computed and differentiated as well."""


CASES = [Case(4096, 32_000, 512, False), Case(4096, 32_000, 512, True), Case(1024, 152_000, 512, False)]
LARGE = (16_384, 152_000)
"""Tokens and vocabulary whose logits do not fit here; their size is computed."""


@dataclass(frozen=True)
class Row:
    case: Case
    way: str
    peak_mib: float
    seconds: float


def main() -> None:
    rows, differences = [], []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            gradients = {}
            for way in ("naive", "chunked"):
                saved = Path(folder) / way
                rows.append(in_a_process(case, way, saved))
                gradients[way] = torch.load(saved)
            differences.append(difference(gradients["naive"], gradients["chunked"]))
    tokens, vocabulary = LARGE
    size = tokens * vocabulary * 4
    RESULTS.parent.mkdir(exist_ok=True)
    found = {"chunk": CHUNK, "rows": [asdict(row) for row in rows], "gradient_differences": differences}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    console = Console(width=120)
    console.print(table(rows))
    console.print(f"largest relative difference of gradients: {max(differences):.1e}")
    console.print(
        f"computed, not measured: one copy of {tokens:,} x {vocabulary:,} fp32 logits is {size / 2**30:.1f} GiB"
    )
    if max(differences) > TOLERANCE:
        sys.exit(f"gradients differ by more than {TOLERANCE:g}")


def in_a_process(case: Case, way: str, saved: Path) -> Row:
    command = [sys.executable, __file__, json.dumps(asdict(case)), way, str(saved)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    told = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return Row(case, way, **json.loads(told))


def measure(case: Case, way: str, saved: Path) -> None:
    """What one process does: forward, backward, the gradients to a file, the measurements to standard output."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden = torch.randn(case.tokens, case.hidden, requires_grad=True)
    weight = (3 * torch.randn(case.vocabulary, case.hidden) / case.hidden**0.5).requires_grad_()
    targets = torch.randint(case.vocabulary, (case.tokens,))
    other = hidden.detach() + 0.1 * torch.randn(case.tokens, case.hidden) if case.kl else None
    compute = naive if way == "naive" else in_chunks
    before, begin = memory_mib("VmRSS"), time.perf_counter()
    logprobs, entropy, kl = compute(hidden, weight, targets, other)
    loss = logprobs.mean() + 0.1 * entropy.mean()
    (loss if kl is None else loss + kl.mean()).backward()
    seconds = time.perf_counter() - begin
    print(json.dumps({"peak_mib": memory_mib("VmHWM") - before, "seconds": seconds}))
    torch.save([hidden.grad, weight.grad], saved)


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, other: Tensor | None) -> TokenStatistics:
    logp = (hidden @ weight.T).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    kl = None
    if other is not None:
        with torch.no_grad():
            reference = (other @ weight.T).log_softmax(-1)
        kl = exact(logp, reference)
    return TokenStatistics(logp.gather(-1, targets[:, None])[:, 0], entropy, kl)


def in_chunks(hidden: Tensor, weight: Tensor, targets: Tensor, other: Tensor | None) -> TokenStatistics:
    def head(rows: Tensor) -> Tensor:
        return rows @ weight.T

    reference = FullReference(other, head) if other is not None else None
    return chunked(hidden, head, targets, 1.0, CHUNK, reference=reference)


def memory_mib(field: str) -> float:
    """VmRSS: resident now; VmHWM: the most there has been. MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def difference(left: list[Tensor], right: list[Tensor]) -> float:
    """The largest of all gradients, relative to the largest entry of its tensor."""
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(left, right, strict=True))


def table(rows: list[Row]) -> Table:
    drawn = Table("tokens", "V", "H", "exact KL", "way", "peak MiB", "s", title=f"Chunks of {CHUNK} tokens, one thread")
    for row in rows:
        case = row.case
        sizes = [f"{size:,}" for size in (case.tokens, case.vocabulary, case.hidden)]
        drawn.add_row(*sizes, "yes" if case.kl else "no", row.way, f"{row.peak_mib:,.0f}", f"{row.seconds:.1f}")
    return drawn


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(Case(**json.loads(sys.argv[1])), sys.argv[2], Path(sys.argv[3]))
    else:
        main()
