"""The optimizer state in its three forms: live per segment, sharded in a state dict, and whole.

Live, the inner optimizer keeps 1-D tensors for this rank's segments. In `state_dict()` each is a `FlatShard` in the
shape of its parameter. Whole, it is what the unsharded optimizer would have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharded_adopt.sharding.buckets import flatten_in_memory_order, unflatten_from_memory_order
from sharded_adopt.sharding.collectives import Collectives
from sharded_adopt.sharding.flat_shard import FlatShard
from sharded_adopt.sharding.inner import InnerOptimizer, is_of_segment
from sharded_adopt.sharding.layout import Layout, Segment
from sharded_adopt.sharding.parameters import ShardedParameters

StateOfParam = dict[str, Any]

# The key of the main values in a sharded state dict. See [Note: main values] in parameters.
MAIN_KEY = "main_param"


class ShardedState:
    """Reads and writes the inner optimizer's state of every parameter, by its index in the layout."""

    def __init__(
        self, group: Collectives, inner: InnerOptimizer, layout: Layout, parameters: ShardedParameters
    ) -> None:
        self._group = group
        self._inner = inner
        self._layout = layout
        self.places: tuple[Segment, ...] = layout.segments(group.rank)
        self._parameters = parameters
        self._segments: Sequence[Tensor] = parameters.segments
        # The parameters of each bucket, by their index.
        self.members: list[list[int]] = [[p.param for p in bucket.placements] for bucket in layout.buckets]

    def of(self, index: int) -> StateOfParam:
        """The live state of parameter `index`; empty where the optimizer has made none yet."""
        return self._inner.state_of(self._segments[index])

    def segment(self, index: int) -> Tensor:
        """The elements of parameter `index` that this rank updates: 1-D."""
        return self._segments[index]

    def sharded(self, index: int) -> StateOfParam:
        """What a sharded state dict holds of parameter `index`: its state and, where kept, its main values."""
        main = self._parameters.main_of(index)
        return {**self.of(index), **({} if main is None else {MAIN_KEY: main})}

    def wrapped(self, index: int, known: StateOfParam) -> StateOfParam:
        """`sharded` for `optimizer.state` and `state_dict()`.

        Tensors of the segment's size come as `FlatShard`s over the same memory. Entries of `known` that still fit are
        kept.
        """
        place, segment, spec = self.places[index], self._segments[index], self._layout.params[index]
        wrapped: StateOfParam = {}
        for key, value in self.sharded(index).items():
            if not is_of_segment(value, segment):
                wrapped[key] = value
                continue
            before = known.get(key)
            if isinstance(before, FlatShard) and before.to_local() is value:
                wrapped[key] = before
            else:
                wrapped[key] = FlatShard(value, place.start, spec.shape, spec.dim_order)
        return wrapped

    def gather(self, everywhere: bool, main_values: bool) -> dict[int, StateOfParam]:
        """Every parameter's whole state, on the first rank or on all; `{}` elsewhere. Collective.

        Tensors lie on the CPU in the strides of their parameters; parameters without state are left out. `main_values`:
        with those, where they are kept.
        """
        entries = self.sharded if main_values else self.of
        whole: dict[int, StateOfParam] = {}
        receives = everywhere or self._group.rank == 0
        for bucket in self._layout.buckets:
            members = [p.param for p in bucket.placements]
            for index in members:
                scalars = {k: v for k, v in entries(index).items() if not is_of_segment(v, self._segments[index])}
                if receives and entries(index):
                    whole[index] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in scalars.items()}
            for key, dtype in self._flat_keys(map(entries, members), members):
                flat = torch.zeros(bucket.shard_numel, dtype=dtype)
                holders = []
                for index in members:
                    value, place = entries(index).get(key), self.places[index]
                    if value is not None and value.dtype is dtype:
                        holders.append(index)
                        flat[place.shard_start : place.shard_start + place.numel].copy_(value)
                shards = self._group.gather(flat, everywhere)
                if shards is None:
                    continue
                buffer = torch.cat(shards)
                for placement in bucket.placements:
                    if placement.param in holders:
                        spec = self._layout.params[placement.param]
                        elements = buffer[placement.start : placement.start + placement.numel]
                        whole[placement.param][key] = unflatten_from_memory_order(elements, spec).clone()
        return dict(sorted(whole.items()))

    def _flat_keys(self, entries: Iterable[StateOfParam], members: Iterable[int]) -> list[tuple[str, torch.dtype]]:
        found: dict[tuple[str, torch.dtype], None] = {}
        for index, state in zip(members, entries, strict=True):
            for key, value in state.items():
                if is_of_segment(value, self._segments[index]):
                    found[key, value.dtype] = None
        return sorted(found, key=str)

    def check(self, loaded: Mapping[int, Mapping[str, Any]]) -> dict[int, StateOfParam]:
        """Cut loaded state to this rank's segments, without changing anything.

        Takes whole tensors and `FlatShard`s of this layout. Raises `ValueError` that lists everything that does not
        fit.
        """
        problems: list[str] = []
        cut: dict[int, StateOfParam] = {}
        for index, entries in loaded.items():
            spec = self._layout.params[index]
            known = set(self.of(index))
            # Whole state dicts have no main values: the parameters, loaded before, are all that is known then.
            missing = known - set(entries) if entries else set()
            unexpected = set(entries) - set(self.sharded(index)) if known else set()
            problems += [f"{spec.name!r} has no {key!r}" for key in sorted(missing)]
            problems += [f"{spec.name!r} has an unknown entry {key!r}" for key in sorted(unexpected)]
            cut[index] = {}
            for key, value in entries.items():
                try:
                    cut[index][key] = self.cut(index, key, value)
                except ValueError as error:
                    problems.append(str(error))
        if problems:
            shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
            raise ValueError(f"the state dict does not fit this optimizer, nothing was loaded: {shown}")
        return cut

    def cut(self, index: int, key: str, value: Any) -> Any:
        """This rank's part of one loaded entry of parameter `index`; what has no elements comes back as it is.

        Raises `ValueError` for another shape, and for a `FlatShard` of another layout.
        """
        place, spec = self.places[index], self._layout.params[index]
        if not isinstance(value, Tensor):
            return value
        if isinstance(value, FlatShard):
            local = value.to_local()
            if (value.start, local.numel(), tuple(value.shape)) != (place.start, place.numel, spec.shape):
                raise ValueError(
                    f"{key!r} of {spec.name!r} holds elements {value.start}:{value.start + local.numel()} of shape "
                    f"{tuple(value.shape)}, but rank {self._group.rank} of {self._group.world_size} owns "
                    f"{place.start}:{place.stop} of shape {spec.shape}: a state dict of another layout comes through "
                    "sharded_adopt.checkpoint.load or torch.distributed.checkpoint"
                )
            return local
        present = self.sharded(index).get(key)
        is_counter = key == "step" if present is None else not is_of_segment(present, self._segments[index])
        if is_counter:
            return value
        if tuple(value.shape) != spec.shape:
            raise ValueError(f"{key!r} of {spec.name!r} has shape {tuple(value.shape)}, expected {spec.shape}")
        return flatten_in_memory_order(value, spec)[place.start : place.stop]

    def summary(self, cut: Mapping[int, StateOfParam]) -> dict[str, Any]:
        """The counters in loaded state, which must be the same on every rank, under names that an error can show."""
        return {
            f"{self._layout.params[index].name}.{key}": float(value)
            for index, entries in cut.items()
            for key, value in entries.items()
            if isinstance(value, Tensor) and value.dim() == 0
        }

    def load(self, cut: Mapping[int, StateOfParam]) -> None:
        """Write state that `check` has returned. Parameters that are not in it go back to how they began."""
        for index, segment in enumerate(self._segments):
            own = self._inner.state_of(segment)
            entries = dict(cut.get(index, {}))
            main = entries.pop(MAIN_KEY, None)
            if main is not None:
                segment.copy_(main)
            if not entries:
                self._inner.begin_anew(segment)
            for key, value in entries.items():
                present = own.get(key)
                if isinstance(present, Tensor) and isinstance(value, (Tensor, int, float)):
                    present.copy_(torch.as_tensor(value))
                elif isinstance(value, Tensor):
                    own[key] = value.detach().clone().to(segment.device if value.dim() else value.device)
                else:
                    own[key] = value


