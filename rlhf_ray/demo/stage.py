"""The demo's world as a stage, so that a pipeline can begin with nothing at all."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rlhf_ray.config.world import WorldConfig
from rlhf_ray.demo import feedback
from rlhf_ray.telemetry.tracker import Tracker


def run(config: WorldConfig, address: str | None = None) -> dict[str, Any]:
    """Makes everything in this process; the summary holds the path of each file by its name, and of the model."""
    with Tracker(config, "world") as tracker:
        folder, began = tracker.folder.path / "world", time.monotonic()
        progress = tracker.progress(feedback.RECIPE.steps, "base model")
        with _one_thread():
            made = feedback.prepare_feedback(
                folder, config.seed, log=lambda step, loss: progress.advance(loss=round(loss, 3))
            )
        summary = {
            "loss": made["base_model"]["loss_last"],
            "parameters": made["base_model"]["parameters"],
            "model": str(folder / "base"),
            "constitution": str(folder / "constitution.yaml"),
            "constitution_sha": made["constitution_sha"],
            **{name: str(folder / f"{name}.jsonl") for name in made["rows"]},
            "seconds": time.monotonic() - began,
        }
        tracker.summary(summary)
        return summary


@contextmanager
def _one_thread() -> Iterator[None]:
    """Two threads save a third of the time on idle cores, and take ten times as long beside anything else: between the
    parallel regions of so small a model they wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
