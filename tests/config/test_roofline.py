import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.config.model_size import ModelShape, model_shape
from rlhf_ray.config.roofline import (
    GPUS,
    Device,
    Engines,
    Models,
    Shares,
    Work,
    cache_bytes,
    decode_flops,
    forward_flops,
    generate_s,
    gpu_of,
    kv_bytes,
    learn_s,
    optimizer_s,
    performance,
    publish_s,
    score_s,
    tail_s,
    waves,
    work_of,
)

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
PARAMETERS, EMBEDDING = 6_738_415_616, 32000 * 4096

TINY = ModelShape(parameters=60, body=40, head=10, layers=1, heads=2, kv_heads=1, head_dimension=2)
"""2 P_m = 100; attention 2 L H d_h = 8 FLOP for a token and place; with numbers of 2 bytes k = 8 and W = 120."""
CRITIC = replace(TINY, head=0)
MODELS = Models(TINY, reference=(TINY,), reward=(CRITIC,), critic=(CRITIC,))
WORK = Work(prompts=2, answers=4, prompt_tokens=10, answer_tokens=20, longest=40, epochs=2)
"""S s = 120"""
DEVICE = Device(flops=1000, bandwidth=100, memory=1000, link=50)
ENGINES = Engines(count=2, gpus=2, cache=10**9)


def shape(folder: Path, **changed: object) -> ModelShape:
    (folder / "config.json").write_text(json.dumps(LLAMA_2_7B | changed))
    found = model_shape(str(folder))
    assert found
    return found


# Shapes


def test_a_7b_llama_costs_two_flop_for_each_parameter_but_its_embedding_and_half_a_mebibyte_of_cache(
    tmp_path: Path,
) -> None:
    llama = shape(tmp_path)
    assert llama.parameters == PARAMETERS
    assert forward_flops(llama, 0) == decode_flops(llama, 0) == 2 * (PARAMETERS - EMBEDDING)
    assert kv_bytes(llama, 2) == 2 * 32 * 32 * 128 * 2 == 2**19
    # Attention at 2048: L H d_h = 131,072 numbers, twice that by the length, 8% on top of the parameters.
    assert forward_flops(llama, 2048) - forward_flops(llama, 0) == 2 * 131_072 * 2048
    assert decode_flops(llama, 1024) - decode_flops(llama, 0) == 4 * 131_072 * 1024


def test_a_tied_head_is_in_a_product_and_a_classifier_has_none(tmp_path: Path) -> None:
    untied = shape(tmp_path)
    tied = shape(tmp_path, tie_word_embeddings=True)
    classifier = shape(tmp_path, architectures=["LlamaForSequenceClassification"])
    assert tied.parameters == PARAMETERS - EMBEDDING
    assert (tied.body, tied.head) == (untied.body, untied.head) == (PARAMETERS - 2 * EMBEDDING, EMBEDDING)
    assert (classifier.body, classifier.head) == (PARAMETERS - 2 * EMBEDDING + 4096, 0)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("name", "layers"), [("x/y-1b", 16), ("x/y-7b", 32), ("x/y-32b", 80), ("x/y-70b", 80)])
def test_a_name_gives_the_shape_of_the_llama_nearest_in_size(name: str, layers: int) -> None:
    found = model_shape(name)
    assert found and (found.layers, found.source) == (layers, "name")
    assert model_shape("x/mystery") is None


# Seconds, by hand


def test_a_token_of_the_tiny_model_by_hand() -> None:
    assert forward_flops(TINY, 30) == 100 + 8 * 30
    assert decode_flops(TINY, 20) == 100 + 16 * 20
    assert kv_bytes(TINY, 2) == 8


def test_generation_is_prefill_and_then_memory_or_arithmetic_whichever_is_slower() -> None:
    prefill = 4 * 10 * (100 + 80) / (4 * 1000)
    # The cache: 4 * 8 * (20 * 10 + 200) = 12,800 bytes. Weights: two engines, 20 steps, 120 bytes.
    assert generate_s(MODELS, WORK, ENGINES, DEVICE) == pytest.approx(prefill + (12_800 + 4_800) / (4 * 100))
    quick = replace(DEVICE, bandwidth=1e9)
    assert generate_s(MODELS, WORK, ENGINES, quick) == pytest.approx(prefill + 4 * 20 * (100 + 16 * 20) / (4 * 1000))


def test_answers_share_all_of_a_prompt_but_a_last_block() -> None:
    quick = replace(DEVICE, bandwidth=1e9)
    long = replace(WORK, prompt_tokens=30)
    decoded = 4 * 20 * (100 + 16 * 40) / 4000
    # 14 tokens of each of two prompts and 16 for each of four answers
    assert generate_s(MODELS, long, ENGINES, quick) == pytest.approx(decoded + (2 * 14 + 4 * 16) * (100 + 240) / 4000)


def test_a_cache_too_small_for_all_answers_makes_engines_read_their_weights_more_often() -> None:
    small = replace(ENGINES, cache=160)  # 120 tokens of 8 bytes in two caches: three times full
    assert waves(MODELS, WORK, ENGINES) == 1
    assert waves(MODELS, WORK, small) == 3
    more = generate_s(MODELS, WORK, small, DEVICE) - generate_s(MODELS, WORK, ENGINES, DEVICE)
    assert more == pytest.approx(2 * 4_800 / (4 * 100))


def test_a_synchronous_update_waits_for_the_longest_answer() -> None:
    # 40 tokens of 120 bytes at 2 * 100 byte/s: 24 s, less than 45.8 s for all; of 80 tokens it is 48 s
    assert tail_s(MODELS, WORK, ENGINES, DEVICE) == generate_s(MODELS, WORK, ENGINES, DEVICE)
    assert tail_s(MODELS, replace(WORK, longest=80), ENGINES, DEVICE) == pytest.approx(48)


