"""Reading and writing Hugging Face folders, and refusing what does not fit before any weight is read.

A model folder may come from anybody: weights are read from safetensors alone, never from a pickle, and code that a
folder brings along runs only where the person said `trust_remote_code`.

Everything a person can get wrong about a model (no such folder, not a model, two outputs where one is needed, another
vocabulary) is told from the small JSON files, in the driver, within seconds.
"""

import json
import logging
import socket
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rlhf_ray.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from rlhf_ray.models.device import Device
    from rlhf_ray.models.heads import Head

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
"""One of them is in every model folder that can be read."""
NORMALISATION = "rlhf_ray_score"
"""Key in a reward model's config.json: {"mean": ..., "sd": ...} of its raw scores on held-out answers."""


def quiet() -> None:
    """Loading bars and advice of transformers do not belong in a job's log."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def model_config(path: str, role: str, trust_remote_code: bool = False) -> "PretrainedConfig":
    """config.json of a model. Raises ModelError when there is none; `role` names the place in the configuration."""
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"{role}: '{path}' has no config.json, so it is not a Hugging Face model folder")
    if folder.is_file():
        raise ModelError(f"{role}: '{path}' is a file; expected a Hugging Face model folder")
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if not folder.exists() and looks_local:
        raise ModelError(f"{role}: '{path}' does not exist; expected a Hugging Face model folder or a hub name")
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=not folder.exists() and not _hub_answers()
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{role}: '{path}' is neither a model folder nor a hub model within reach: {reason}") from None
    if folder.is_dir() and not any((folder / name).is_file() for name in WEIGHTS):
        raise ModelError(
            f"{role}: '{path}' has no weights in safetensors; others can hold code that runs when they are read, "
            f"so none of them is. Where you trust that folder, load it with transformers and save it again"
        )
    return found  # type: ignore[no-any-return]


def tokenizer(path: str, role: str, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer beside a model. Raises ModelError when it is missing or has no end-of-sequence token."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{role}: no tokenizer can be read from '{path}': {reason}") from None
    if found.eos_token_id is None:
        raise ModelError(f"{role}: the tokenizer of '{path}' has no end-of-sequence token; answers could never end")
    return found


def eos_ids(path: str, tokens: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Every id that ends an answer: the tokenizer's, and those of the model's generation_config.json."""
    from transformers import GenerationConfig

    ids = {tokens.eos_token_id}
    try:
        found = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # many models have no such file
        found = None
    ids.update(found if isinstance(found, list) else [] if found is None else [found])
    return tuple(sorted(ids))


def check_vocabulary(tokens: "PreTrainedTokenizerBase", config: "PretrainedConfig", path: str, role: str) -> None:
    """Every id that the tokenizer can produce must have a row in the model's embedding."""
    if len(tokens) > config.vocab_size:
        raise ModelError(
            f"{role}: the tokenizer of '{path}' has {len(tokens)} tokens, but the model's vocab_size is "
            f"{config.vocab_size}: they do not belong together. Put the tokenizer there that the model was trained with"
        )


def check_same_tokenizer(
    first: "PreTrainedTokenizerBase", second: "PreTrainedTokenizerBase", first_path: str, second_path: str
) -> None:
    """Token ids travel between roles as they are, so both must mean the same by each id."""
    if first.get_vocab() != second.get_vocab():
        raise ModelError(
            f"the tokenizers of '{first_path}' ({len(first)} tokens) and '{second_path}' ({len(second)} tokens) "
            "differ: policy and reward model exchange token ids. Train the reward model from the same base, or give "
            "the reward as a function or url, which receive text"
        )


def check_reward_model(config: "PretrainedConfig", path: str, role: str = "reward.model") -> None:
    """Raises ModelError unless the model is a sequence classifier with one output."""
    kinds = config.architectures or []
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise ModelError(
            f"{role}: '{path}' is {', '.join(kinds) or 'of unknown kind'}; expected a sequence-classification "
            "model with one output, such as `rlhf-ray reward` writes"
        )
    if config.num_labels != 1:
        raise ModelError(
            f"{role}: '{path}' has {config.num_labels} outputs; expected exactly one, as `rlhf-ray reward` trains"
        )


def causal_lm(
    path: str, device: "Device", trust_remote_code: bool = False, over: "Sequence[torch.device]" = ()
) -> "PreTrainedModel":
    """A causal language model with packed attention and no dropout, on the device; one that does not train may be
    spread `over` several (models/spread.py)."""
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, path, device, trust_remote_code, over)


