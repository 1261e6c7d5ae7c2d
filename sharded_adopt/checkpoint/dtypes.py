"""Names and widths of dtypes in memory and in a file, and single numbers of them."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

# torch's name -> the name in a safetensors header
_PLAIN = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
# Complex numbers are stored as pairs: not every reader of the format knows a complex dtype.
_PAIRS = {"complex64": "F32", "complex128": "F64"}

NAMES = frozenset(_PLAIN) | frozenset(_PAIRS)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of `dtype` in a manifest, such as `float32`. Raises `TypeError` where no file format has it."""
    name = str(dtype).removeprefix("torch.")
    if name not in NAMES:
        raise TypeError(f"{dtype} cannot be stored: a checkpoint holds {', '.join(sorted(NAMES))}")
    return name


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of that name in a manifest."""
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def file_dtype(name: str) -> str:
    """How a safetensors header names the elements of that dtype."""
    return _PLAIN.get(name) or _PAIRS[name]


def file_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in a safetensors header: complex numbers have one more dimension, of size 2."""
    return (*shape, 2) if name in _PAIRS else shape


def itemsize(name: str) -> int:
    """Bytes of one element."""
    return torch_dtype(name).itemsize


def scalar_value(tensor: Tensor) -> Any:
    """The number in a 0-dim tensor as plain data: bool, int, float, or [real, imaginary]."""
    number = tensor.item()
    return [number.real, number.imag] if isinstance(number, complex) else number


def scalar_tensor(name: str, value: Any, where: str = "a scalar") -> Tensor:
    """The 0-dim CPU tensor for which `scalar_value` gave `value`. Raises `ValueError` where that dtype has no such."""
    dtype = torch_dtype(name)
    if name in _PAIRS:
        if not (isinstance(value, list) and len(value) == 2 and all(type(part) is float for part in value)):
            _refuse(where, name, value)
        return torch.tensor(complex(*value), dtype=dtype)
    if dtype.is_floating_point:
        good = type(value) is float
    elif dtype is torch.bool:
        good = type(value) is bool
    else:
        limits = torch.iinfo(dtype)
        good = type(value) is int and limits.min <= value <= limits.max
    if not good:
        _refuse(where, name, value)
    return torch.tensor(value, dtype=dtype)


def _refuse(where: str, name: str, value: Any) -> NoReturn:
    raise ValueError(f"{where}: {str(value)[:40]} is not a {name}")