def test_scoring_and_learning_by_hand() -> None:
    policy, critic = 120 * 340, 120 * 320
    assert score_s([TINY, CRITIC], WORK, DEVICE, 2) == pytest.approx((policy + critic) / 2000)
    assert learn_s([TINY, CRITIC], WORK, DEVICE, 2) == pytest.approx(2 * 3 * (policy + critic) / 2000)


def test_the_optimizer_and_publication_by_hand() -> None:
    assert optimizer_s(60, DEVICE, 3) == pytest.approx(30 * 60 / 300)
    assert publish_s(120, 50, 10) == pytest.approx(12)
    assert publish_s(120, 5, 10, gpus=2) == pytest.approx(12)
    assert publish_s(120, 50, 10, copies=3, senders=2) == pytest.approx(18)


def test_the_weights_of_a_70b_model_need_two_gpus_of_80_gb() -> None:
    assert cache_bytes(GPUS["h100"], 1, 140e9) < 0
    assert cache_bytes(GPUS["h100"], 2, 140e9) == pytest.approx(4e9)


def test_shares_slow_every_peak_and_leave_the_memory() -> None:
    assert GPUS["h100"].at(Shares(0.5, 0.25, 0.1)) == Device(494.5e12, 0.8375e12, 80e9, 45e9)


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_drivers_name_finds_its_peaks_and_a_card_of_other_peaks_does_not(name: str, gpu: str | None) -> None:
    assert gpu_of(name) == (GPUS[gpu] if gpu else None)


# How it scales

lengths = st.floats(1, 1e5)
works = st.builds(
    Work,
    prompts=st.integers(1, 1000),
    answers=st.integers(1, 1000),
    prompt_tokens=lengths,
    answer_tokens=lengths,
    longest=st.integers(1, 10**5),
)


def phases(work: Work, gpus: float, device: Device = DEVICE) -> list[float]:
    engines = replace(ENGINES, count=gpus, gpus=1, cache=1e5)
    return [
        generate_s(MODELS, work, engines, device),
        tail_s(MODELS, work, engines, device),
        score_s(MODELS.trained, work, device, gpus),
        learn_s(MODELS.trained, work, device, gpus),
        optimizer_s(60, device, gpus),
    ]


@given(works, st.floats(1, 10), st.sampled_from(["answers", "prompts", "prompt_tokens", "answer_tokens", "longest"]))
def test_more_work_never_takes_less_time(work: Work, factor: float, what: str) -> None:
    more = replace(work, **{what: getattr(work, what) * factor})  # type: ignore[arg-type]
    for less_s, more_s in zip(phases(work, 4), phases(more, 4), strict=True):
        assert less_s <= more_s * (1 + 1e-12)


@given(works, st.integers(1, 64), st.integers(1, 64))
def test_more_gpus_never_take_more_time(work: Work, gpus: int, added: int) -> None:
    for few_s, many_s in zip(phases(work, gpus), phases(work, gpus + added), strict=True):
        assert many_s <= few_s * (1 + 1e-12)


@given(works, st.floats(1.1, 100))
def test_a_device_faster_in_everything_divides_every_time(work: Work, factor: float) -> None:
    fast = replace(DEVICE, flops=DEVICE.flops * factor, bandwidth=DEVICE.bandwidth * factor)
    for slow_s, fast_s in zip(phases(work, 4), phases(work, 4, fast), strict=True):
        assert fast_s == pytest.approx(slow_s / factor)


@given(works, st.integers(2, 50))
def test_so_many_times_the_gpus_do_so_many_times_the_answers_in_the_same_time(work: Work, times: int) -> None:
    wide = replace(work, answers=work.answers * times, prompts=work.prompts * times)
    for narrow_s, wide_s in zip(phases(work, 2)[:-1], phases(wide, 2 * times)[:-1], strict=True):
        assert wide_s == pytest.approx(narrow_s)


# Against a run

METRICS = {
    "tokens/prompt": 20.0,
    "tokens/trained": 80.0,
    "tokens/response_length": 20.0,
    "time/update": 2000.0,
    "time/learn": 900.0,
    "time/publish": 100.0,
}


def test_the_work_of_an_update_is_read_off_its_metrics() -> None:
    assert work_of(METRICS, samples_per_prompt=2, longest=40, epochs=2) == WORK


def test_phi_and_mfu_by_hand() -> None:
    # On the learner's one GPU: (1 + 2 * 3) * 120 * (340 + 320) / 1000 = 554.4 s of the 900 s.
    found = performance(MODELS, WORK, METRICS, DEVICE, gpus=4, learner_gpus=1, engine_gpus=2)
    assert found["perf/mfu"] == pytest.approx(554.4 / 900)
    generated = 4 * 10 * 180 / 4000 + max((12_800 + 2 * 20 * 120) / 400, 4 * 20 * 420 / 4000)
    scored, learned = 120 * (340 + 320) / 4000, 554.4 / 4
    assert found["perf/phi"] == pytest.approx((generated + scored + learned) / 2000)


def test_where_phases_overlap_mfu_is_of_the_time_in_which_the_learner_trained() -> None:
    overlapped = METRICS | {"time/learn": 1.0, "busy/learner": 0.5}  # 1000 s busy, 100 of them publishing
    found = performance(MODELS, WORK, overlapped, DEVICE, gpus=4, learner_gpus=1, engine_gpus=2)
    assert found["perf/mfu"] == pytest.approx(554.4 / 900)
