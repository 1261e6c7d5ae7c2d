"""The options of ADOPT's parameter groups: which there are, what they may be, and how a state dict spells them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sharded_adopt.clipping import as_clip, clip_from_data, clip_to_data, is_number

StateDtype: TypeAlias = "torch.dtype | tuple[torch.dtype | None, torch.dtype | None] | None"

INITS = ("parameter", "element")
_STATE_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_WIDENED = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.complex32: torch.complex64}


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a group in the form that the optimizer keeps; others in the mapping are left out.

    `betas` becomes a tuple, `clip_lambda` a `PowerClip`, None or a callable. Raises `ValueError` naming the argument
    and the value.
    """
    flags = ("decouple", "maximize", "capturable", "differentiable", "nesterov")
    return {
        "lr": _lr(options["lr"]),
        "betas": _betas(options["betas"]),
        "eps": _number("eps", options["eps"]),
        "clip_lambda": as_clip(options["clip_lambda"]),
        "weight_decay": _number("weight_decay", options["weight_decay"]),
        **{name: _flag(name, options[name]) for name in flags},
        **{name: None if options[name] is None else _flag(name, options[name]) for name in ("foreach", "fused")},
        "state_dtype": _state_dtype(options["state_dtype"]),
        "init": _init(options["init"]),
    }


def _number(name: str, value: Any, *, below: float = math.inf) -> float:
    if not is_number(value) or not 0.0 <= value < below:
        limit = "finite" if below == math.inf else f"below {below:g}"
        raise ValueError(f"{name} must be a number of at least 0 and {limit}, got {value!r}")
    return float(value)


def _lr(value: Any) -> float | Tensor:
    if not isinstance(value, Tensor):
        return _number("lr", value)
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(f"lr as a tensor must have one floating point element, got {value!r}")
    if not torch.compiler.is_compiling():
        _number("lr", value.item())
    return value


def _betas(value: Any) -> tuple[float, float]:
    if isinstance(value, (str, Tensor)) or not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(f"betas must be two numbers (beta1, beta2), got {value!r}")
    return _number("betas[0]", value[0], below=1.0), _number("betas[1]", value[1], below=1.0)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def _init(value: Any) -> str:
    if value not in INITS:
        raise ValueError(f"init must be one of {INITS}, got {value!r}")
    return str(value)


def _state_dtype(value: Any) -> StateDtype:
    dtypes = value if isinstance(value, (tuple, list)) else (value, value)
    if len(dtypes) != 2 or any(dtype is not None and dtype not in _STATE_DTYPES.values() for dtype in dtypes):
        raise ValueError(
            f"state_dtype must be None, one of {sorted(_STATE_DTYPES)} as a torch.dtype, or a pair of these for "
            f"(exp_avg, exp_avg_sq), got {value!r}"
        )
    return value if not isinstance(value, (tuple, list)) else (value[0], value[1])


def state_dtypes(param: Tensor, state_dtype: StateDtype) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes of (exp_avg, exp_avg_sq): as asked for, and fp32 for a 16-bit parameter where nothing was.

    Raises `ValueError` for a dtype asked for with a complex parameter: its state is complex, as the parameter is.
    """
    pair = state_dtype if isinstance(state_dtype, tuple) else (state_dtype, state_dtype)
    if param.is_complex() and pair != (None, None):
        raise ValueError(
            f"state_dtype={state_dtype} cannot be used with a complex parameter; its state is complex, leave it None"
        )
    default = _WIDENED.get(param.dtype, param.dtype)
    return pair[0] or default, pair[1] or default


def to_data(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group as a state dict may hold it: `clip_lambda` and `state_dtype` as plain data."""
    packed = dict(group)
    if "clip_lambda" in packed:
        packed["clip_lambda"] = clip_to_data(as_clip(packed["clip_lambda"]))
    if "state_dtype" in packed:
        packed["state_dtype"] = _dtype_names(packed["state_dtype"])
    return packed


def _dtype_names(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_dtype_names(dtype) for dtype in value]
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def from_data(data: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group of a state dict as the optimizer keeps it; options that are not in it stay as in `current`."""
    group = dict(data)
    if "clip_lambda" in group:
        group["clip_lambda"] = clip_from_data(group["clip_lambda"], current["clip_lambda"])
    names = group.get("state_dtype")
    if isinstance(names, (str, list)):
        listed = [names] if isinstance(names, str) else names
        dtypes = tuple(_STATE_DTYPES.get(name, name) for name in listed)
        group["state_dtype"] = dtypes[0] if isinstance(names, str) else dtypes
    options = {name: value for name, value in current.items() if name not in ("params", "param_names")}
    group.update(checked({**options, **group}))
    return group


def step_device(param: Tensor, group: Mapping[str, Any]) -> torch.device:
    """Return where `step` lives: on the CPU, where a host reads it for free, unless a kernel may not be read from."""
    return param.device if group["capturable"] or group["fused"] else torch.device("cpu")


def parameter_name(group: Mapping[str, Any], index: int) -> str:
    """Return what to call a parameter in an error: its name if it has one, else its place and shape."""
    if "param_names" in group:
        return str(group["param_names"][index])
    return f"number {index} of its group (shape {tuple(group['params'][index].shape)})"
