"""Tiny random models and a tiny tokenizer, as ordinary Hugging Face folders."""

from pathlib import Path

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = [*"abcdefghijklmnopqrstuvwxyz0123456789"]


def tokenizer():
    """One token a letter; distinct pad and EOS; a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>", "<system>"]
    vocabulary = {token: number for number, token in enumerate([*special, *WORDS, " "])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=special[3:],
    )
    made.chat_template = CHAT
    return made


def _config(tied: bool, layers: int = 2):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.15,
    )


def write_policy(folder: Path, seed: int = 0, tied: bool = False, layers: int = 2) -> str:
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(_config(tied, layers)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def write_reward_model(folder: Path, seed: int = 1, outputs: int = 1, layers: int = 2) -> str:
    import torch
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(seed)
    config = _config(tied=False, layers=layers)
    config.num_labels = outputs
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def write_judge(folder: Path, seed: int = 2) -> str:
    """A policy whose tokenizer knows the letters and brackets of (A) and (B), each of which is three tokens."""
    write_policy(folder, seed)
    with_letters = tokenizer()
    with_letters.add_tokens(["(", ")", "A", "B"])
    with_letters.save_pretrained(folder)
    return str(folder)
