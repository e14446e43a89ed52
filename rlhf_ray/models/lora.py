"""Low-rank adapters on policy and critic (LoRA), through PEFT.

Nobody outside the learner meets an adapter: engines and checkpoints get W + alpha / rank B A under the ordinary model's
names, so publication, canary and evaluation are those of a fully trained model. What must never happen: the sum
written into the live model. Adding B A and taking it away again leaves rounding behind, and the weights beneath the
adapters are the frozen reference.
"""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from rlhf_ray.errors import ModelError
from rlhf_ray.models import zero

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

NAME = "default"
"""PEFT's name of the one adapter; part of its parameters' names."""

Targets = Sequence[str] | Literal["all-linear"]


def add_adapters(module: nn.Module, rank: int, alpha: float, targets: Targets, seed: int) -> None:
    """Freezes `module` and gives the linear layers `targets` adapters, in place. The model computes what it did.

    h = W x + alpha / rank B A x with A [rank, in] random by `seed`, alike on all ranks, and B [out, rank] zero (Hu et
    al. 2021, section 4.1). A target is the end of a layer's name, such as `q_proj` or `mlp.down_proj`; `all-linear` is
    every layer but the output head, which gets none: tied to the embedding, it could not be merged.

    For a critic pass its body alone, and the value head trains beside the adapters. Raises ModelError for a target that
    is no linear layer's.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    names = _linear_layers(module)
    ends = sorted({name.rpartition(".")[2] for name in names})
    chosen = ends if targets == "all-linear" else list(targets)
    for target in chosen:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            near = difflib.get_close_matches(target, ends) or ends
            raise ModelError(
                f"learner.lora.targets: '{target}' matches no linear layer of {type(module).__name__} that can have an "
                f"adapter; there are: {', '.join(near)}"
            )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT only divides it
        target_modules=chosen,
        fan_in_fan_out=any(isinstance(module.get_submodule(name), Conv1D) for name in names),
        base_model_name_or_path=getattr(getattr(module, "config", None), "_name_or_path", None),
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, module, NAME)


def base_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters beneath the adapters by the names of the Hugging Face checkpoint, in its order; tied ones once."""
    for name, parameter in model.named_parameters():
        if not _of_adapter(name):
            yield name.replace(".base_layer.", "."), parameter


def merged(engine: Any | None, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`base_weights` with adapters added, whole, one at a time; a tensor is good until the next is asked for.

    Summed in float32 and rounded once to the weight's dtype. Without adapters these are the model's own weights.
    A collective at ZeRO stage 3 of `engine`: all ranks iterate to the end.
    """
    layers = {f"{name}.weight": layer for name, layer in _adapted(model).items()}
    for name, weight in base_weights(model):
        layer = layers.get(name)
        adapter = [layer.lora_A[NAME].weight, layer.lora_B[NAME].weight] if layer else []
        with _whole(engine, [weight, *adapter]):
            yield name, _sum(weight.detach(), layer) if layer else weight.detach()


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within it the model computes what it did before it had adapters, bit for bit: the frozen reference."""
    layers = [layer for layer in _adapted(model).values() if not layer.disable_adapters]
    # PEFT's own switch also turns requires_grad off and on, which DeepSpeed took stock of when it was initialised.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def save_adapter(engine: Any | None, model: nn.Module, folder: Path) -> None:
    """Writes a causal language model's adapter as a PEFT folder, which PEFT and vLLM load.

    A collective at ZeRO stage 3 of `engine`; its rank 0 writes.
    """
    from safetensors.torch import save_file

    weights = {}
    for name, parameter in model.named_parameters():
        if _of_adapter(name):
            with _whole(engine, [parameter]):
                weights[f"base_model.model.{name.replace(f'.{NAME}.', '.')}"] = parameter.detach().cpu().clone()
    if engine is not None and engine.global_rank > 0:
        return
    config = replace(model.peft_config[NAME], task_type="CAUSAL_LM", inference_mode=True)  # type: ignore[index,type-var]
    config.save_pretrained(str(folder))
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _linear_layers(module: nn.Module) -> list[str]:
    """Names of the layers that can have an adapter."""
    from transformers.pytorch_utils import Conv1D

    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None  # type: ignore[operator]
    return [
        name for name, layer in module.named_modules() if isinstance(layer, nn.Linear | Conv1D) and layer is not head
    ]


def _adapted(model: nn.Module) -> dict[str, "LoraLayer"]:
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def _of_adapter(name: str) -> bool:
    return ".lora_" in name


def _sum(weight: Tensor, layer: Any) -> Tensor:
    """W + alpha / rank B A; all transposed where the layer keeps its weight as [in, out]."""
    a, b = (matrix[NAME].weight.detach().float() for matrix in (layer.lora_A, layer.lora_B))
    factors = (a.T, b.T) if layer.fan_in_fan_out else (b, a)
    return torch.addmm(weight.float(), *factors, alpha=layer.scaling[NAME]).to(weight.dtype)


def _whole(engine: Any | None, parameters: list[nn.Parameter]) -> AbstractContextManager:
    return nullcontext() if engine is None else zero.whole(engine, parameters)
