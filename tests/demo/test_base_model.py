from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rlhf_ray.demo.base_model import Recipe, make_tokenizer, train_base
from rlhf_ray.demo.world import World

SHORT = Recipe(dialogues=200, steps=12, dialogues_per_step=16, warmup_steps=2)
ASKED = [{"role": "user", "content": "what colour is grass?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "grass is green."}]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(World(0).corpus(2000))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float], list[float]]:
    folder, losses = tmp_path_factory.mktemp("base"), []
    summary = train_base(folder, World(0), 0, SHORT, lambda step, loss: losses.append(loss))
    return folder, summary, losses


def chat(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], ask: bool = False) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=ask, return_dict=False)


@given(text=st.text())
def test_any_text_comes_back_from_its_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    for mark in tokenizer.all_special_tokens:
        text = text.replace(mark, "")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_four_and_distinct(tokenizer: PreTrainedTokenizerFast) -> None:
    marks = tokenizer.convert_tokens_to_ids([tokenizer.pad_token, tokenizer.eos_token, "<user>", "<assistant>"])
    assert sorted(marks) == [0, 1, 2, 3]
    assert tokenizer.bos_token_id is None


def test_prompt_is_a_prefix_of_the_dialogue_token_by_token(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt, whole = chat(tokenizer, ASKED, ask=True), chat(tokenizer, ANSWERED)
    assert whole[: len(prompt)] == prompt
    assert chat(tokenizer, [*ANSWERED, *ASKED])[: len(whole)] == whole


def test_answers_alone_end_with_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = chat(tokenizer, [*ANSWERED, *ANSWERED])
    assert ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.eos_token_id) == 2
    assert tokenizer.eos_token_id not in chat(tokenizer, ASKED, ask=True)


def test_prompt_without_its_marks_reads_as_it_was_asked(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = chat(tokenizer, ASKED, ask=True)
    assert tokenizer.decode(prompt, skip_special_tokens=True) == ASKED[0]["content"]


def test_dialogues_are_short_in_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    world = World(0)
    rows = world.sft_rows(500)
    prompts = [len(chat(tokenizer, row["messages"][:1], ask=True)) for row in rows]
    answers = [len(chat(tokenizer, row["messages"])) - prompt for row, prompt in zip(rows, prompts, strict=True)]
    assert max(prompts) <= 24
    assert max(answers) <= 32


def test_folder_loads_with_transformers_and_tokenizes_as_before(trained, tokenizer) -> None:  # type: ignore[no-untyped-def]
    folder, _, _ = trained
    loaded = AutoTokenizer.from_pretrained(folder)
    fresh = make_tokenizer(World(0).corpus(SHORT.dialogues))
    assert chat(loaded, ANSWERED) == chat(fresh, ANSWERED)
    assert loaded.encode(" un\ufb01t  TEXT\n") == fresh.encode(" un\ufb01t  TEXT\n")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == len(loaded)
    assert not model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == loaded.eos_token_id
    assert model.generation_config.pad_token_id == loaded.pad_token_id
    assert (folder / "model.safetensors").is_file()


def test_training_lowers_the_loss_from_that_of_a_uniform_guess(trained) -> None:  # type: ignore[no-untyped-def]
    _, summary, losses = trained
    assert len(losses) == SHORT.steps
    assert summary["loss_first"] == losses[0]
    assert summary["loss_last"] == pytest.approx(sum(losses[-10:]) / 10)
    assert losses[0] == pytest.approx(6.2, abs=1.0)  # ln of a vocabulary of a few hundred
    assert losses[-1] < losses[0] - 0.5


def test_same_seed_trains_the_same_model_and_leaves_the_callers_generator_alone(trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder, summary, _ = trained
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    again = train_base(tmp_path, World(0), 0, SHORT)
    assert torch.equal(torch.rand(3), expected)
    assert again["loss_last"] == summary["loss_last"]
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
