"""What a person can get wrong about a model is one message, told from small files; what is saved is ordinary."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_ray.errors import ModelError
from rlhf_ray.models import load


def edited(folder: str, tmp_path: Path, **changes: object) -> str:
    """A copy of a model whose config.json says something else."""
    copy = shutil.copytree(folder, tmp_path / "edited")
    file = copy / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return str(copy)


def test_a_folder_that_does_not_exist_is_named() -> None:
    with pytest.raises(ModelError, match=r"^policy: '/nowhere/model' does not exist"):
        load.model_config("/nowhere/model", "policy")


def test_a_folder_without_a_configuration_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load.model_config(str(tmp_path), "policy")


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        load.model_config(str(tmp_path / "model.gguf"), "policy")


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', '{"model_type": "no_such_kind"}'])
def test_a_configuration_that_describes_no_model_is_refused_in_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"^policy: ") as refused:
        load.model_config(str(tmp_path), "policy")
    assert "\n" not in str(refused.value)


def test_a_model_without_a_tokenizer_is_refused(policy: str, tmp_path: Path) -> None:
    shutil.copy(Path(policy) / "config.json", tmp_path)
    with pytest.raises(ModelError, match="no tokenizer can be read") as refused:
        load.tokenizer(str(tmp_path), "policy")
    assert "\n" not in str(refused.value)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    tokens = tiny.tokenizer()
    tokens.eos_token = None
    tokens.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        load.tokenizer(str(tmp_path), "policy")


def test_a_tokenizer_larger_than_the_embedding_is_refused(policy: str, tmp_path: Path) -> None:
    tokens = load.tokenizer(policy, "policy")
    smaller = AutoConfig.from_pretrained(edited(policy, tmp_path, vocab_size=len(tokens) - 1))
    with pytest.raises(ModelError, match=rf"has {len(tokens)} tokens, but the model's vocab_size is {len(tokens) - 1}"):
        load.check_vocabulary(tokens, smaller, policy, "policy")
    load.check_vocabulary(tokens, AutoConfig.from_pretrained(policy), policy, "policy")


def test_tokenizers_that_give_ids_other_meanings_are_refused() -> None:
    first, second = tiny.tokenizer(), tiny.tokenizer()
    load.check_same_tokenizer(first, second, "a", "b")
    second.add_tokens(["new"])
    with pytest.raises(ModelError, match=r"'a'.*'b'"):
        load.check_same_tokenizer(first, second, "a", "b")


def test_a_reward_model_has_one_output(policy: str, reward_model: str, tmp_path: Path) -> None:
    load.check_reward_model(AutoConfig.from_pretrained(reward_model), reward_model)
    with pytest.raises(ModelError, match="is LlamaForCausalLM"):
        load.check_reward_model(AutoConfig.from_pretrained(policy), policy)
    two = tiny.write_reward_model(tmp_path, outputs=2)
    with pytest.raises(ModelError, match="has 2 outputs"):
        load.check_reward_model(AutoConfig.from_pretrained(two), two)


def test_a_new_score_head_has_the_deviation_that_gives_unit_scores(policy: str) -> None:
    torch.manual_seed(0)
    heads = torch.stack([load.classifier(policy, "cpu").score.weight.detach().flatten() for _ in range(20)])
    assert heads.std() == pytest.approx((heads.shape[1] + 1) ** -0.5, rel=0.1)


def test_a_trained_score_head_stays(reward_model: str) -> None:
    expected = AutoModelForSequenceClassification.from_pretrained(reward_model).score.weight
    assert torch.equal(load.classifier(reward_model, "cpu").score.weight, expected)


def test_normalisation_is_kept_in_the_model_configuration(reward_model: str, tmp_path: Path) -> None:
    model = load.classifier(reward_model, "cpu")
    assert load.score_normalisation(model.config) == (0.0, 1.0)
    setattr(model.config, load.NORMALISATION, {"mean": 0.5, "sd": 2.0})
    load.save(model, tiny.tokenizer(), tmp_path)
    assert load.score_normalisation(load.model_config(str(tmp_path), "reward.model")) == (0.5, 2.0)


@pytest.mark.parametrize("which", ["policy", "tied_policy"])
def test_saved_parameters_replace_those_of_the_model(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(which)
    model = load.causal_lm(folder, "cpu")
    state = {name: parameter.detach() + 1 for name, parameter in model.named_parameters()}
    load.save(model, load.tokenizer(folder, "policy"), tmp_path, state)
    again = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], weight) for name, weight in state.items())


def test_what_is_saved_is_an_ordinary_folder_with_the_usual_names(policy: str, tmp_path: Path) -> None:
    load.save(load.causal_lm(policy, "cpu"), load.tokenizer(policy, "policy"), tmp_path)
    with (
        safe_open(tmp_path / "model.safetensors", "pt") as saved,
        safe_open(Path(policy) / "model.safetensors", "pt") as original,
    ):
        assert set(saved.keys()) == set(original.keys())
    assert "rlhf_ray" not in (tmp_path / "config.json").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tiny.CHAT
