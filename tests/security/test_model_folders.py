"""A model folder may come from anybody: nothing in it is unpickled or imported, whichever loader reads it."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bombs import Bomb, plant

from rlhf_ray.actors import rollout
from rlhf_ray.config.rewards import RewardSection
from rlhf_ray.errors import ModelError
from rlhf_ray.models import load
from rlhf_ray.models.averaging import averaged_classifier
from rlhf_ray.stages.reward_check import check_reward

LOADERS: dict[str, Callable[[str], object]] = {
    "configuration": lambda path: load.model_config(path, "policy"),
    "policy": lambda path: load.causal_lm(path, "cpu"),
    "reward model": lambda path: load.classifier(path, "cpu"),
    "averaged reward models": lambda path: averaged_classifier([path, path], "cpu", False),
}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "code-ran"


def copied(folder: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def without_safetensors(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return str(folder)


def test_the_bomb_is_live(tmp_path: Path, marker: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(Exception):  # noqa: B017  what it loads as does not matter
        torch.load(tmp_path / "weights.bin", weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("which", ["policy", "reward_model"])
def test_pickles_and_modules_beside_the_safetensors_are_not_touched(
    loader: str, which: str, request: pytest.FixtureRequest, tmp_path: Path, marker: Path
) -> None:
    folder = plant(copied(request.getfixturevalue(which), tmp_path), marker)
    LOADERS[loader](str(folder))
    tokens = load.tokenizer(str(folder), "policy")
    load.eos_ids(str(folder), tokens)
    assert not marker.exists()


@pytest.mark.parametrize("loader", LOADERS)
def test_a_folder_whose_weights_are_a_pickle_is_refused(
    loader: str, reward_model: str, tmp_path: Path, marker: Path
) -> None:
    folder = without_safetensors(plant(copied(reward_model, tmp_path), marker))
    with pytest.raises((ModelError, OSError), match=r"safetensors"):
        LOADERS[loader](folder)
    assert not marker.exists()


def test_every_stage_refuses_it_before_anything_is_loaded(policy: str, reward_model: str, tmp_path: Path) -> None:
    """By `model_config`, which all stages ask first about every model; here about the reward's."""
    folder = without_safetensors(copied(reward_model, tmp_path))
    with pytest.raises(ModelError, match=r"^reward\.model: '.*' has no weights in safetensors; .* save it again"):
        check_reward(RewardSection(model=folder), load.tokenizer(policy, "policy"), policy, False)


def test_the_rollout_engine_refuses_it_before_vllm_is_asked(policy: str, tmp_path: Path, marker: Path) -> None:
    folder = without_safetensors(plant(copied(policy, tmp_path), marker))
    settings = rollout.RolloutSettings(
        model=folder,
        max_model_len=64,
        max_new_tokens=8,
        temperature=1.0,
        samples_per_prompt=1,
        top_k=0,
        kv_cache_bytes=16 << 20,
        dtype="float32",
        tensor_parallel=1,
        transfer_backend="shm",
        eos_token_ids=(1,),
        trust_remote_code=False,
        deadline_s=2.0,
    )
    with pytest.raises(ModelError, match="has no weights in safetensors"):
        rollout._build(settings)
    assert not marker.exists()


def test_an_adapter_in_the_folder_is_not_unpickled(policy: str, tmp_path: Path, marker: Path) -> None:
    folder = plant(copied(policy, tmp_path), marker)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "r": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        load.causal_lm(str(folder), "cpu")
    assert not marker.exists()


def test_a_kind_of_model_that_only_the_folders_own_code_knows_is_refused(
    policy: str, tmp_path: Path, marker: Path
) -> None:
    folder = plant(copied(policy, tmp_path), marker)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "bomb"}))
    with pytest.raises(ModelError, match="contains custom code"):
        load.model_config(str(folder), "policy")
    assert not marker.exists()
