"""A tokenizer small enough to make in the test, in the three conditions that data meets: no template, ours, ChatML."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rlhf_ray.data.templates import ensure_chat_template

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = ["What is a cat? A cat is an animal.\n\nHuman: Hello\n\nAssistant: Good day, how are you?"] * 3


def _make(adds_bos: bool = False, eos: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """Byte-level BPE; with `adds_bos` it writes <s> before any text, as Llama's does."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "<|im_start|>", "<|im_end|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=eos)


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return _make


@pytest.fixture
def raw() -> PreTrainedTokenizerFast:
    """No chat template."""
    return _make()


@pytest.fixture
def plain() -> PreTrainedTokenizerFast:
    """The project's own template."""
    return ensure_chat_template(_make())


@pytest.fixture
def chatml() -> PreTrainedTokenizerFast:
    """A template that writes a line break after the EOS of every turn, the user's too."""
    tokenizer = _make()
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """Writes rows as JSON lines, gzipped if the name says so, and returns the path."""

    def write(*rows: Any, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return str(path)

    return write
