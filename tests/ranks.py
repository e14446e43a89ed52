"""Runs a function on several ranks of a gloo group, each a fresh process, because DeepSpeed leaves traces."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

DEADLINE_S = 180


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(rank, *arguments)` of each rank; what one raises fails the test with its traceback."""
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks = [
            context.Process(target=_rank, args=(answers, store, rank, world, function, arguments), daemon=True)
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        try:
            found = dict(_one(answers) for _ in ranks)
        finally:
            for process in ranks:
                process.kill()
                process.join()
    return [found[rank] for rank in range(world)]


def _one(answers: Any) -> tuple[int, Any]:
    rank, result, failure = answers.get(timeout=DEADLINE_S)
    assert failure is None, f"rank {rank} raised:\n{failure}"
    return rank, result


def _rank(answers: Any, store: str, rank: int, world: int, function: Callable[..., Any], arguments: Any) -> None:
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", LOCAL_RANK="0")
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    try:
        answers.put((rank, function(rank, *arguments), None))
    except Exception:  # noqa: BLE001  the test that waits raises it
        answers.put((rank, None, traceback.format_exc()))
