"""The lists that an optimizer hands to its kernels, remembered where gathering them takes longer than the update."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress, repeat
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from sharded_adopt.dtensor import Part
from sharded_adopt.kernels.fused import SMALL_NUMEL


@dataclass(slots=True)
class Gathered:
    """One group's parameters that have a gradient, with their gradients and state; the lists run in parallel."""

    group: dict[str, Any]
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    steps: Sequence[Tensor]
    has_complex: bool
    offsets: Sequence[int] | None
    parts: Sequence[Part | None] = ()  # of which meshes, where there are DTensors

    def are_small(self) -> bool:
        """Whether the tensors are so small that their number counts, not their size."""
        return sum(map(Tensor.numel, self.params)) < SMALL_NUMEL * len(self.params)


class Memory:
    """What was gathered in one step and what it was gathered from, without the gradients.

    `again` looks at the same places and compares by identity: every parameter, every state dict and the tensors in it
    must be the same objects, and the same parameters must have a gradient.
    """

    def __init__(self, calls: Sequence[Gathered], state: Mapping[Any, Any], kernel_looks: bool) -> None:
        self._kernel_looks = kernel_looks
        self._keys = tuple(state)
        self._dicts = tuple(state.values())
        self._values = tuple(tuple(map(get, self._dicts)) for get in _GETTERS)
        self._groups = [_GroupMemory(call) for call in calls]

    @classmethod
    def of(cls, calls: Sequence[Gathered], state: Mapping[Any, Any], kernel_looks: bool) -> Memory | None:
        """Return the memory of these calls, or None where it is not worth keeping.

        `kernel_looks`: the kernel that is chosen by default refuses a gradient that is not dense, before it changes
        anything.
        """
        worth_it = all(call.are_small() and set(map(type, call.group["params"])) <= _PLAIN for call in calls)
        worth_it = worth_it and all(held.keys() >= _NAMES for held in state.values())
        return cls(calls, state, kernel_looks) if worth_it else None

    def again(self, groups: Sequence[dict[str, Any]], state: Mapping[Any, Any]) -> list[Gathered] | None:
        """Return this step's calls, or None where something is not what it was."""
        if len(groups) != len(self._groups) or len(state) != len(self._keys):
            return None
        if not (_same(state, self._keys) and _same(state.values(), self._dicts)):
            return None
        try:
            if not all(_same(map(get, self._dicts), kept) for get, kept in zip(_GETTERS, self._values, strict=True)):
                return None
        except KeyError:
            return None
        # A kernel looks at one group only, and somebody may have chosen another kernel.
        look = not self._kernel_looks or len(groups) > 1
        look = look or any(g["fused"] is False or g["foreach"] is not None for g in groups)
        calls = [kept.again(group, look) for kept, group in zip(self._groups, groups, strict=True)]
        return None if None in calls else cast("list[Gathered]", calls)


class _GroupMemory:
    """One group's part: its members, which of them have gradients, and their lists."""

    def __init__(self, call: Gathered) -> None:
        self._members = tuple(call.group["params"])
        self._have_grads = tuple(param.grad is not None for param in self._members)
        self._all_have = all(self._have_grads)
        self._lists = tuple(map(tuple, (call.params, call.exp_avgs, call.exp_avg_sqs, call.steps)))
        self._rest = call.has_complex, call.offsets

    def again(self, group: dict[str, Any], look_at_layouts: bool) -> Gathered | None:
        members = group["params"]
        if len(members) != len(self._members) or not _same(members, self._members):
            return None
        grads = [param.grad for param in self._members]
        if self._all_have:
            if not all(map(operator.is_not, grads, repeat(None))):
                return None
        else:
            if not all(map(operator.eq, (grad is not None for grad in grads), self._have_grads)):
                return None
            grads = list(compress(grads, self._have_grads))
        if look_at_layouts and not all(map(operator.is_, map(_LAYOUT, grads), repeat(torch.strided))):
            return None  # whoever gathers afresh says which parameter it is
        params, exp_avgs, exp_avg_sqs, steps = self._lists
        return Gathered(group, params, cast("list[Tensor]", grads), exp_avgs, exp_avg_sqs, steps, *self._rest)


_PLAIN = {Tensor, Parameter}
_NAMES = {"step", "exp_avg", "exp_avg_sq"}
_LAYOUT = operator.attrgetter("layout")
_GETTERS = tuple(map(operator.itemgetter, sorted(_NAMES)))


def _same(found: Iterable[Any], kept: Sequence[Any]) -> bool:
    """Whether both, equally long, hold the very same objects; no tensor is asked whether it equals another."""
    return all(map(operator.is_, found, kept))