def require_form(state_dict: Mapping[str, Any]) -> None:
    """Raise `ValueError` for what is no optimizer's state dict, as `full_state_dict()` is off the first rank."""
    if not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(
            f"expected a state dict with 'state' and 'param_groups', got the keys {sorted(map(str, state_dict))}: "
            "every rank must pass one; full_state_dict(rank0_only=False) gives it to all"
        )


def by_index(state_dict: Mapping[str, Any], sizes: Sequence[int]) -> dict[int, Mapping[str, Any]]:
    """The state in a state dict by index in the layout: its ids may be integers or names, only their positions count.

    `sizes`: how many parameters each group of the optimizer has. Raises `ValueError` where the dict has others.
    """
    groups = [list(group["params"]) for group in state_dict["param_groups"]]
    if [len(ids) for ids in groups] != list(sizes):
        raise ValueError(
            f"the loaded state dict has parameter groups of {[len(ids) for ids in groups]} parameters, expected "
            f"{list(sizes)}"
        )
    index_of = {one: index for index, one in enumerate(one for ids in groups for one in ids)}
    unknown = [one for one in state_dict["state"] if one not in index_of]
    if unknown:
        raise ValueError(f"the loaded state dict has state of parameters that are in no group: {unknown[:10]}")
    return {index_of[one]: entries for one, entries in state_dict["state"].items()}
