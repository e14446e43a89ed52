import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.ilql import ILQLConfig
from rlhf_ray.config.load import load
from rlhf_ray.config.plan import GIB, Batch, Bundles, plan, render
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.config.supervised import RewardConfig, SFTConfig, SupervisedConfig

CLUSTER_CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "ppo").glob("*.yaml"))


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """10 values of vocabulary, one layer: embedding 40 + head 40 + attention 4 * 16 + MLP 3 * 4 * 8 + norms 3 * 4."""
    shape = {"hidden_size": 4, "num_hidden_layers": 1, "intermediate_size": 8, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(shape | {"vocab_size": 10}))
    return str(tmp_path)


TINY, TINY_BODY = 252, 212


def ppo(policy: str, **sections: Any) -> PPOConfig:
    tree = {"name": "x", "policy": policy, "reward": {"function": "a:b"}, "data": {"path": "d"}} | sections
    return PPOConfig.model_validate(tree)


def on_gpus(policy: str, **sections: Any) -> PPOConfig:
    roles = {
        "rollout": {"engines": 2, "gpus": 4},
        "reference": {"gpus": 0.5},
        "reward": {"gpus": 0.5},
        "learner": {"ranks": 4, "gpus": 1},
        "shared": [["reference", "reward"]],
    }
    return ppo(policy, **({"device": "gpu", "roles": roles, "reward": {"model": policy}} | sections))


def bytes_of(config: PPOConfig | SupervisedConfig) -> dict[tuple[str, str], tuple[int | None, int | None, int | None]]:
    return {(part.role, part.part): (part.weights, part.gradients, part.optimizer) for part in plan(config).memory}


# Batch


def test_batch_arithmetic_of_ppo() -> None:
    config = ppo(
        "p",
        data={"path": "d", "max_tokens": 100},
        rollout={"prompts_per_update": 10, "samples_per_prompt": 3, "max_new_tokens": 50},
        ppo={"updates": 7, "epochs": 2, "minibatches": 4},
        learner={"tokens_per_micro_batch": 290},
        roles={"learner": {"ranks": 3}},
    )
    # 30 samples in 4 minibatches: 8 at most, 3 for a rank; one of 150 tokens in a micro-batch of 290; 8 steps: 24
    assert plan(config).batch == Batch(
        sequences=30, tokens_at_most=4500, micro_batches_at_most=24, optimizer_steps=8, updates=7
    )


def test_a_preference_pair_is_two_sequences() -> None:
    tree = {"name": "x", "model": "m", "data": {"path": "d", "max_tokens": 1000}, "training": {"sequences_per_step": 6}}
    assert plan(SFTConfig.model_validate(tree)).batch == Batch(6, 6_000, 2, 1, None)
    assert plan(RewardConfig.model_validate(tree)).batch == Batch(12, 12_000, 3, 1, None)


# Bytes


def test_on_cpu_all_is_four_bytes_wide(tiny: str) -> None:
    assert bytes_of(ppo(tiny)) == {
        ("rollout", "policy"): (4 * TINY, None, None),
        ("reference", "reference"): (4 * TINY, None, None),
        ("learner", "policy"): (4 * TINY, 4 * TINY, 12 * TINY),
        ("learner", "critic"): (4 * TINY_BODY, 4 * TINY_BODY, 12 * TINY_BODY),  # a critic has no language-model head
    }


