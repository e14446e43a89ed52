"""Layers over several devices: who gets what, by brute force; and on CPU that a spread model computes the same numbers.

A CPU tensor forgets which of "cpu:0" and "cpu:1" it was sent to, and mixes with any other. `Apart` remembers, and
refuses what GPUs would refuse, so that a missing move is noticed without one.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate.utils.modeling
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from rlhf_ray.actors.reference import says
from rlhf_ray.errors import ModelError
from rlhf_ray.models import load
from rlhf_ray.models.heads import Scores, TokenLogprobs, checksum
from rlhf_ray.models.packed import Packed, hidden_states
from rlhf_ray.models.spread import device_map, shares

CPU = torch.device("cpu")
OVER = [CPU, torch.device("cpu", 1), torch.device("cpu", 2)]
LENGTHS = [5, 17, 2, 30]


class Apart(TorchFunctionMode):
    """Within it, tensors of two places do not meet, and a tensor says where it is."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.places: Any = WeakTensorKeyDictionary()
        for name, device in model.hf_device_map.items():
            part = model.get_submodule(name)
            for tensor in itertools.chain(part.parameters(), part.buffers()):
                self.places[tensor] = device.index or 0
        self.used: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        places = {self.places.get(one, 0) for one in leaves if isinstance(one, Tensor)}
        if func is Tensor.device.__get__:  # type: ignore[attr-defined]
            return OVER[places.pop()]
        asked = [one for one in leaves if isinstance(one, torch.device)]
        if asked:
            places = {asked[0].index or 0}
        assert len(places) <= 1, f"{func} of tensors on devices {places}"
        result = func(*args, **kwargs)
        if func is Tensor.to:  # a tensor that only changes its place has to be another one
            result = result.view_as(result)
        for one in tree_leaves(result):
            if isinstance(one, Tensor):
                self.places[one] = next(iter(places), 0)
        self.used |= places
        return result


@pytest.fixture(autouse=True)
def cpus_are_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that was loaded onto "cpu:1" is there already; on GPUs its own word is enough."""
    monkeypatch.setattr(accelerate.utils.modeling, "check_device_same", lambda one, other: one.type == other.type)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def deep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A language model of five layers."""
    return tiny.write_policy(tmp_path_factory.mktemp("deep"), tied=request.param, layers=5)


def packed() -> Packed:
    numbers = np.random.default_rng(0)
    sequences = [numbers.integers(6, 42, length, dtype=np.int32) for length in LENGTHS]
    return Packed.of(sequences, [1, 6, 1, 29], CPU)


# Who gets what


def every_way(layers: int, devices: int) -> Iterator[list[int]]:
    for ends in itertools.combinations(range(1, layers), devices - 1):
        yield [sum(end <= layer for end in ends) for layer in range(layers)]


def fullest(places: list[int], sizes: list[int], first: int, last: int, devices: int) -> int:
    loads = [sum(size for size, place in zip(sizes, places, strict=True) if place == one) for one in range(devices)]
    loads[0] += first
    loads[-1] += last
    return max(loads)


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=9),
    first=st.integers(0, 100),
    last=st.integers(0, 100),
    data=st.data(),
)
def test_layers_stay_in_order_every_device_is_used_and_no_other_way_is_more_even(
    sizes: list[int], first: int, last: int, data: st.DataObject
) -> None:
    devices = data.draw(st.integers(1, len(sizes)))
    found = shares(sizes, first, last, devices)
    assert found == sorted(found) and set(found) == set(range(devices))
    least = min(fullest(way, sizes, first, last, devices) for way in every_way(len(sizes), devices))
    assert fullest(found, sizes, first, last, devices) == least


def test_the_layers_of_70b_over_eight_gpus_make_room_for_embedding_and_head() -> None:
    # 80 layers of 1.7 GB; embedding and head are 4.2 GB on the first. Were it ten each, the first would have 21.3 GB;
    # with eleven at most, nobody has more than 18.8. The last has a norm as well, so the first takes four and it ten.
    layer, ends = 1_711_000_000, 4_203_000_000
    found = shares([layer] * 80, ends, 16_384, 8)
    assert [found.count(place) for place in range(8)] == [4, 11, 11, 11, 11, 11, 11, 10]


