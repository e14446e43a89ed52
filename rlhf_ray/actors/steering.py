"""ILQL's policy inside vLLM: a class of model whose logits are the policy's, steered by the values of next tokens.

Registered through the entry point `vllm.general_plugins`, which vLLM calls in every process of an engine. Any of its
causal language models is wrapped: body, KV cache and output head stay vLLM's own, the heads read the hidden states that
the output head reads, in the model's dtype, and are whole on every tensor-parallel rank. All logits, to sample from, to
report and to score with, come from `compute_logits`. There must be no second way to them: tokens would be drawn from
one distribution and said to be of another.

vLLM is imported inside the methods. Without this project's engines the class is served by `vllm serve FOLDER
--hf-overrides '{"architectures": ["ILQLLlamaForCausalLM"]}'`, with the checkpoint's own decode_beta.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_ray.models.q_heads import FILE, SETTINGS, decoding_heads, steered, value_head

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PREFIX = "ILQL"
"""Before the name of an architecture: it, steered."""
HEADS = "ilql."
"""Before the name of a head's parameter, among the model's own."""


def register() -> None:
    """vLLM's entry point: every causal language model gets a steered form, which is made when it is asked for."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for name in list(ModelRegistry.get_supported_archs()):
        # What vLLM configures by an architecture's name it would not configure under another.
        if name.endswith("ForCausalLM") and not name.startswith(PREFIX) and name not in MODELS_CONFIG_MAP:
            ModelRegistry.register_model(PREFIX + name, f"{__name__}:{PREFIX}{name}")


def overrides(config: "PretrainedConfig", decode_beta: float) -> dict[str, Any]:
    """vLLM's `hf_overrides` for a checkpoint that has values: which class, and how much they count."""
    [name] = config.architectures  # type: ignore[misc]
    return {
        "architectures": [PREFIX + name],
        SETTINGS: {**getattr(config, SETTINGS), "decode_beta": decode_beta},
    }


def parameters(config: "PretrainedConfig") -> dict[str, tuple[int, ...]]:
    """Name -> shape of the heads' parameters, as they are published; nothing is allocated."""
    nowhere = torch.empty(0, device="meta")
    heads = decoding_heads(config.vocab_size, lambda outputs: value_head(config.hidden_size, outputs, nowhere))
    return {HEADS + name: tuple(parameter.shape) for name, parameter in heads.named_parameters()}


class Steered(nn.Module):
    """Goes before a model class of vLLM: log softmax(pi) + decode_beta (min_i Q_i - V) in place of pi's logits."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        from vllm.model_executor.layers.linear import ReplicatedLinear
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        super().__init__(vllm_config=vllm_config, prefix=prefix)
        model = vllm_config.model_config
        hidden = model.hf_config.hidden_size
        self.decode_beta: float = getattr(model.hf_config, SETTINGS)["decode_beta"]

        def head(outputs: int) -> nn.Module:
            """As `value_head`, of vLLM's layers: on CPU they take half the time of torch's."""
            inner = ReplicatedLinear(hidden, 2 * hidden, return_bias=False)
            return nn.Sequential(inner, nn.ReLU(), ReplicatedLinear(2 * hidden, outputs, return_bias=False))

        self.ilql = decoding_heads(model.hf_config.vocab_size, head)
        folder = str(PurePath(FILE).parent)
        self.secondary_weights = [DefaultModelLoader.Source(model.model, model.revision, folder, prefix=HEADS)]

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """[R, V] of hidden_states [R, hidden]; none on tensor-parallel ranks that do not sample."""
        logits = super().compute_logits(hidden_states)
        if logits is None or self.decode_beta == 0:
            return logits
        return steered(logits, hidden_states, self.ilql, self.decode_beta)

    @property
    def compute_logits_local(self) -> Any:
        """Some policies have a rank's part of their logits by this name, from which vLLM can sample: not here."""
        raise AttributeError("compute_logits_local")

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Of a checkpoint or of a publication. vLLM refuses a checkpoint in which a parameter is missing."""
        from vllm.model_executor.model_loader.weight_utils import default_weight_loader

        heads = {name: parameter for name, parameter in self.named_parameters() if name.startswith(HEADS)}
        loaded = set()

        def others() -> Iterator[tuple[str, Tensor]]:
            for name, weight in weights:
                if not name.startswith(HEADS):
                    yield name, weight
                elif name in heads:  # and not a head that only training asks
                    getattr(heads[name], "weight_loader", default_weight_loader)(heads[name], weight)
                    loaded.add(name)

        return super().load_weights(others()) | loaded


@cache
def _steered(name: str) -> type[nn.Module]:
    from vllm.model_executor.models import ModelRegistry

    base = ModelRegistry.models[name.removeprefix(PREFIX)].load_model_cls()
    return type(name, (Steered, base), {"__module__": __name__})


def __getattr__(name: str) -> type[nn.Module]:
    """vLLM imports a class by its name, such as ILQLLlamaForCausalLM."""
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _steered(name)
