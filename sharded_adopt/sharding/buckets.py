"""The flat tensors of a bucket, and the views into them that parameters and gradients are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_adopt.sharding.layout import Bucket, ParamSpec


class BucketBuffer:
    """The memory of one bucket on this rank.

    `params` and, where gradients are kept, `grads`: 1-D, `bucket.padded_numel` elements of the parameters' dtype, zero
    in the gaps. A bound parameter is a view of `params`, so that the next forward sees what was gathered into it.
    """

    def __init__(self, index: int, bucket: Bucket, specs: Sequence[ParamSpec], rank: int, with_grads: bool) -> None:
        self.index = index
        self.bucket = bucket
        self._specs = specs
        self._shard_start, self._shard_stop = bucket.shard_range(rank)
        self.params = torch.empty(0)  # 1D
        self.grads: Tensor | None = None  # 1D
        self._with_grads = with_grads

    def bind(self, tensors: Sequence[Tensor]) -> None:
        """Move the parameters' values (one tensor for each placement) into the buffer and make them views of it.

        Strides, `.grad` and the identity of the parameters are kept; their old memory is given back one by one.
        """
        first = tensors[0]
        # Zeros, not empty: what lies in the gaps is communicated, and must never be NaN.
        self.params = torch.zeros(self.bucket.padded_numel, dtype=first.dtype, device=first.device)
        if self._with_grads:
            self.grads = torch.zeros_like(self.params)
        for placement, tensor in zip(self.bucket.placements, tensors, strict=True):
            view = view_like(self.params, placement.start, tensor)
            view.copy_(tensor.detach())
            tensor.data = view

    @property
    def shard(self) -> slice:
        """This rank's slice of the buffers."""
        return slice(self._shard_start, self._shard_stop)


def view_like(flat: Tensor, start: int, tensor: Tensor) -> Tensor:
    """A view of `flat` (1-D) from element `start` with the shape and strides of `tensor`."""
    return flat.as_strided(tensor.size(), tensor.stride(), flat.storage_offset() + start)


def flatten_in_memory_order(tensor: Tensor, spec: ParamSpec) -> Tensor:
    """`tensor` (of the parameter's shape) as 1-D in the order of the parameter's elements: a view where it can be."""
    return tensor.permute(spec.dim_order).reshape(-1)


def unflatten_from_memory_order(flat: Tensor, spec: ParamSpec) -> Tensor:
    """The inverse: a 1-D tensor of all elements of a parameter as a view with its logical shape."""
    inverse = sorted(range(len(spec.dim_order)), key=lambda i: spec.dim_order[i])
    return flat.view(spec.memory_shape).permute(inverse)
