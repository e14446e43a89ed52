"""Three real engines on tiny random models, started once: vLLM takes about ten seconds a piece."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bombs
import numpy as np
import pytest
import tiny
from learner_ranks import Ranks, made_up_columns

from rlhf_ray.records import ReferenceColumns, Trajectories


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(num_cpus=4, include_dashboard=False, logging_level="ERROR", object_store_memory=256 << 20)
    yield
    if started:
        ray.shutdown()


@pytest.fixture(scope="session")
def rollout_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import torch
    from real_engines import VOCABULARY
    from transformers import LlamaConfig, LlamaForCausalLM

    folders = {}
    for name, tied in (("untied", False), ("tied", True)):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=384,
            tie_word_embeddings=tied,
            initializer_range=0.15,
        )
        folders[name] = tmp_path_factory.mktemp(name)
        LlamaForCausalLM(config).save_pretrained(folders[name])
        bombs.plant(folders[name], folders[name] / "code-ran")  # none of the engines' tests may set one off
    return folders


@pytest.fixture(scope="session")
def engines(ray_cluster: None, rollout_models: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[list[Any]]:
    """An untied model behind shm, and twice the same tied model behind gloo; temperatures 0.7, 1, 1."""
    import ray
    from real_engines import EOS

    from rlhf_ray.actors.rollout import RolloutEngine, RolloutSettings, environment

    settings = RolloutSettings(
        model=str(rollout_models["untied"]),
        max_model_len=384,
        max_new_tokens=24,
        temperature=0.7,
        samples_per_prompt=3,
        top_k=4,
        kv_cache_bytes=16 << 20,
        dtype="float32",
        tensor_parallel=1,
        transfer_backend="shm",
        eos_token_ids=(EOS,),
        trust_remote_code=False,
        deadline_s=2.0,
    )
    tied = replace(settings, model=str(rollout_models["tied"]), temperature=1.0, top_k=0, transfer_backend="gloo")
    variables = environment("cpu", request.config.cache.mkdir("vllm"))  # type: ignore[union-attr]
    kind = ray.remote(RolloutEngine).options(num_cpus=1, max_concurrency=4, runtime_env={"env_vars": variables})
    handles = [kind.remote(settings), kind.remote(tied), kind.remote(tied)]
    ray.get([handle.ready.remote() for handle in handles], timeout=180)
    yield handles
    ray.get([handle.shutdown.remote() for handle in handles], timeout=60)


@pytest.fixture(scope="session")
def other_policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_policy(tmp_path_factory.mktemp("other"), seed=7)


@pytest.fixture(scope="session")
def one(ray_cluster: None, policy: str, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """One rank of a learner."""
    return Ranks(1, policy, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="session")
def two(ray_cluster: None, policy: str, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(2, policy, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="session")
def columns() -> tuple[Trajectories, ReferenceColumns, np.ndarray]:
    return made_up_columns()
