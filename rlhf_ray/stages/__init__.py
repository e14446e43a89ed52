"""One job each. A stage's module has `run(config, address) -> summary`."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from rlhf_ray.config.stages import STAGES


def runner_of(stage: str) -> Callable[[Any, str | None], dict[str, Any]]:
    """`run(config, address)` of a stage; what it returns is what summary.json says. Imports torch and more."""
    return import_module(f"rlhf_ray.{STAGES[stage][1]}").run