def test_heads_of_q_learning_are_trained_and_their_targets_are_whole_and_fp32(tiny: str) -> None:
    # Each an MLP from 4 to 8 to one value or 10: V 5 * 8 + 9, Q 5 * 8 + 9 * 10, of which there are two.
    both, heads = 2 * 130, 49 + 2 * 130
    tree = {"name": "x", "model": tiny, "data": {"path": "d"}, "workers": {"ranks": 2}}
    found = bytes_of(ILQLConfig.model_validate(tree))
    assert found["worker", "model"] == (4 * TINY, 4 * TINY, 12 * TINY // 2)
    assert found["worker", "heads"] == (4 * heads + 4 * both, 4 * heads, 12 * heads // 2)


def test_without_sharding_fp32_needs_no_master_copy(tiny: str) -> None:
    config = ppo(tiny, learner={"zero": {"stage": 0}})
    assert bytes_of(config)["learner", "policy"] == (4 * TINY, 4 * TINY, 8 * TINY)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (0, (2 * TINY, 2 * TINY, 12 * TINY)),
        (1, (2 * TINY, 2 * TINY, 3 * TINY)),
        (2, (2 * TINY, TINY // 2, 3 * TINY)),
        (3, (TINY // 2, TINY // 2, 3 * TINY)),
    ],
)
def test_each_zero_stage_divides_one_more_thing_by_the_four_ranks(
    tiny: str, stage: int, expected: tuple[int, int, int]
) -> None:
    config = on_gpus(tiny, learner={"zero": {"stage": stage}})
    assert bytes_of(config)["learner", "policy"] == expected
    assert bytes_of(config)["reward", "reward"] == (2 * TINY, None, None)


def test_every_member_of_every_reward_is_counted_and_averaged_ones_are_one(tiny: str) -> None:
    parts = {
        "good": {"ensemble": {"models": [tiny, tiny]}},
        "warm": {"ensemble": {"models": [tiny, tiny, tiny], "combine": "weights"}},
        "plain": {"model": tiny},
        "brief": {"function": "a:b"},
    }
    config = on_gpus(tiny, reward={"parts": parts})
    memory = bytes_of(config)
    assert [part for role, part in memory if role == "reward"] == ["good 1", "good 2", "warm", "plain"]
    [bundle] = [bundle for bundle in plan(config).bundles if "reward" in bundle.roles]
    assert bundle.bytes_per_device == (1 + 4) * 2 * TINY  # with the reference, on one GPU
    assert "reward: good 2" in render(plan(config))


def test_offload_takes_the_optimizer_off_the_gpu(tiny: str) -> None:
    config = on_gpus(tiny, learner={"zero": {"stage": 3, "offload": "optimizer"}})
    learner = next(bundles for bundles in plan(config).bundles if bundles.roles == ("learner",))
    assert learner.bytes_per_device == 2 * (TINY // 2) + 2 * (TINY_BODY // 2)
    assert " on host" in render(plan(config))


def test_the_kv_cache_holds_two_times_layers_times_heads_times_dimension_for_each_token(tiny: str) -> None:
    rollout = plan(ppo(tiny, rollout={"kv_cache_gib": 0.25})).memory[0]
    assert rollout.kv_cache == GIB // 4
    assert rollout.kv_cache_tokens == GIB // 4 // (2 * 1 * 2 * 2 * 4)


# Placement


def test_workers_on_several_gpus_spread_and_shared_ones_add_up(tiny: str) -> None:
    found = {bundles.roles: bundles for bundles in plan(on_gpus(tiny, rollout={"kv_cache_gib": 1})).bundles}
    assert found["rollout",] == Bundles(("rollout",), 2, 1, 4, (2 * TINY + GIB) // 4, (1,))
    assert found["reference", "reward"] == Bundles(("reference", "reward"), 1, 2, 1, 4 * TINY, (2,))
    assert found["learner",].nodes == (2,)  # node 1 is full of engines
    assert plan(on_gpus(tiny)).gpus == 13


def test_bundles_without_the_same_roles_are_told_apart(tiny: str) -> None:
    roles = {"rollout": {"engines": 1}, "learner": {"ranks": 3}, "shared": [["rollout", "learner"]]}
    found = [(bundles.roles, bundles.count, bundles.cpus) for bundles in plan(ppo(tiny, roles=roles)).bundles]
    assert found[:2] == [(("rollout", "learner"), 1, 2), (("learner",), 2, 1)]


def test_a_worker_that_no_node_holds_is_said(tiny: str) -> None:
    config = on_gpus(tiny)
    roles = config.roles.model_dump() | {"rollout": {"engines": 1, "gpus": 16}}
    assert "A node with 16 GPUs is needed." in render(plan(on_gpus(tiny, roles=roles)))


def test_an_unknown_model_leaves_bytes_unknown_and_says_so() -> None:
    text = render(plan(ppo("somewhere/mystery")))
    assert "unknown" in text
    assert "Size of somewhere/mystery unknown" in text


# The files that come with the project


@pytest.mark.parametrize("path", CLUSTER_CONFIGS, ids=lambda path: path.stem)
def test_configurations_for_clusters_leave_room_on_80_gb_gpus(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/nonexistent")
    found = plan(load(PPOConfig, path))
    if found.gpus == 0:
        pytest.skip("runs on CPU")
    for bundles in found.bundles:
        assert bundles.bytes_per_device is not None
        assert bundles.bytes_per_device < 65 * GIB


def test_the_70b_run_has_the_reference_and_the_reward_on_nodes_of_their_own() -> None:
    path = next(path for path in CLUSTER_CONFIGS if "70b" in path.name)
    nodes = {bundles.roles: set(bundles.nodes) for bundles in plan(load(PPOConfig, path)).bundles}
    assert set.union(*nodes.values()) == set(range(1, 9))
    for alone in (("reference",), ("reward",)):
        others = [there for roles, there in nodes.items() if roles != alone]
        assert len(nodes[alone]) == 1
        assert not nodes[alone] & set.union(*others)


def test_the_8b_run_fills_one_node_of_eight() -> None:
    path = next(path for path in CLUSTER_CONFIGS if "8b-1x8" in path.name)
    found = plan(load(PPOConfig, path))
    assert found.gpus == 8
    assert {node for bundles in found.bundles for node in bundles.nodes} == {1}


def test_adapters_alone_have_gradients_and_optimizer_state(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    shapes = {
        "model.embed_tokens.weight": (10, 4),
        "model.layers.0.self_attn.q_proj.weight": (4, 4),
        "model.layers.0.mlp.up_proj.weight": (8, 4),
        "model.norm.weight": (4,),
        "lm_head.weight": (10, 4),
    }
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")

    def learner(**lora: Any) -> tuple[int | None, int | None, int | None]:
        zero = {"stage": 0}
        return bytes_of(ppo(str(tmp_path), ppo={"algorithm": "reinforce_pp"}, learner={"lora": lora, "zero": zero}))[
            ("learner", "policy")
        ]

    # Rank 2 on q_proj: 2 * (4 + 4) numbers of 4 bytes, and Adam's two moments of each; up_proj adds 2 * (8 + 4).
    assert learner(rank=2, targets=["q_proj"])[1:] == (64, 128)
    assert learner(rank=2)[1:] == (160, 320)


def test_adapters_on_a_model_that_is_not_here_leave_their_bytes_unknown() -> None:
    config = ppo("org/llama-8b", learner={"lora": {"rank": 2}})
    learner = next(part for part in plan(config).memory if part.part == "policy" and part.role == "learner")
    assert learner.weights is not None and learner.gradients is None and learner.on_device is None
    assert "unknown" in render(plan(config))
