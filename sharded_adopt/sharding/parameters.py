"""When parameters move: into flat buffers, from the first rank to all, and from their owners to everybody."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from sharded_adopt.sharding.agreement import require_same
from sharded_adopt.sharding.buckets import BucketBuffer, view_like
from sharded_adopt.sharding.collectives import Collectives, Pending
from sharded_adopt.sharding.layout import Layout
from sharded_adopt.sharding.plan import MAX_COPIES_IN_FLIGHT

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


class ShardedParameters:
    """The user's parameters as views of bucket buffers, and this rank's segments of them.

    `tensors`: the user's parameters. `segments`: for each of them the 1-D tensor of the elements that this rank owns
    (empty where it owns none), which the optimizer inside steps. It is a view of the same memory, so that writing it
    writes the parameter; or, with `keeps_main`, for a 16-bit parameter a view of this rank's *main values*: fp32, of
    which the parameter is the rounding. [Note: main values]

    `wire_dtype`: what wider parameters travel in. Every rank then holds them rounded to it, and their owner keeps main
    values, as for 16-bit parameters.

    [Note: main values] At a learning rate of 1e-4 most updates are smaller than half the distance between two bf16
    numbers and would be lost. The fp32 values that take them are kept by the owner of the segment only. They are set
    from the parameter at construction, and again where somebody else has written the parameter since: where it is no
    longer their rounding.
    """

    def __init__(self, group: Collectives, keeps_main: bool, wire_dtype: torch.dtype | None) -> None:
        self._group = group
        self.keeps_main = keeps_main
        self._wire_dtype = wire_dtype
        self._main: dict[int, Tensor] = {}  # 1D, shard_numel, fp32; by bucket
        self.layout = Layout(group.world_size, (), ())
        self.tensors: list[Tensor] = []
        self.segments: list[Tensor] = []  # 1D each
        self.buffers: list[BucketBuffer] = []
        self._views: list[Tensor] = []
        self._bucket_of: dict[int, int] = {}
        self._copies: list[Pending] = []  # fetched in another dtype, each with a borrowed copy of its bucket

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
            self._bucket_of.update((placement.param, index) for placement in bucket.placements)
            shard = buffer.params[buffer.shard]
            if self.keeps_main and shard.dtype in SIXTEEN_BIT:
                self._main[index] = shard.float()
            elif (wire := self._travels_as(index)) is not None:
                self._main[index] = shard.clone()
                self._group.announce(bucket.padded_numel, shard.dtype, shard.device, wire)
        first = len(self.segments)
        places = {p.param: (index, p.start) for index, b in enumerate(layout.buckets) for p in b.placements}
        for segment in layout.segments(self._group.rank)[first:]:
            buffer = self.buffers[segment.bucket]
            shard = self._main.get(segment.bucket, buffer.params[buffer.shard])
            self.segments.append(shard[segment.shard_start : segment.shard_start + segment.numel])
            bucket_index, start = places[segment.param]
            self._views.append(view_like(self.buffers[bucket_index].params, start, self.tensors[segment.param]))

    def rebind(self) -> Exception | None:
        """Put parameters back that were given other memory or strides since (`param.data = ...`, `.half().float()`).

        Their new values are taken over. Returns the error for a parameter that no longer has the shape, dtype and
        device that its bucket was made for: it must not be trained as a detached copy.
        """
        for spec, tensor, view in zip(self.layout.params, self.tensors, self._views, strict=True):
            fits = tensor.dtype is view.dtype and tensor.device == view.device
            # Same memory, offset, shape and strides: a transposed view of a square matrix has all but the last.
            if fits and tensor.is_set_to(view):
                continue
            if not fits or tensor.shape != view.shape:
                return RuntimeError(
                    f"parameter {spec.name!r} was changed after the optimizer was made: expected shape "
                    f"{tuple(view.shape)}, {view.dtype} on {view.device}, got {tuple(tensor.shape)}, {tensor.dtype} on "
                    f"{tensor.device}; move and cast the model first, then make the optimizer"
                )
            view.copy_(tensor.detach().clone())  # it may be another view of the same elements
            tensor.data = view
        return None

    def main_of(self, index: int) -> Tensor | None:
        """The main values of parameter `index` on this rank (1-D), or None where it has none."""
        return self.segments[index] if self._bucket_of[index] in self._main else None

    def _travels_as(self, bucket: int) -> torch.dtype | None:
        """The narrower dtype in which a bucket's parameters are fetched, or None for their own."""
        dtype, wire = self.buffers[bucket].params.dtype, self._wire_dtype
        return wire if wire is not None and wire.itemsize < dtype.itemsize and not dtype.is_complex else None

    def _rounded(self, bucket: int) -> Tensor:
        """What the parameters of a bucket on this rank are, given their main values."""
        main, dtype = self._main[bucket], self.buffers[bucket].params.dtype
        return main.to(self._travels_as(bucket) or dtype).to(dtype)

    def refresh_main(self, bucket: int) -> None:
        """Take over what somebody else has written to the parameters of a bucket since the last step."""
        main = self._main.get(bucket)
        if main is None:
            return
        written = self.buffers[bucket].params[self.buffers[bucket].shard]
        main.copy_(torch.where(self._rounded(bucket) == written, main, written.to(main.dtype)))

    def refresh_all_main(self) -> None:
        """The same for every bucket."""
        for bucket in self._main:
            self.refresh_main(bucket)

    def round_main(self, bucket: int) -> None:
        """Write the rounding of the main values of a bucket to its parameters, on this rank."""
        if bucket in self._main:
            self.buffers[bucket].params[self.buffers[bucket].shard].copy_(self._rounded(bucket))

    def gather_bucket(self, bucket: int) -> Pending:
        """Start to fetch every rank's shard of one bucket. Collective; in the same order on every rank."""
        wire, what = self._travels_as(bucket), f"the parameters of bucket {bucket}"
        if wire is not None and len(self._copies) == MAX_COPIES_IN_FLIGHT:
            self._copies.pop(0).wait()
        pending = self._group.all_gather_(self.buffers[bucket].params, bucket, wire, what)
        if wire is not None:
            self._copies.append(pending)
        return pending

    def gather(self) -> None:
        """Make every parameter whole again from the shards of its owners. Collective."""
        self._copies.clear()  # after an error, what was under way will never come
        for bucket in range(len(self.buffers)):
            self.round_main(bucket)
        for pending in [self.gather_bucket(bucket) for bucket in range(len(self.buffers))]:
            pending.wait()
        self.mark_written(range(len(self.tensors)))

    def mark_written(self, indices: Iterable[int]) -> None:
        """Tell autograd that these parameters have new values.

        Writing through the flat buffer leaves a parameter's version as it was, and a backward through a graph from
        before the step would use the new values without a word.
        """
        torch.autograd.graph.increment_version([self.tensors[index] for index in indices])


def broadcast_buffers(module: nn.Module, group: Collectives) -> None:
    """Give every rank the first rank's buffers of `module`. Collective.

    Raises `RanksDisagree` on every rank where they are not alike, `ValueError` for one that cannot be written.
    """
    buffers = dict(module.named_buffers())
    error = None
    for name, buffer in buffers.items():
        if any(stride == 0 and size > 1 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)):
            error = ValueError(f"buffer {name!r} of the module is expanded: replace it by its .contiguous() copy")
    group.raise_together(error)
    require_same(group, "the module", {f"buffer {n}": [list(b.shape), str(b.dtype)] for n, b in buffers.items()})
    for buffer in buffers.values():
        group.broadcast_(buffer)
