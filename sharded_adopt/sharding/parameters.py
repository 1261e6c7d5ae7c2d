"""When parameters move: into flat buffers, from the first rank to all, and from their owners to everybody."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sharded_adopt.sharding.buckets import BucketBuffer, view_like
from sharded_adopt.sharding.collectives import Collectives, Pending
from sharded_adopt.sharding.layout import Layout


class ShardedParameters:
    """The user's parameters as views of bucket buffers, and this rank's segments of them.

    `tensors`: the user's parameters. `segments`: for each of them the 1-D tensor of the elements that this rank owns
    (empty where it owns none), a view of the same memory: writing it writes the parameter.
    """

    def __init__(self, group: Collectives) -> None:
        self._group = group
        self.layout = Layout(group.world_size, (), ())
        self.tensors: list[Tensor] = []
        self.segments: list[Tensor] = []  # 1D each
        self.buffers: list[BucketBuffer] = []
        self._views: list[Tensor] = []

    def add(self, layout: Layout, tensors: Sequence[Tensor], with_grads: bool, broadcast: bool) -> None:
        """Bind the parameters that `layout` holds behind the known ones.

        With `broadcast`, every rank takes the values of the first (collective).
        """
        known = len(self.buffers)
        self.tensors.extend(tensors)
        self.layout = layout
        for index, bucket in enumerate(layout.buckets[known:], start=known):
            buffer = BucketBuffer(index, bucket, layout.params, self._group.rank, with_grads)
            buffer.bind([self.tensors[placement.param] for placement in bucket.placements])
            if broadcast:
                self._group.broadcast_(buffer.params)
            self.buffers.append(buffer)
        first = len(self.segments)
        places = {p.param: (index, p.start) for index, b in enumerate(layout.buckets) for p in b.placements}
        for segment in layout.segments(self._group.rank)[first:]:
            buffer = self.buffers[segment.bucket]
            self.segments.append(buffer.segment(buffer.params, segment))
            bucket_index, start = places[segment.param]
            self._views.append(view_like(self.buffers[bucket_index].params, start, self.tensors[segment.param]))

    def rebind(self) -> Exception | None:
        """Put parameters back that were given other memory since (`param.data = ...`, a load with `assign=True`).

        Their new values are taken over. Returns the error for a parameter that no longer has the shape, dtype and
        device that its bucket was made for: it must not be trained as a detached copy.
        """
        for spec, tensor, view in zip(self.layout.params, self.tensors, self._views, strict=True):
            if tensor.data_ptr() == view.data_ptr() and tensor.dtype is view.dtype:
                continue
            if tensor.shape != view.shape or tensor.dtype is not view.dtype or tensor.device != view.device:
                return RuntimeError(
                    f"parameter {spec.name!r} was changed after the optimizer was made: expected shape "
                    f"{tuple(view.shape)}, {view.dtype} on {view.device}, got {tuple(tensor.shape)}, {tensor.dtype} on "
                    f"{tensor.device}; move and cast the model first, then make the optimizer"
                )
            view.copy_(tensor.detach())
            tensor.data = view
        return None

    def gather_bucket(self, bucket: int) -> Pending:
        """Start to fetch every rank's shard of one bucket. Collective; in the same order on every rank."""
        return self._group.all_gather_(self.buffers[bucket].params, tag=bucket)

    def gather(self) -> None:
        """Fetch every rank's shard, so that every parameter is whole again. Collective."""
        for pending in [self.gather_bucket(bucket) for bucket in range(len(self.buffers))]:
            pending.wait()
        self.mark_written(range(len(self.tensors)))

    def mark_written(self, indices: Iterable[int]) -> None:
        """Tell autograd that these parameters have new values.

        Writing through the flat buffer leaves a parameter's version as it was, and a backward through a graph from
        before the step would use the new values without a word.
        """
        torch.autograd.graph.increment_version([self.tensors[index] for index in indices])
