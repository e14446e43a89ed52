"""Adapters against the plain model: equal to it at the start, merged into it at the end, and alone in being trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from ranks import on_ranks
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from rlhf_ray.config.common import OptimizerConfig, ZeroConfig
from rlhf_ray.errors import ModelError
from rlhf_ray.models import load
from rlhf_ray.models.heads import TokenLogprobs, Values, checksum
from rlhf_ray.models.lora import add_adapters, base_weights, disabled, merged, save_adapter
from rlhf_ray.models.packed import Packed
from rlhf_ray.models.zero import EPS

RANK, ALPHA = 4, 6.0
PACKED = Packed.of([np.arange(6, 26), np.arange(30, 40)], [3, 1], torch.device("cpu"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose layers keep their weights transposed, some of them square: shapes do not tell."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=1, bos_token_id=1)
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["policy", "tied_policy", "gpt2"])
def folder(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(request.param)


def adapted(folder: str, targets: Any = "all-linear", seed: int = 0) -> nn.Module:
    model = load.causal_lm(folder, "cpu")
    add_adapters(model, RANK, ALPHA, targets, seed)
    return model


def moved(model: nn.Module) -> nn.Module:
    """As training leaves it: every adapter is somewhere else."""
    numbers = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=numbers)
    return model


@torch.no_grad()
def logprobs(model: nn.Module) -> Tensor:
    return TokenLogprobs(model, 1.0)(PACKED).logprobs


def test_a_model_with_new_adapters_computes_what_it_did_and_publishes_what_it_was(folder: str) -> None:
    plain, model = load.causal_lm(folder, "cpu"), adapted(folder)
    assert torch.equal(logprobs(model), logprobs(plain))
    own, expected = dict(merged(None, model)), dict(plain.named_parameters())
    assert list(own) == list(expected) == [name for name, _ in base_weights(model)]
    for name, weight in own.items():
        assert torch.equal(weight, expected[name]), name


def test_merged_weights_in_a_plain_model_compute_what_the_adapted_model_computes(folder: str) -> None:
    model, plain = moved(adapted(folder)), load.causal_lm(folder, "cpu")
    before = logprobs(plain)
    targets = dict(plain.named_parameters())
    with torch.no_grad():
        for name, weight in merged(None, model):
            targets[name].copy_(weight)
    torch.testing.assert_close(logprobs(plain), logprobs(model), atol=5e-6, rtol=0)
    assert (logprobs(model) - before).abs().mean() > 0.01


def test_merging_leaves_the_live_model_alone(policy: str) -> None:
    model = moved(adapted(policy))
    before = checksum(model)
    for _, weight in merged(None, model):
        assert not weight.requires_grad
    assert checksum(model) == before


def test_a_model_without_adapters_is_its_own_merge(tied_policy: str) -> None:
    plain = load.causal_lm(tied_policy, "cpu")
    for (name, weight), (own, parameter) in zip(merged(None, plain), plain.named_parameters(), strict=True):
        assert name == own
        assert weight.data_ptr() == parameter.data_ptr() and not weight.requires_grad


def one_layer(
    weight: list[list[float]], a: list[list[float]], b: list[list[float]], alpha: float, dtype: Any
) -> Tensor:
    module = nn.Sequential(nn.Linear(len(weight[0]), len(weight), dtype=dtype))
    add_adapters(module, len(a), alpha, ["0"], 0)
    values = {"0.base_layer.weight": weight, "0.lora_A.default.weight": a, "0.lora_B.default.weight": b}
    with torch.no_grad():
        for name, value in values.items():
            module.get_parameter(name).copy_(torch.tensor(value))
    return dict(merged(None, module))["0.weight"]


def test_a_merged_weight_is_w_plus_alpha_over_rank_b_a_by_hand() -> None:
    # B A = [[1, 3], [2, 4]] and alpha / rank = 3 / 2.
    found = one_layer([[1, 2], [3, 4]], [[1, 3], [0, -2]], [[1, 0], [2, 1]], 3, torch.float32)
    assert found.tolist() == [[2.5, 6.5], [6.0, 10.0]]


def test_a_merged_weight_in_bf16_is_rounded_once() -> None:
    # 1 + 2^-8 + 2^-22 lies just above the middle between 1 and the next bf16, 1 + 2^-7. Were B A = 2^-8 + 2^-22 rounded
    # to bf16 on the way, the sum would be the middle itself, which rounds down.
    found = one_layer([[1.0]], [[1.0], [2**-14]], [[2**-8, 2**-8]], 2, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert found.item() == 1 + 2**-7


def test_disabled_adapters_are_the_base_model_bit_for_bit_and_come_back(folder: str) -> None:
    model = moved(adapted(folder))
    trained, trainable = logprobs(model), [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(KeyError), disabled(model):
        with disabled(model):
            pass
        assert torch.equal(logprobs(model), logprobs(load.causal_lm(folder, "cpu")))
        assert [parameter.requires_grad for parameter in model.parameters()] == trainable
        raise KeyError
    assert torch.equal(logprobs(model), trained)


def gradients(module: nn.Module, output: Callable[[], Tensor]) -> dict[str, Tensor]:
    output().square().sum().backward()
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def test_gradients_reach_every_adapter_of_a_policy_and_nothing_else(policy: str) -> None:
    module = TokenLogprobs(moved(adapted(policy)), 1.0)
    found = gradients(module, lambda: module(PACKED).logprobs)
    assert len(found) == 2 * 2 * 7  # A and B of seven layers in two blocks
    for name, gradient in found.items():
        assert ".lora_" in name
        assert gradient.abs().max() > 0, name


def test_a_critic_trains_its_head_beside_the_adapters_of_its_body(policy: str) -> None:
    critic = Values(load.causal_lm(policy, "cpu").base_model)
    add_adapters(critic.body, RANK, ALPHA, ["q_proj", "mlp.down_proj"], 0)
    found = gradients(moved(critic), lambda: critic(PACKED))
    assert sum(".lora_" in name for name in found) == 2 * 2 * 2
    assert [name for name in found if ".lora_" not in name] == ["head.weight"]
    assert all(gradient.abs().max() > 0 for gradient in found.values())


def test_adapters_are_where_they_were_asked_for(policy: str) -> None:
    model = adapted(policy, ["q_proj", "mlp.down_proj"])
    layers = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert layers == {
        f"model.layers.{block}.{layer}" for block in (0, 1) for layer in ("self_attn.q_proj", "mlp.down_proj")
    }


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("q_prj", "'q_prj' matches no linear layer of LlamaForCausalLM .*: q_proj"),
        ("proj", "'proj' matches no linear layer"),  # an end of names, but not a whole part
        ("lm_head", "'lm_head' matches no linear layer"),
        ("embed_tokens", "'embed_tokens' matches no linear layer"),
        ("xyz", "there are: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj$"),
    ],
)
def test_a_target_that_is_no_layer_is_refused_with_those_that_are(policy: str, target: str, said: str) -> None:
    model = load.causal_lm(policy, "cpu")
    with pytest.raises(ModelError, match=said):
        add_adapters(model, RANK, ALPHA, ["v_proj", target], 0)
    assert not any(".lora_" in name for name, _ in model.named_parameters())


def test_adapters_follow_their_seed_and_leave_the_callers_random_numbers_alone(policy: str) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = adapted(policy, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert checksum(first) == checksum(adapted(policy, seed=1))
    assert checksum(first) != checksum(adapted(policy, seed=2))


def test_a_saved_adapter_is_one_that_peft_loads(policy: str, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM, PeftModel

    model = moved(adapted(policy))
    save_adapter(None, model, tmp_path)
    loaded = PeftModel.from_pretrained(load.causal_lm(policy, "cpu"), str(tmp_path))
    assert torch.equal(logprobs(loaded.get_base_model()), logprobs(model))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == policy
    alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path).merge_and_unload()
    torch.testing.assert_close(alone.lm_head.weight, model.get_output_embeddings().weight)


@pytest.mark.parametrize("which", ["policy", "tied_policy"])
def test_a_saved_merge_is_an_ordinary_model_folder(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(which)
    model = moved(adapted(folder))
    load.save(model, tiny.tokenizer(), tmp_path, dict(merged(None, model)))
    with (
        safe_open(tmp_path / "model.safetensors", "pt") as saved,
        safe_open(Path(folder) / "model.safetensors", "pt") as original,
    ):
        assert set(saved.keys()) == set(original.keys())
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in Path(folder).iterdir()}
    torch.testing.assert_close(logprobs(load.causal_lm(str(tmp_path), "cpu")), logprobs(model), atol=5e-6, rtol=0)


OPTIMIZER = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_share=0.0, max_grad_norm=0.5)
CASES = [(0, True), (1, False), (3, True)]
"""ZeRO stage, and whether activations are computed again."""
ROWS = [np.random.default_rng(row).integers(6, 42, 4 + 3 * row, dtype=np.int32) for row in range(4)]
TOKENS = sum(len(row) - 1 for row in ROWS)


def trained(rank: int, folder: str, world: int, adapters: str) -> list[dict[str, Any]]:
    """Of each case: merged weights after a step, and what else the test wants to know."""
    from rlhf_ray.models import zero

    found = []
    for number, (stage, recompute) in enumerate(CASES):
        settings = ZeroConfig(stage=stage, gradient_checkpointing=recompute)
        sharded = zero.sharded_loading(OPTIMIZER, settings, "cpu")
        module = TokenLogprobs(adapted(folder), 1.0)
        del sharded
        engine = zero.make_engine(module, OPTIMIZER, settings, "cpu", 2)
        engine.train()

        def step(engine: Any = engine) -> float:
            for row in ROWS[rank::world]:
                logprobs = engine(Packed.of([row], [1], torch.device("cpu"))).logprobs
                engine.backward(-logprobs.sum() * world / TOKENS)
            return zero.step(engine, "the model")

        def now(engine: Any = engine) -> Tensor:
            with torch.no_grad():
                return engine(PACKED).logprobs

        start, norm = now(), step()
        for _ in zero.whole_weights(engine, module.named_parameters()):
            pass  # DeepSpeed keeps small parameters whole until they are gathered once: now all are in shards
        weights = {name: weight.numpy().copy() for name, weight in merged(engine, module.model)}
        save_adapter(engine, module.model, Path(adapters) / str(number))
        after = now()
        with disabled(module.model):
            reference = now()
        step()
        adam = getattr(engine.optimizer, "optimizer", engine.optimizer)
        found.append(
            {
                "weights": weights,
                "norm": norm,
                "moved": not torch.equal(start, after),
                "reference": torch.equal(start, reference),
                "moved after being disabled": not torch.equal(now(), after),
                "optimised": sum(state["exp_avg"].numel() for state in adam.state.values()),
            }
        )
    return found


def by_hand(folder: str) -> tuple[dict[str, np.ndarray], float]:
    """Merged weights after AdamW's first step from B = 0, by the plain model's gradient G of each weight W.

    A's gradient is zero and B's is s G A^T, so only B moves: to -lr g / (|g| + eps) of its clipped gradient g.
    """
    plain, model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa"), adapted(folder)
    for row in ROWS:
        ids = torch.from_numpy(row.astype(np.int64))
        loss = -plain(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]).sum() / TOKENS
        loss.backward()
    weights = {name: weight.detach().double() for name, weight in plain.named_parameters()}
    a = {
        f"{n.partition('.lora_A')[0]}.weight": p.detach().double()
        for n, p in model.named_parameters()
        if ".lora_A." in n
    }
    scale = ALPHA / RANK
    b_gradients = {name: scale * plain.get_parameter(name).grad.double() @ a[name].T for name in a}
    norm = float(torch.stack([gradient.square().sum() for gradient in b_gradients.values()]).sum().sqrt())
    for name, gradient in b_gradients.items():
        clipped = gradient * min(1.0, OPTIMIZER.max_grad_norm / norm)
        b = -OPTIMIZER.learning_rate * clipped / (clipped.abs() + EPS)
        weights[name] = weights[name] + scale * b @ a[name]
    return {name: weight.detach().numpy() for name, weight in weights.items()}, norm


@pytest.mark.real
@pytest.mark.parametrize("world", [1, 2])
def test_a_step_moves_the_adapters_alone_at_every_stage_and_all_ranks_merge_alike(
    world: int, policy: str, tmp_path: Path
) -> None:
    ranks = on_ranks(world, trained, policy, world, str(tmp_path))
    expected, norm = by_hand(policy)
    assert norm > OPTIMIZER.max_grad_norm  # else clipping is not tested
    adapter = sum(p.numel() for p in adapted(policy).parameters() if p.requires_grad)
    for number, (stage, _) in enumerate(CASES):
        first = ranks[0][number]
        for found in (rank[number] for rank in ranks):
            assert found["moved"] and found["reference"] and found["moved after being disabled"]
            assert found["optimised"] == (adapter if stage == 0 else adapter / world)
            assert list(found["weights"]) == list(expected)
            for name, weight in found["weights"].items():
                np.testing.assert_allclose(weight, expected[name], atol=1e-5, err_msg=f"{CASES[number]}, {name}")
                np.testing.assert_array_equal(weight, first["weights"][name])
        if stage > 0:  # at stage 0 the norm is a rank's own
            assert first["norm"] == pytest.approx(norm, rel=1e-4)
        for name, weight in with_saved_adapter(policy, tmp_path / str(number)).items():
            np.testing.assert_allclose(first["weights"][name], weight, atol=1e-6, err_msg=name)


def with_saved_adapter(policy: str, folder: Path) -> dict[str, np.ndarray]:
    from peft import PeftModel

    merge = PeftModel.from_pretrained(load.causal_lm(policy, "cpu"), str(folder)).merge_and_unload()
    return {name: weight.detach().numpy() for name, weight in merge.named_parameters()}
