"""The demo's world as a stage, so that a pipeline can begin with nothing at all."""

import time
from typing import Any

from rlhf_ray.config.world import WorldConfig
from rlhf_ray.demo import feedback
from rlhf_ray.models.threads import one_thread
from rlhf_ray.telemetry.tracker import Tracker


def run(config: WorldConfig, address: str | None = None) -> dict[str, Any]:
    """Makes everything in this process; the summary holds the path of each file by its name, and of the model."""
    with Tracker(config, "world") as tracker:
        folder, began = tracker.folder.path / "world", time.monotonic()
        progress = tracker.progress(feedback.RECIPE.steps, "base model")
        with one_thread():
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
