"""A rank's piece of a tensor that still knows the whole: what a sharded state dict holds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sharded_adopt.sharding.layout import Box, boxes

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

_aten = torch.ops.aten


class FlatShard(Tensor):
    """Elements `[start, start + to_local().numel())` of a tensor of this `shape`, counted in memory order.

    It has the shape, dtype and device of the whole, and memory for its own elements only. It can be detached, cloned,
    moved, cast, pickled and loaded with `torch.load(weights_only=True)`; torch.distributed.checkpoint saves and loads
    it in the shape of the whole, as boxes, at any world size. Arithmetic is for `to_local()`.

    `dim_order` lists the dimensions from the slowest to the fastest in memory (default: as they are).
    """

    _local: Tensor
    _start: int
    _dim_order: tuple[int, ...]

    @staticmethod
    def __new__(
        cls, local: Tensor, start: int, shape: Iterable[int], dim_order: Iterable[int] | None = None
    ) -> FlatShard:
        """Wrap `local` without copying it. Raises `ValueError` where it does not fit into `shape`."""
        sizes = torch.Size(shape)
        if local.dim() != 1 or start < 0 or start + local.numel() > math.prod(sizes):
            raise ValueError(
                f"expected a 1-D tensor within the {math.prod(sizes)} elements of shape {tuple(sizes)}, got shape "
                f"{tuple(local.shape)} from element {start}"
            )
        shard: FlatShard = torch.Tensor._make_wrapper_subclass(cls, sizes, dtype=local.dtype, device=local.device)
        shard._local = local
        shard._start = int(start)
        shard._dim_order = tuple(range(len(sizes))) if dim_order is None else tuple(dim_order)
        return shard

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Everything is done in __new__, as for every wrapper subclass.
        pass

    def to_local(self) -> Tensor:
        """The elements themselves: 1-D, a view of live memory."""
        return self._local

    @property
    def start(self) -> int:
        """Where the first element stands in the whole, in memory order."""
        return self._start

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        stop = self._start + self._local.numel()
        return f"FlatShard(elements {self._start}:{stop} of shape {tuple(self.shape)}, {self._local!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        shard = args[0]
        if func in (_aten.detach.default, _aten.clone.default, _aten._to_copy.default, _aten.alias.default):
            return shard._like(func(shard._local, *args[1:], **kwargs))
        if func in (_aten.new_empty.default, _aten.empty_like.default):
            device = kwargs.get("device") or shard._local.device
            return shard._like(torch.empty_like(shard._local, dtype=kwargs.get("dtype"), device=device))
        if func is _aten.copy_.default and isinstance(args[1], FlatShard) and args[1]._start == shard._start:
            shard._local.copy_(args[1]._local)
            return shard
        raise NotImplementedError(f"{func} is not defined for a FlatShard: take its to_local()")

    def _like(self, local: Tensor) -> FlatShard:
        return FlatShard(local, self._start, self.shape, self._dim_order)

    def __deepcopy__(self, memo: dict[int, Any]) -> FlatShard:
        return self._like(self._local.clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy: the local tensor is a view of a whole shard, and pickling a view writes its whole storage.
        return FlatShard, (self._local.clone(), self._start, tuple(self.shape), self._dim_order)

    # --- what torch.distributed.checkpoint asks of a tensor (torch/distributed/_checkpointable.py) ------------------

    def _memory_boxes(self) -> list[Box]:
        memory_shape = tuple(self.shape[dim] for dim in self._dim_order)
        if self.numel() == 0:
            # A tensor without elements must still be in the checkpoint: every rank writes the whole of it.
            return [Box((0,) * len(memory_shape), memory_shape, 0, 0)]
        return list(boxes(memory_shape, self._start, self._start + self._local.numel()))

    def _logical(self, of_memory: tuple[int, ...]) -> torch.Size:
        logical = [0] * len(of_memory)
        for position, dim in enumerate(self._dim_order):
            logical[dim] = of_memory[position]
        return torch.Size(logical)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [ChunkStorageMetadata(self._logical(b.offsets), self._logical(b.sizes)) for b in self._memory_boxes()]

    def __create_write_items__(self, fqn: str, tensor: Any) -> list[WriteItem]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties.create_from_tensor(self._local)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        inverse = sorted(range(len(self._dim_order)), key=lambda i: self._dim_order[i])
        for box in self._memory_boxes():
            if self._logical(box.offsets) == index.offset:
                piece = self._local[box.start - self._start : box.stop - self._start]
                return piece.view(box.sizes).permute(inverse)
        raise ValueError(f"expected the offset of one of {self._memory_boxes()}, got {index}")


torch.serialization.add_safe_globals([FlatShard])
