"""The engines' model folders are full of pickles and modules that leave a mark when they are read."""

from pathlib import Path
from typing import Any

import pytest
from real_engines import generate, prompts_of


@pytest.mark.real
def test_vllm_serves_a_model_without_touching_what_lies_beside_its_safetensors(
    engines: list[Any], rollout_models: dict[str, Path]
) -> None:
    assert len(generate(engines[0], prompts_of(1, 4), [0]).responses) > 0
    for folder in rollout_models.values():
        assert (folder / "pytorch_model.bin").exists() and not (folder / "code-ran").exists()
