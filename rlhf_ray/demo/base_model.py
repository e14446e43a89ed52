"""The demo's tokenizer and base model: a Llama of about a million parameters, trained from scratch on the corpus.

The number of steps is fixed, never the seconds, so that the model depends on the seed alone. Pad, EOS and the turns'
marks are four different tokens: were pad and EOS one, models would never learn to stop.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_ray.demo.world import World

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PAD, EOS, USER, ASSISTANT = "<pad>", "<eos>", "<user>", "<assistant>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<user>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<assistant>{{ message['content'] }}<eos>"
    "{% else %}{{ raise_exception('turns are user or assistant') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CONTEXT = 128
"""Longest sequence in tokens; a dialogue takes about 40."""


class Recipe(NamedTuple):
    """How the base model is trained."""

    dialogues: int = 20_000
    steps: int = 600
    dialogues_per_step: int = 32
    learning_rate: float = 5e-3
    warmup_steps: int = 20


USUAL = Recipe()


def make_tokenizer(corpus: list[dict[str, Any]], vocabulary: int = 768) -> "PreTrainedTokenizerFast":
    """Byte-level BPE of at most `vocabulary` tokens, learned from `corpus`; any text encodes and decodes to itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((turn["content"] for row in corpus for turn in row["messages"]), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: "PreTrainedTokenizerFast") -> "LlamaForCausalLM":
    """A randomly initialised Llama for `tokenizer`, about a million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
            initializer_range=0.06,  # 0.02 suits widths of thousands; at 128 facts are learned much later with it
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train_base(
    folder: str | Path,
    world: World,
    seed: int,
    recipe: Recipe = USUAL,
    log: Callable[[int, float], None] = lambda step, loss: None,
) -> dict[str, float]:
    """`train` on the world's corpus."""
    return train(folder, world.corpus(recipe.dialogues), seed, recipe, log)


def train(
    folder: str | Path,
    corpus: list[dict[str, Any]],
    seed: int,
    recipe: Recipe,
    log: Callable[[int, float], None] = lambda step, loss: None,
) -> dict[str, float]:
    """Trains a base model on dialogues {"messages"} and saves an ordinary Hugging Face folder.

    `log` is called with the step and its loss in nats per token. Returns loss_first, loss_last (means over the first
    step and the last ten), seconds, parameters and tokens. Uses as many threads as torch is set to.
    """
    import torch

    started = time.monotonic()
    tokenizer = make_tokenizer(corpus)
    rows = tokenizer(
        [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in corpus], add_special_tokens=False
    )["input_ids"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_model(tokenizer)
        losses = _train(model, rows, tokenizer.pad_token_id, recipe, log)
    _save(folder, model, tokenizer)
    return {
        "loss_first": losses[0],
        "loss_last": sum(losses[-10:]) / len(losses[-10:]),
        "seconds": time.monotonic() - started,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": sum(map(len, rows)),
    }


def _train(
    model: "LlamaForCausalLM", rows: list[list[int]], pad: int, recipe: Recipe, log: Callable[[int, float], None]
) -> list[float]:
    import torch
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup_steps, recipe.steps)
    batches = _batches(rows, recipe.dialogues_per_step, pad)
    losses = []
    model.train()
    for step in range(recipe.steps):
        loss = _next_token_loss(model, next(batches), pad)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        log(step, losses[-1])
    return losses


def _next_token_loss(model: "LlamaForCausalLM", ids: "torch.Tensor", pad: int) -> "torch.Tensor":
    """Mean cross-entropy over the real tokens of ids [B, T]; pads lie on the right, where no real token sees them."""
    import torch

    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=pad)


def _batches(rows: list[list[int]], size: int, pad: int) -> Iterator["torch.Tensor"]:
    """Endless batches [size, T] of rows of like length, so that little is padded, in random order."""
    import torch

    by_length = sorted(rows, key=len)
    chunks = [by_length[start : start + size] for start in range(0, len(rows), size)]
    while True:
        for index in torch.randperm(len(chunks)).tolist():
            longest = max(map(len, chunks[index]))
            yield torch.tensor([row + [pad] * (longest - len(row)) for row in chunks[index]])


def _save(folder: str | Path, model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerFast") -> None:
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
