"""The values of a parameter group as plain data: to compare between ranks, and to write as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def comparable(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's hyperparameters for comparison between ranks."""
    values = {k: v for k, v in group.items() if k not in ("params", "param_names")}
    # The address in a function's repr differs between ranks that pass the same function.
    return {k: getattr(v, "__qualname__", v) if callable(v) and "0x" in repr(v) else v for k, v in values.items()}


def summary_of_groups(groups: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Every value of every group under a name that an error can show."""
    return {f"group {n}.{k}": repr(v) for n, group in enumerate(groups) for k, v in comparable(group).items()}


def to_json(key: str, value: Any) -> object:
    """`value` of hyperparameter `key` as JSON. Raises `ValueError` naming a key whose value has no such form."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"hyperparameter {key!r} is a tensor of shape {tuple(value.shape)}; expected a 0-dim one")
        return {"tensor": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, torch.dtype):
        return {"torch_dtype": str(value).removeprefix("torch.")}
    if isinstance(value, (tuple, list)):
        return [to_json(key, one) for one in value]
    if isinstance(value, Mapping):
        return {str(k): to_json(key, v) for k, v in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"hyperparameter {key!r} cannot be written as JSON: {value!r}")


def from_json(value: Any) -> Any:
    """The inverse of `to_json`; sequences come as tuples."""
    if isinstance(value, Mapping):
        if set(value) == {"tensor", "dtype"}:
            return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
        if set(value) == {"torch_dtype"}:
            return getattr(torch, value["torch_dtype"])
        return {key: from_json(one) for key, one in value.items()}
    if isinstance(value, list):
        return tuple(from_json(one) for one in value)
    return value
