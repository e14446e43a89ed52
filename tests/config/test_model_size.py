import json
import struct
from pathlib import Path

import pytest

from rlhf_ray.config.model_size import ModelSize, model_size
from rlhf_ray.errors import ModelError

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "hub"


def folder(path: Path, config: dict, tensors: dict[str, list[int]] | None = None) -> str:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        header = json.dumps(
            {"__metadata__": {"format": "pt"}}
            | {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in tensors.items()}
        ).encode()
        (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return str(path)


def test_llama_3_8b_has_the_published_number_of_parameters(tmp_path: Path) -> None:
    found = model_size(folder(tmp_path / "m", LLAMA_8B))
    assert found == ModelSize(8_030_261_248, "config.json", head=128256 * 4096, kv_values_per_token=2 * 32 * 8 * 128)


def test_qwen_2_5_half_billion_ties_its_head_and_has_biases(tmp_path: Path) -> None:
    found = model_size(
        folder(
            tmp_path / "m",
            {
                "model_type": "qwen2",
                "hidden_size": 896,
                "num_hidden_layers": 24,
                "intermediate_size": 4864,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
                "vocab_size": 151936,
                "tie_word_embeddings": True,
            },
        )
    )
    assert found.parameters == 494_032_768
    assert found.head == 0


def test_a_sequence_classifier_has_one_row_a_label_instead_of_a_head(tmp_path: Path) -> None:
    config = LLAMA_8B | {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    assert model_size(folder(tmp_path / "m", config)).parameters == 8_030_261_248 - 128256 * 4096 + 4096


def test_the_weights_headers_count_before_the_config(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": [10, 4], "lm_head.weight": [10, 4], "model.norm.weight": [4]}
    found = model_size(folder(tmp_path / "m", LLAMA_8B, tensors))
    assert (found.parameters, found.source, found.head) == (84, "weights", 40)


def test_a_hub_name_is_found_in_the_local_cache(no_hub: Path) -> None:
    home = no_hub / "models--org--thing"
    folder(home / "snapshots" / "abc", LLAMA_8B)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc")
    assert model_size("org/thing").parameters == 8_030_261_248


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8_000_000_000),
        ("models/llama-70b-reward", 70_000_000_000),
        ("Qwen/Qwen2.5-0.5B", 500_000_000),
        ("HuggingFaceTB/SmolLM2-135M", 135_000_000),
    ],
)
def test_a_size_in_the_name_is_an_estimate(name: str, parameters: int) -> None:
    assert model_size(name) == ModelSize(parameters, "name")


@pytest.mark.parametrize("name", ["gpt2", "mistralai/Mixtral-8x7B", "org/v3b2model", "org/model-4bit"])
def test_what_cannot_be_known_stays_unknown(name: str) -> None:
    assert model_size(name) == ModelSize()


def test_a_mixture_of_experts_is_not_counted_as_dense(tmp_path: Path) -> None:
    found = model_size(folder(tmp_path / "mixture", LLAMA_8B | {"num_local_experts": 8}))
    assert (found.parameters, found.source) == (None, "unknown")
    assert found.kv_values_per_token == 2 * 32 * 8 * 128


def test_damaged_files_are_named(tmp_path: Path) -> None:
    broken = Path(folder(tmp_path / "broken", {}))
    (broken / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"broken/config\.json"):
        model_size(str(broken))
    pointer = Path(folder(tmp_path / "pointer", LLAMA_8B))
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match=r"model\.safetensors.*Git LFS pointer"):
        model_size(str(pointer))