def classifier(
    path: str, device: "Device", trust_remote_code: bool = False, over: "Sequence[torch.device]" = ()
) -> "PreTrainedModel":
    """A sequence classifier with one output; a causal model gets a new head of standard deviation 1/sqrt(H + 1).

    `over` as in `causal_lm`."""
    from torch import nn
    from transformers import AutoModelForSequenceClassification

    model = _load(AutoModelForSequenceClassification, path, device, trust_remote_code, over, num_labels=1)
    if not any(kind.endswith("ForSequenceClassification") for kind in _architectures(path)):
        with _whole(model.score.weight):
            nn.init.normal_(model.score.weight, std=(model.config.hidden_size + 1) ** -0.5)
    return model


def frozen_head(model: "PreTrainedModel") -> "Head":
    """A copy of a language model's output head as it is now, whole and without gradients.

    A collective under ZeRO-3, while parameters are being sharded.
    """
    from torch.nn import functional

    head: Any = model.get_output_embeddings()
    with _whole(*head.parameters()):
        weight = head.weight.detach().clone()
        bias = head.bias.detach().clone() if head.bias is not None else None
    return lambda hidden: functional.linear(hidden, weight, bias)


def score_normalisation(config: "PretrainedConfig") -> tuple[float, float]:
    """Mean and standard deviation kept with a reward model; (0, 1) for one that has none."""
    kept = getattr(config, NORMALISATION, None)
    return (float(kept["mean"]), float(kept["sd"])) if kept else (0.0, 1.0)


def save(
    model: Any,
    tokens: "PreTrainedTokenizerBase",
    folder: Path,
    state: dict[str, Any] | None = None,
    beside: dict[str, dict[str, Any]] | None = None,
) -> None:
    """An ordinary Hugging Face folder: safetensors, configuration, tokenizer with its chat template.

    `state` replaces the model's own parameters where those are sharded; `beside` are further files of tensors, by path.
    """
    from safetensors.torch import save_file

    model.save_pretrained(folder, state_dict=state)
    tokens.save_pretrained(folder)
    for name, tensors in (beside or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        save_file(tensors, folder / name)


def _whole(*weights: Any) -> AbstractContextManager:
    """Within it, weights that ZeRO-3 sharded while loading are whole, and what rank 0 writes is everybody's."""
    if not hasattr(weights[0], "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(weights), modifier_rank=0)


@cache
def _hub_answers() -> bool:
    """The hub's own client tries an unreachable hub for half a minute before it looks into its cache."""
    from huggingface_hub import constants

    server = urlsplit(constants.ENDPOINT)
    try:
        with socket.create_connection((server.hostname, server.port or 443), timeout=3):
            return True
    except OSError:
        return False


def _architectures(path: str) -> list[str]:
    file = Path(path) / "config.json"
    return json.loads(file.read_text()).get("architectures") or [] if file.is_file() else []


def _load(
    kind: Any, path: str, device: "Device", trust_remote_code: bool, over: "Sequence[torch.device]", **options: Any
) -> "PreTrainedModel":
    import torch

    from rlhf_ray.models.device import torch_device
    from rlhf_ray.models.heads import switch_off_dropout
    from rlhf_ray.models.packed import ATTENTION, register_attention

    quiet()
    register_attention()
    options |= {
        "dtype": torch.bfloat16 if device == "gpu" else torch.float32,
        "attn_implementation": ATTENTION,
        "trust_remote_code": trust_remote_code,
    }
    if len(over) > 1:
        options["device_map"] = _device_map(kind, path, over, **options)
    model: nn.Module = kind.from_pretrained(path, use_safetensors=True, **options)
    switch_off_dropout(model)
    return model if len(over) > 1 else model.to(torch_device(device))  # type: ignore[return-value]


def _device_map(kind: Any, path: str, over: "Sequence[torch.device]", **options: Any) -> "dict[str, torch.device]":
    """From the model's shapes alone, before a weight is read."""
    import torch
    from transformers import AutoConfig

    from rlhf_ray.models.spread import device_map

    dtype, trusted = options.pop("dtype"), options["trust_remote_code"]
    config = AutoConfig.from_pretrained(path, **options)
    with torch.device("meta"):
        shapes = kind.from_config(config, dtype=dtype, trust_remote_code=trusted)
    return {name: over[place] for name, place in device_map(shapes, len(over)).items()}
