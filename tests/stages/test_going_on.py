"""Which folder an earlier process's run may be taken up from."""

from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.runtime import checkpoints
from rlhf_ray.stages.ppo import last_state
from rlhf_ray.telemetry.run_folder import RunFolder


def config(folder: Path, every: int | None) -> PPOConfig:
    told: dict[str, Any] = {"name": "x", "output_dir": str(folder), "policy": "p", "checkpoint": {"every": every}}
    return PPOConfig.model_validate({**told, "reward": {"function": "a:b"}, "data": {"path": "d", "max_tokens": 8}})


def killed_after_an_update(chosen: PPOConfig) -> Path:
    folder = RunFolder(chosen)
    folder.log(0, {"objective/kl": 0.0})
    folder.close()
    return folder.checkpoints


def saved(place: Path, name: str, **state: Any) -> None:
    checkpoints.write(place, name, lambda folder: None, state, keep=3, needed_bytes=1)


def test_a_run_is_taken_up_from_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    chosen = config(tmp_path, every=1)
    place = killed_after_an_update(chosen)
    saved(place, "update_000001", updates=1, controller={})
    saved(place, "stopped", updates=1)
    begun, may_go_on = last_state(chosen)
    assert begun is not None and begun.place.name == "update_000001" and may_go_on


def test_one_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    chosen = config(tmp_path, every=5)
    killed_after_an_update(chosen)
    assert last_state(chosen) == (None, True)


@pytest.mark.parametrize(("every", "stopped"), [(None, False), (None, True), (5, True)])
def test_what_was_measured_without_a_checkpoint_to_go_on_from_is_not_thrown_away(
    tmp_path: Path, every: int | None, stopped: bool
) -> None:
    chosen = config(tmp_path, every)
    place = killed_after_an_update(chosen)
    if stopped:
        saved(place, "stopped", updates=1)
    begun, may_go_on = last_state(chosen)
    assert begun is None and not may_go_on
    with pytest.raises(ConfigError, match="already holds a run"):
        RunFolder(chosen, resumable=may_go_on)
