"""What a user passes as parameters, made explicit: tensors with names, in groups, each checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sharded_adopt.sharding.layout import BucketKey, ParamSpec
from sharded_adopt.sharding.plan import Dtype


@dataclass(frozen=True, slots=True)
class Group:
    """One parameter group as it was given: tensors, a name for each, and the values that differ from the defaults.

    `named` says whether the user gave the names.
    """

    params: tuple[Tensor, ...]
    names: tuple[str, ...]
    named: bool
    options: dict[str, Any]

    def as_param_group(self) -> dict[str, Any]:
        """The dictionary that `torch.optim.Optimizer` takes."""
        names = {"param_names": list(self.names)} if self.named else {}
        return {"params": list(self.params), **names, **self.options}


def read_groups(params: Any, module: nn.Module | None, first_index: int = 0) -> tuple[Group, ...]:
    """Turn tensors, `(name, tensor)` pairs, or groups of either into groups with a name for every tensor.

    Names are the user's, else those of `module`, else `param.<index>`, counted over all groups from `first_index`.

    Raises `TypeError` for what is no parameter that can be sharded and `ValueError` for an empty list, a tensor given
    twice, or names for some tensors of a group only. Each error names the parameter.
    """
    if module is not None and not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module or None, got {type(module).__name__}")
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of tensors, pairs or groups, got one tensor: pass [tensor]")
    if isinstance(params, nn.Module):
        raise TypeError("params must be an iterable of tensors, pairs or groups, got a module: pass its parameters()")
    if isinstance(params, (set, frozenset)):
        raise TypeError("params must be ordered the same on every rank, got a set: use a list")
    raw = list(params)
    if not raw:
        raise ValueError(
            "expected at least one parameter, got an empty parameter list: was `model.parameters()` used up before?"
        )
    dicts = raw if isinstance(raw[0], Mapping) else [{"params": raw}]
    module_names = {} if module is None else {id(p): name for name, p in module.named_parameters()}
    groups: list[Group] = []
    index = first_index
    for one in dicts:
        if not isinstance(one, Mapping) or "params" not in one:
            raise TypeError(f"expected a group like {{'params': [...]}}, got {type(one).__name__}: {one!r:.80}")
        group = _read_group(one, module_names, index)
        index += len(group.params)
        groups.append(group)
    _refuse_repeats(groups)
    return tuple(groups)


def _read_group(group: Mapping[str, Any], module_names: Mapping[int, str], index: int) -> Group:
    members = group["params"]
    if isinstance(members, (set, frozenset)):
        raise TypeError("params of a group must be ordered the same on every rank, got a set: use a list")
    members = [members] if isinstance(members, Tensor) else list(members)
    pairs = [member for member in members if isinstance(member, tuple)]
    options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    if pairs and len(pairs) != len(members):
        raise ValueError(f"expected names for all tensors of a group or for none, got {len(pairs)} of {len(members)}")
    if pairs:
        tensors, names = [tensor for _, tensor in pairs], [str(name) for name, _ in pairs]
    else:
        tensors, names = members, [str(name) for name in group.get("param_names", ())]
    named = bool(names)
    if not named:
        names = [module_names.get(id(tensor), f"param.{index + i}") for i, tensor in enumerate(tensors)]
    if len(names) != len(tensors):
        raise ValueError(f"expected {len(tensors)} names in 'param_names', got {len(names)}")
    for name, tensor in zip(names, tensors, strict=True):
        _check_tensor(name, tensor)
    return Group(tuple(tensors), tuple(names), named, options)


def _refuse_repeats(groups: Iterable[Group]) -> None:
    places: dict[int, str] = {}
    names: dict[str, str] = {}
    for number, group in enumerate(groups):
        for name, tensor in zip(group.names, group.params, strict=True):
            place = f"{name!r} in group {number}"
            if id(tensor) in places:
                raise ValueError(f"one tensor was given twice, as {places[id(tensor)]} and as {place}: give it once")
            if name in names:
                raise ValueError(f"two tensors have one name: {names[name]} and {place}: names must be unique")
            places[id(tensor)] = names[name] = place


def refuse_missing(module: nn.Module, groups: Iterable[Group]) -> None:
    """Raise `ValueError` naming the trainable parameters of `module` that no group holds: they would drift apart."""
    held = {id(tensor) for group in groups for tensor in group.params}
    missing = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        raise ValueError(
            f"expected every trainable parameter of the module in a group, but nobody would synchronise {missing}: "
            "add them to the optimizer, or freeze them with requires_grad_(False)"
        )


def _check_tensor(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"expected a tensor as parameter {name!r}, got {type(tensor).__name__}")
    if not (tensor.is_leaf or tensor.retains_grad):
        raise ValueError(f"parameter {name!r} is not a leaf: it is computed from other tensors, optimize those")
    if tensor.is_sparse or tensor.layout is not torch.strided:
        raise TypeError(f"expected a dense parameter, but {name!r} has layout {tensor.layout}")
    if type(tensor).__name__ == "DTensor":
        raise TypeError(
            f"parameter {name!r} is a DTensor, which is sharded already: use plain ADOPT, which runs on its local shard"
        )
    if type(tensor) not in (Tensor, nn.Parameter):
        raise TypeError(f"expected a plain tensor as parameter {name!r}, got the subclass {type(tensor).__name__}")
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise TypeError(f"expected a floating-point or complex parameter, but {name!r} is {tensor.dtype}")
    memory_order(name, tensor)


def memory_order(name: str, tensor: Tensor) -> tuple[int, ...]:
    """The dimensions of `tensor` from the slowest to the fastest in memory.

    Raises `ValueError` where its elements do not fill a block of memory once each: views with gaps and expanded tensors
    cannot become part of a flat buffer.
    """
    if tensor.is_contiguous() or tensor.numel() == 0:
        return tuple(range(tensor.dim()))
    # A dimension of size 1 has a stride without meaning; put first, it cannot disturb the others.
    sizes, strides = list(tensor.shape), list(tensor.stride())
    order = sorted(range(tensor.dim()), key=lambda dim: (sizes[dim] != 1, -strides[dim]))
    if not tensor.permute(order).is_contiguous():
        raise ValueError(
            f"parameter {name!r} is not dense: shape {tuple(tensor.shape)} with strides {tensor.stride()} has gaps or "
            "overlaps; replace it by its .contiguous() copy before the optimizer is made"
        )
    return tuple(order)


def plain_dtype(dtype: torch.dtype | None) -> Dtype | None:
    """A dtype as the plan takes it."""
    return None if dtype is None else Dtype(str(dtype).removeprefix("torch."), dtype.itemsize)


def param_specs(groups: Sequence[Group], first_group: int = 0) -> list[ParamSpec]:
    """What the layout needs to know of every parameter, in order."""
    devices: dict[str, list[torch.device]] = {}
    for group in groups:
        for tensor in group.params:
            of_type = devices.setdefault(tensor.device.type, [])
            if tensor.device not in of_type:
                of_type.append(tensor.device)
    specs = []
    for number, group in enumerate(groups):
        for name, tensor in zip(group.names, group.params, strict=True):
            of_type = devices[tensor.device.type]
            # Not the device's own number: rank 0 is on cuda:0, rank 1 on cuda:1, and their layouts must be equal.
            device = tensor.device.type if len(of_type) == 1 else f"{tensor.device.type}:{of_type.index(tensor.device)}"
            specs.append(
                ParamSpec(
                    name=name,
                    shape=tuple(tensor.shape),
                    key=BucketKey(str(tensor.dtype).removeprefix("torch."), device),
                    itemsize=tensor.element_size(),
                    group=first_group + number,
                    dim_order=memory_order(name, tensor),
                )
            )
    return specs
