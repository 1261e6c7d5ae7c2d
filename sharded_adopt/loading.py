"""What of ADOPT goes into a state dict, and what of a state dict goes into ADOPT.

torch casts loaded state to the dtype of its parameter. To keep fp32 state of 16-bit parameters, a parameter's state is
hidden from torch between two hooks: `unpack` wraps it before torch looks, `reveal_state` takes it out again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sharded_adopt import foreign, options
from sharded_adopt.kernels import check_choice, fused_is_available


def checked_group(group: dict[str, Any]) -> dict[str, Any]:
    """Return a group's options in the form that the optimizer keeps, if this machine's kernels can serve them."""
    values = options.checked(group)
    check_choice(foreach=values["foreach"], fused=values["fused"], differentiable=values["differentiable"])
    return values


def pack_groups(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Post hook of `state_dict`: leave plain data in the groups."""
    state_dict["param_groups"] = [options.to_data(group) for group in state_dict["param_groups"]]


def unpack(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Pre hook of `load_state_dict`: translate, check, and hide the state from torch's casts."""
    state_dict = foreign.translate(state_dict)
    groups = state_dict["param_groups"]
    if len(groups) == len(optimizer.param_groups):  # torch says it where not
        groups = [options.from_data(new, old) for new, old in zip(groups, optimizer.param_groups, strict=True)]
        for group in groups:
            if group["fused"] and not group["foreach"] and not fused_is_available():
                group["fused"] = None  # which kernel there is belongs to the machine, not to the run
            checked_group(group)
    state = {key: _Kept(values) if isinstance(values, dict) else values for key, values in state_dict["state"].items()}
    return {**state_dict, "state": state, "param_groups": groups}


def reveal_state(loaded: dict[str, Any]) -> None:
    """Put the state that `unpack` has hidden back into `loaded`, which torch hands to `__setstate__`.

    Raises `ValueError` for a state that does not fit its parameter. Without hidden state nothing happens.
    """
    state = loaded["state"]
    for group in loaded["param_groups"]:
        for index, param in enumerate(group["params"]):
            kept = state.get(param)
            if isinstance(kept, _Kept):
                state[param] = _fitted(kept.values, param, group, options.parameter_name(group, index))
    for key, kept in state.items():
        if isinstance(kept, _Kept):
            state[key] = kept.values


class _Kept:
    """One parameter's loaded state, hidden from torch, which would cast it to the parameter's dtype."""

    __slots__ = ("values",)

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values


def _fitted(values: dict[str, Any], param: Tensor, group: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a copy of a parameter's loaded state in the dtypes and on the device that `init_state` would have used."""
    if not values:
        return {}
    fitted = dict(values)
    for key, dtype in zip(("exp_avg", "exp_avg_sq"), options.state_dtypes(param, group["state_dtype"]), strict=True):
        value = values.get(key)
        if not isinstance(value, Tensor) or value.shape != param.shape or value.is_complex() != param.is_complex():
            expected = f"a {'complex' if param.is_complex() else 'real'} tensor of shape {tuple(param.shape)}"
            found = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"state of parameter {name}: {key} must be {expected}, the state dict holds {found}")
        fitted[key] = value.detach().to(device=param.device, dtype=dtype, copy=True)
    if "step" not in values:
        raise ValueError(f"state of parameter {name}: the state dict holds no step, only {sorted(values)}")
    step = torch.as_tensor(values["step"]).detach().reshape(())
    fitted["step"] = step.to(device=options.step_device(param, group), dtype=torch.float32, copy=True)
    return fitted