def meta(layers: int, tied: bool) -> LlamaForCausalLM:
    """Without memory, 4 bytes a number. Embedding and head have 1000 x 10 each, the last norm 10, and a layer 900:
    4 x 10 x 10 of attention, 3 x 10 x 16 of the feed-forward part, two norms of 10."""
    shape = {"hidden_size": 10, "intermediate_size": 16, "num_attention_heads": 1, "num_hidden_layers": layers}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(vocab_size=1000, tie_word_embeddings=tied, **shape))


@pytest.mark.parametrize(("tied", "ends"), [(False, 80_000), (True, 40_000)])
def test_embedding_and_head_are_on_the_first_device_tied_ones_once_and_the_norm_on_the_last(
    tied: bool, ends: int
) -> None:
    found = device_map(meta(40, tied), 3)
    assert found["model.embed_tokens"] == found["lm_head"] == found["model.rotary_emb"] == 0
    assert found["model.norm"] == 2
    assert [found[f"model.layers.{number}"] for number in range(40)] == shares([3600] * 40, ends, 40, 3)


def test_fewer_layers_than_devices_are_refused_before_a_weight_is_read(policy: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((Path(policy) / "config.json").read_text())  # and no weights
    with pytest.raises(ModelError, match="a model of 2 layers cannot be spread over 3 GPUs; give its role 2 or fewer"):
        load.causal_lm(str(tmp_path), "cpu", over=OVER)


def test_a_model_that_is_no_single_stack_of_layers_is_refused() -> None:
    config = T5Config(vocab_size=8, d_model=4, d_kv=2, d_ff=4, num_layers=2, num_heads=2)
    with pytest.raises(ModelError, match="expected one list of layers, found none; give its role 1 GPU"):
        device_map(T5ForConditionalGeneration(config), 2)


# The same numbers


def test_a_spread_policy_says_the_same_to_the_last_bit(deep: str) -> None:
    plain = TokenLogprobs(load.causal_lm(deep, "cpu"), 0.7)
    model = load.causal_lm(deep, "cpu", over=OVER)
    assert set(model.hf_device_map.values()) == set(OVER)
    spread = TokenLogprobs(model, 0.7)
    assert checksum(spread) == checksum(plain)
    top = np.random.default_rng(1).integers(6, 42, (len(packed().targets), 3))
    expected = {form: says(plain, packed(), top, form) for form in ("top_k", "hidden")}
    with Apart(model) as apart:
        for form, columns in expected.items():
            for found, column in zip(says(spread, packed(), top, form), columns, strict=True):  # type: ignore[arg-type]
                assert torch.equal(found, column)
    assert apart.used == {0, 1, 2}


def test_a_spread_reward_model_gives_the_same_scores(tmp_path: Path) -> None:
    path = tiny.write_reward_model(tmp_path, layers=5)
    with torch.no_grad():
        expected = Scores(load.classifier(path, "cpu"))(packed())
        model = load.classifier(path, "cpu", over=OVER)
        with Apart(model) as apart:
            assert torch.equal(Scores(model)(packed()), expected)
    assert apart.used == {0, 1, 2}


def test_the_frozen_head_of_a_spread_policy_is_that_of_the_whole_one(deep: str) -> None:
    whole, model = load.causal_lm(deep, "cpu"), load.causal_lm(deep, "cpu", over=OVER)
    with torch.no_grad():
        expected = load.frozen_head(whole)(hidden_states(whole.base_model, packed()))
        with Apart(model):
            found = load.frozen_head(model)(hidden_states(model.base_model, packed()))
    assert torch.equal(found, expected)


def test_layers_that_nobody_moves_to_are_noticed(deep: str) -> None:
    """What the tests above rest on."""
    from accelerate.hooks import remove_hook_from_submodules

    model = load.causal_lm(deep, "cpu", over=OVER)
    remove_hook_from_submodules(model)
    with torch.no_grad(), Apart(model), pytest.raises(AssertionError, match="of tensors on devices"):
        hidden_states(model.base_model, packed())
