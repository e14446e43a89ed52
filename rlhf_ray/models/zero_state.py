"""What an optimiser has come to, by parameter name and whole: the same for every ZeRO stage and number of ranks.

Kept as safetensors: nothing is unpickled when a run goes on. A fresh DeepSpeed engine has no moments to write to, and
its parameters follow its master weights only at the next step; both are seen to here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.errors import ModelError
from rlhf_ray.models import zero

MASTER, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


def optimizer_state(engine: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Master weights and Adam's moments of each trained parameter, and what is counted besides: steps, the schedule.

    A collective; rank 0 has the tensors, in host memory, the others none.
    """
    tensors = {}
    for name, parameter in _trained(engine):
        for kind in (MASTER, *MOMENTS):
            whole = _get(engine, parameter, kind)
            if engine.global_rank == 0:
                tensors[f"{kind}/{name}"] = whole.detach().cpu().contiguous().clone()
    schedule = {key: value for key, value in engine.lr_scheduler.state_dict().items() if key != "lr_lambdas"}
    return tensors, {"steps": _steps(engine), "schedule": schedule}


def restore_optimizer(
    engine: Any, tensors: dict[str, Tensor], counted: dict[str, Any], touch: Callable[[Any], Tensor]
) -> None:
    """Brings a fresh engine to where another one was. A collective; every rank has all tensors.

    `touch` gives a number that depends on all trained parameters: a step without a gradient makes the moments.
    Raises ModelError when the tensors are not this model's.
    """
    wanted = {f"{kind}/{name}" for name, _ in _trained(engine) for kind in (MASTER, *MOMENTS)}
    if wanted != tensors.keys():
        apart = sorted(wanted ^ tensors.keys())
        raise ModelError(f"the checkpoint's optimiser state is of another model: '{apart[0]}' is not in both")
    engine.backward(touch(engine) * 0.0)
    engine.step()
    for name, parameter in _trained(engine):
        for kind in (MASTER, *MOMENTS):
            _set(engine, parameter, kind, tensors[f"{kind}/{name}"].to(engine.device))
        with zero.whole(engine, [parameter]), torch.no_grad():
            parameter.copy_(tensors[f"{MASTER}/{name}"])
    for state in _inner(engine).state.values():
        if "step" in state:
            state["step"] = (
                torch.tensor(float(counted["steps"])) if torch.is_tensor(state["step"]) else counted["steps"]
            )
    lambdas = {"lr_lambdas": [None] * len(_inner(engine).param_groups)}  # functions are not kept: they are configured
    engine.lr_scheduler.load_state_dict({**counted["schedule"], **lambdas})
    for group, rate in zip(_inner(engine).param_groups, engine.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = rate


def _trained(engine: Any) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]


def _inner(engine: Any) -> torch.optim.Optimizer:
    """Torch's own, which DeepSpeed wraps at stages 1 to 3."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _steps(engine: Any) -> int:
    return max((int(state["step"]) for state in _inner(engine).state.values() if "step" in state), default=0)


def _get(engine: Any, parameter: nn.Parameter, kind: str) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_optimization_stage() == 0:
        return parameter if kind == MASTER else _inner(engine).state[parameter][kind]
    return safe_get_full_fp32_param(parameter) if kind == MASTER else safe_get_full_optimizer_state(parameter, kind)


def _set(engine: Any, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if engine.zero_optimization_stage() == 0:
        if kind != MASTER:
            _inner(engine).state[parameter][kind].copy_(value)
    elif kind == MASTER:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, kind)
