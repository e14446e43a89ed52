"""DeepSpeed engines, made one way for every stage.

Facts that shape this file, all of them silent or slow when missed:
- At ZeRO stage 0 in fp32 DeepSpeed applies NaN gradients; the caller checks losses before stepping (`finite`).
- Each `step()` is a boundary (`managed_gradient_accumulation: false`); losses are summed and divided by the global
  count by the caller, so gradients do not depend on ranks or micro-batches.
- DeepSpeed's own "AdamW" compiles C++ for a minute on CPU; torch's does not.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_ray.config.common import OptimizerConfig, ZeroConfig
from rlhf_ray.errors import TrainingError
from rlhf_ray.models.device import Device

if TYPE_CHECKING:
    from torch.optim import Optimizer

BETAS = (0.9, 0.95)
EPS = 1e-5


def import_deepspeed(device: Device) -> Any:
    """DeepSpeed, quiet, and on CPU without the C++ extension that it would compile for a minute and never use."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if device == "cpu":
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def settings(optimizer: OptimizerConfig, zero: ZeroConfig, device: Device) -> dict[str, Any]:
    """DeepSpeed's configuration. Batch sizes in it are formal: micro-batches are ours."""
    stage: dict[str, Any] = {"stage": zero.stage, "overlap_comm": device == "gpu"}
    if zero.offload != "none":
        stage["offload_optimizer"] = {"device": "cpu"}
    if zero.offload == "all":
        stage["offload_param"] = {"device": "cpu"}
    half = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True} if zero.bf16_optimizer else {}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": optimizer.max_grad_norm,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": device == "gpu", **half},
        "zero_optimization": stage,
    }


def sharded_loading(optimizer: OptimizerConfig, zero: ZeroConfig, device: Device) -> object | None:
    """At stage 3, the object that makes `from_pretrained` shard while it reads; keep it alive while loading."""
    if zero.stage < 3:
        return None
    import_deepspeed(device)
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(settings(optimizer, zero, device))


def make_engine(
    module: nn.Module,
    optimizer: OptimizerConfig,
    zero: ZeroConfig,
    device: Device,
    total_steps: int,
    learning_rate: float | None = None,
) -> Any:
    """A DeepSpeed engine over `module`; torch.distributed must be up. `learning_rate` overrides the optimizer's."""
    deepspeed = import_deepspeed(device)
    rate = learning_rate or optimizer.learning_rate
    if zero.gradient_checkpointing:
        _checkpoint_activations(module)
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=[parameter for parameter in module.parameters() if parameter.requires_grad],
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=rate, betas=BETAS, eps=EPS, weight_decay=0.0),
        lr_scheduler=lambda adam: schedule(adam, optimizer, total_steps),
        config=settings(optimizer, zero, device),
        dist_init_required=False,
    )
    return engine


def schedule(adam: "Optimizer", optimizer: OptimizerConfig, total_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up from one step's worth, then the configured fall to zero at `total_steps`."""
    return torch.optim.lr_scheduler.LambdaLR(adam, rate_factor(optimizer, total_steps))


def rate_factor(optimizer: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """Factor of the learning rate at step 0, 1, ...; the first step already moves.

    >>> [rate_factor(OptimizerConfig(warmup_share=0.5), 4)(step) for step in range(5)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    warmup = round(optimizer.warmup_share * total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if optimizer.schedule == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if optimizer.schedule == "linear":
            return 1.0 - progress
        return 0.5 * (1.0 + float(torch.cos(torch.tensor(progress * torch.pi))))

    return factor


def whole(engine: Any, parameters: list[nn.Parameter]) -> AbstractContextManager:
    """Within it, sharded parameters are whole on every rank. A collective: all ranks enter it together."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, enabled=engine.zero_optimization_stage() == 3)


def whole_weights(engine: Any, named: Iterator[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
    """Each parameter by name, whole, one at a time. A collective at stage 3: all ranks iterate to the end."""
    for name, parameter in named:
        with whole(engine, [parameter]):
            yield name, parameter.detach()


def step(engine: Any, what: str) -> float:
    """One clipped optimiser step; returns the global gradient norm before clipping.

    A collective. Raises TrainingError, with parameters unchanged, when the norm is not finite.
    """
    if engine.zero_optimization_stage() > 0:
        engine.step()  # leaves the parameters alone when the norm is not finite
        norm = float(engine.get_global_grad_norm())
    else:
        norm = _unsharded_norm(engine)
        if finite(torch.tensor(norm, device=engine.device)):
            engine.step()
    if not finite(torch.tensor(norm, device=engine.device)):
        raise TrainingError(f"the gradient norm of {what} is {norm}; the step was not taken")
    return norm


def _unsharded_norm(engine: Any) -> float:
    """At stage 0 DeepSpeed reports no norm and applies NaN: this rank's own norm, before ranks are averaged."""
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def finite(loss: Tensor) -> bool:
    """Whether `loss` is finite on every rank. A collective, so that all ranks refuse a step together."""
    bad = (~torch.isfinite(loss.detach())).float()
    torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
    return bad.item() == 0


def _checkpoint_activations(module: nn.Module) -> None:
    """Reentrant: ZeRO-3 shards parameters again between forward and recomputation, which the other form refuses."""
    for child in module.modules():
        if hasattr(child, "gradient_checkpointing_enable"):
            child.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            return
