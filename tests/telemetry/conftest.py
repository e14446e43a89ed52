import os
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.supervised import SFTConfig


@pytest.fixture(autouse=True)
def no_wandb_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever runs the tests, nothing reaches their W&B account, and no key of theirs decides a mode."""
    for name in os.environ:
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.fixture
def config_of(tmp_path: Path) -> Any:
    def build(wandb: str = "off", **changes: Any) -> SFTConfig:
        tree = {"name": "a-run", "output_dir": str(tmp_path / "runs"), "model": "m", "data": {"path": "rows.jsonl"}}
        return SFTConfig.model_validate({**tree, "telemetry": {"wandb": wandb}, **changes})

    return build
