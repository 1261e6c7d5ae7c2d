"""The rows of a manifest: a parameter, a group, a tensor of the model, a file; each to and from JSON.

What is read here may come from anybody: `from_json` raises `ValueError` with the place of a field that is not what it
must be.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sharded_adopt.checkpoint import dtypes
from sharded_adopt.checkpoint.plain import Fields, from_plain, natural, to_plain

# The key of a parameter's own values, beside those of its state.
PARAM_KEY = "param"
# Prefixes in a file that belong to something else.
_RESERVED_KEYS = frozenset({PARAM_KEY, "model", "rng"})
_RNG_SOURCE = re.compile(r"torch|python|numpy|cuda:[0-9]{1,4}")


def is_state_key(key: str) -> bool:
    """Whether a state may have this name in a file."""
    return bool(key) and "/" not in key and key not in _RESERVED_KEYS


@dataclass(frozen=True, slots=True)
class StoredParam:
    """One parameter and its state.

    `dtype` is that of the user's parameter. `tensors` maps `param` and each state key that has one value an element to
    the dtype in which it is stored; `scalars` maps the other state keys to (dtype, value). `dim_order` is as in
    `ParamSpec`: elements are counted, cut and stored in the order in which they lay in memory.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    dim_order: tuple[int, ...]
    tensors: Mapping[str, str]
    scalars: Mapping[str, tuple[str, Any]]

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def to_json(self) -> dict[str, Any]:
        """Plain data that says everything."""
        scalars = {key: {"dtype": dtype, "value": to_plain(one, key)} for key, (dtype, one) in self.scalars.items()}
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "dim_order": list(self.dim_order),
            "tensors": dict(self.tensors),
            "scalars": scalars,
        }

    @classmethod
    def from_json(cls, value: Any, where: str) -> StoredParam:
        """The inverse of `to_json`."""
        fields = Fields(value, where)
        param = cls(
            name=fields.text("name"),
            shape=_shape(fields, where),
            dtype=_dtype(fields.text("dtype"), where),
            dim_order=fields.list("dim_order", natural),
            tensors={key: _dtype(dtype, where) for key, dtype in fields.object("tensors").items()},
            scalars={key: _scalar(one, f"{where}: {key!r}") for key, one in fields.object("scalars").items()},
        )
        if sorted(param.dim_order) != list(range(len(param.shape))):
            raise ValueError(f"{where}: dim_order {list(param.dim_order)} does not fit shape {list(param.shape)}")
        if PARAM_KEY not in param.tensors:
            raise ValueError(f"{where}: the values of the parameter itself are not stored")
        states = [*(key for key in param.tensors if key != PARAM_KEY), *param.scalars]
        if len(set(states)) != len(states) or not all(is_state_key(key) for key in states):
            raise ValueError(f"{where}: {states} are not names of states")
        return param


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """The names of one parameter group and its hyperparameters."""

    params: tuple[str, ...]
    hyperparameters: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain data that says everything."""
        return {"params": list(self.params), "hyperparameters": to_plain(self.hyperparameters, "hyperparameters")}

    @classmethod
    def from_json(cls, value: Any, where: str) -> StoredGroup:
        """The inverse of `to_json`."""
        fields = Fields(value, where)
        hyperparameters = fields.plain("hyperparameters")
        if "params" in hyperparameters:
            raise ValueError(f"{where}: a hyperparameter may not be called 'params'")
        return cls(fields.list("params", _name), hyperparameters)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A whole tensor of the model that the optimizer does not hold: a buffer or a frozen parameter."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def to_json(self) -> dict[str, Any]:
        """Plain data that says everything."""
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype}

    @classmethod
    def from_json(cls, value: Any, where: str) -> StoredTensor:
        """The inverse of `to_json`."""
        fields = Fields(value, where)
        return cls(fields.text("name"), _shape(fields, where), _dtype(fields.text("dtype"), where))


@dataclass(frozen=True, slots=True)
class StoredSegment:
    """Elements `[start, stop)` of parameter number `param`; never empty."""

    param: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Elements."""
        return self.stop - self.start

    def to_json(self) -> list[int]:
        """Plain data that says everything."""
        return [self.param, self.start, self.stop]

    @classmethod
    def from_json(cls, value: Any, where: str) -> StoredSegment:
        """The inverse of `to_json`."""
        if not isinstance(value, list) or len(value) != 3:
            raise ValueError(f"{where} must be [parameter, start, stop]")
        return cls(*(natural(number, where) for number in value))


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One rank's file.

    `checksums` are the hex checksums of its chunks, one behind the other. `segments` ascend by parameter. `rng` maps
    each source of random numbers to the bytes of its state.
    """

    name: str
    nbytes: int
    checksums: str
    segments: tuple[StoredSegment, ...]
    rng: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain data that says everything."""
        return {
            "name": self.name,
            "nbytes": self.nbytes,
            "checksums": self.checksums,
            "segments": [segment.to_json() for segment in self.segments],
            "rng": dict(self.rng),
        }

    @classmethod
    def from_json(cls, value: Any, where: str) -> StoredFile:
        """The inverse of `to_json`."""
        fields = Fields(value, where)
        rng = {source: natural(nbytes, f"{where}: rng {source!r}") for source, nbytes in fields.object("rng").items()}
        if not all(_RNG_SOURCE.fullmatch(source) for source in rng):
            raise ValueError(f"{where}: an unknown source of random numbers in {sorted(rng)}")
        segments = fields.list("segments", StoredSegment.from_json)
        return cls(fields.text("name"), fields.count("nbytes"), fields.text("checksums"), segments, rng)


def _scalar(value: Any, where: str) -> tuple[str, Any]:
    fields = Fields(value, where)
    dtype, number = _dtype(fields.text("dtype"), where), from_plain(fields.any("value"))
    dtypes.scalar_tensor(dtype, number, where)
    return dtype, number


def _shape(fields: Fields, where: str) -> tuple[int, ...]:
    shape = fields.list("shape", natural)
    natural(math.prod(shape), f"{where}: its number of elements")
    return shape


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a name")
    return value


def _dtype(value: Any, where: str) -> str:
    if not isinstance(value, str) or value not in dtypes.NAMES:
        raise ValueError(f"{where}: {str(value)[:40]!r} is not a dtype that can be stored")
    return value
