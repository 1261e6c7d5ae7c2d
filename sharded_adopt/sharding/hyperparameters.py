"""The values of a parameter group as plain data: to compare between ranks, and to write as JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def comparable(group: Mapping[str, Any]) -> dict[str, str]:
    """A group's hyperparameters in words that are equal on two ranks exactly if the values are."""
    return {key: _in_words(value) for key, value in group.items() if key not in ("params", "param_names")}


def _in_words(value: Any) -> str:
    if isinstance(value, Tensor):
        # Its own words show four digits, and the number of the device, which differs between ranks.
        return f"{value.dtype} {value.tolist()!r}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_in_words, value))})"
    # The address in the words of a function or an object differs between ranks that pass the same.
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def summary_of_groups(groups: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Every value of every group under a name that an error can show."""
    return {f"group {n}.{key}": words for n, group in enumerate(groups) for key, words in comparable(group).items()}


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
