"""What goes into a checkpoint, taken from the optimizer and the model on one rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sharded_adopt.checkpoint import dtypes
from sharded_adopt.checkpoint.plain import plain_copy
from sharded_adopt.checkpoint.records import (
    PARAM_KEY,
    StoredGroup,
    StoredParam,
    StoredSegment,
    StoredTensor,
    is_state_key,
)
from sharded_adopt.checkpoint.rng import rng_states
from sharded_adopt.checkpoint.tensors import FileTable, file_table
from sharded_adopt.sharding.collectives import Collectives
from sharded_adopt.sharding.layout import Layout, ParamSpec


class Checkpointable(Protocol):
    """What a checkpoint asks of an optimizer; `ShardedOptimizer` answers.

    An attribute `optimizer_class`, where there is one, keeps the state of one rule from being loaded into another.
    """

    @property
    def layout(self) -> Layout:
        """Which rank owns which elements."""

    @property
    def collectives(self) -> Collectives:
        """The ranks that share the optimizer."""

    def local_shards(self) -> dict[str, dict[str, Tensor]]:
        """By parameter: `param` and each state key -> this rank's segment (1-D, maybe empty) or a 0-dim tensor."""

    def load_shards(self, shards: Mapping[str, Mapping[str, Tensor]], groups: Sequence[Mapping[str, object]]) -> None:
        """Write what `local_shards` and `plain_groups` have given, and fetch the other ranks' parameters."""

    def check_groups(self, groups: Sequence[Mapping[str, object]]) -> None:
        """Raise what `load_shards` would raise for these groups, with nothing changed."""

    def plain_groups(self) -> list[dict[str, object]]:
        """Each group's hyperparameters as JSON, and the names of its parameters under `params`."""

    def param_for(self, name: str) -> Tensor:
        """The user's parameter of that name."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What one rank writes.

    `tensors` are those of its file, by their name there; they share memory with the optimizer. `model_values` and
    `extra` are plain data; both and the model's tensors are the first rank's.
    """

    params: tuple[StoredParam, ...]
    groups: tuple[StoredGroup, ...]
    optimizer: str | None
    segments: tuple[StoredSegment, ...]
    model_tensors: tuple[StoredTensor, ...]
    model_values: Mapping[str, Any]
    extra: Any
    rng: Mapping[str, int]
    tensors: Mapping[str, Tensor]

    def table(self) -> FileTable:
        """Where each tensor goes in this rank's file."""
        return file_table(self.params, self.segments, self.model_tensors, self.rng)

    def shared(self) -> dict[str, Any]:
        """What must be the same on all ranks, as plain data."""
        return {
            "optimizer": self.optimizer,
            "parameters": {param.name: param.to_json() for param in self.params},
            "groups": [group.to_json() for group in self.groups],
        }


def collect(optimizer: Checkpointable, model: nn.Module | None, extra: Any, is_first: bool) -> Contents:
    """What this rank has to write; no collective, nothing copied but random number states.

    Raises `TypeError` or `ValueError` for what cannot be written, naming it.
    """
    layout = optimizer.layout
    shards = optimizer.local_shards()
    segments = layout.segments(optimizer.collectives.rank)
    params: list[StoredParam] = []
    stored_segments: list[StoredSegment] = []
    tensors: dict[str, Tensor] = {}
    for index, (spec, segment) in enumerate(zip(layout.params, segments, strict=True)):
        param = _stored_param(spec, optimizer.param_for(spec.name), shards[spec.name], segment.numel)
        params.append(param)
        if segment.numel:
            stored_segments.append(StoredSegment(index, segment.start, segment.stop))
            tensors.update((f"{key}/{spec.name}", shards[spec.name][key]) for key in param.tensors)
    groups = []
    for number, plain in enumerate(optimizer.plain_groups()):
        values = plain_copy({key: value for key, value in plain.items() if key != "params"}, f"group {number}")
        groups.append(StoredGroup(tuple(cast("list[str]", plain["params"])), values))
    rest, values = model_rest(model, optimizer) if is_first and model is not None else ({}, {})
    tensors.update((f"model/{name}", tensor) for name, tensor in rest.items())
    states = rng_states()
    tensors.update((f"rng/{source}", state) for source, state in states.items())
    return Contents(
        params=tuple(params),
        groups=tuple(groups),
        optimizer=rule_name(optimizer),
        segments=tuple(stored_segments),
        model_tensors=tuple(
            StoredTensor(name, tuple(tensor.shape), dtypes.dtype_name(tensor.dtype)) for name, tensor in rest.items()
        ),
        model_values=values,
        extra=plain_copy(extra, "extra") if is_first else None,
        rng={source: state.numel() for source, state in states.items()},
        tensors=tensors,
    )


def _stored_param(spec: ParamSpec, param: Tensor, shards: Mapping[str, Tensor], numel: int) -> StoredParam:
    tensors: dict[str, str] = {}
    scalars: dict[str, tuple[str, Any]] = {}
    for key, tensor in shards.items():
        if key != PARAM_KEY and not is_state_key(key):
            raise ValueError(f"the state {key!r} of parameter {spec.name!r} cannot be stored under that name")
        dtype = dtypes.dtype_name(tensor.dtype)
        if tensor.dim() == 0 and key != PARAM_KEY:
            scalars[key] = (dtype, dtypes.scalar_value(tensor))
        elif tuple(tensor.shape) == (numel,):
            tensors[key] = dtype
        else:
            raise ValueError(
                f"the state {key!r} of parameter {spec.name!r} has shape {tuple(tensor.shape)}; expected one "
                f"number, or one for each of the {numel} elements that this rank owns"
            )
    return StoredParam(spec.name, spec.shape, dtypes.dtype_name(param.dtype), spec.dim_order, tensors, scalars)


def model_rest(model: nn.Module, optimizer: Checkpointable) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The entries of `model.state_dict()` that the optimizer does not hold: tensors, and plain data of other kinds.

    Raises `TypeError` for an entry that is neither, naming it.
    """
    held = {id(optimizer.param_for(spec.name)) for spec in optimizer.layout.params}
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in held:
            continue
        if isinstance(value, Tensor):
            _refuse_strange(name, value)
            tensors[name] = value
        else:
            values[name] = plain_copy(value, f"the model's entry {name!r}")
    return tensors, values


def _refuse_strange(name: str, tensor: Tensor) -> None:
    dtypes.dtype_name(tensor.dtype)
    has_own_memory = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    if is_lazy(tensor) or tensor.is_meta:
        raise TypeError(f"the model's entry {name!r} has no values yet: run or initialise the model first")
    if tensor.layout is not torch.strided or not has_own_memory:
        raise TypeError(
            f"the model's entry {name!r} is a {type(tensor).__name__} of layout {tensor.layout}: only plain dense "
            "tensors can be stored beside the optimizer's"
        )


def rule_name(optimizer: Checkpointable) -> str | None:
    """The name of the rule that the state belongs to: the first subclass of `torch.optim.Optimizer` in its ancestry.

    `ADOPT` for ADOPTW and `Adam` for AdamW, whose states mean the same; None where it is not told.
    """
    cls = getattr(optimizer, "optimizer_class", None)
    if not isinstance(cls, type):
        return None
    return next((base.__name__ for base in cls.__mro__ if torch.optim.Optimizer in base.__bases__), cls.__name__)
