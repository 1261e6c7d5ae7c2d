"""DTensor parameters (FSDP2, tensor parallelism) seen as the local tensors that kernels work on.

torch.distributed is imported only where a DTensor has been seen; whoever made it has imported it already.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

_PLAIN = (Tensor, torch.nn.Parameter)


def is_dtensor(tensor: Any) -> TypeGuard[DTensor]:
    """Return whether `tensor` is a DTensor, at the price of one comparison for an ordinary tensor."""
    if type(tensor) in _PLAIN or not isinstance(tensor, Tensor) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, sharing its memory; any other tensor is returned as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def local_grad(param: Tensor, grad: Tensor) -> Tensor:
    """Return this rank's part of `grad`, laid out as `param` is.

    A gradient may come placed otherwise than its parameter, for example as partial sums; it is redistributed then,
    which all ranks of the mesh do together. Raises `ValueError` where one of the two is a DTensor and the other is
    not.
    """
    if is_dtensor(param) != is_dtensor(grad):
        raise ValueError(
            "a parameter and its gradient must both be DTensors or neither, "
            f"got {type(param).__name__} and {type(grad).__name__}"
        )
    if not is_dtensor(param) or not is_dtensor(grad):
        return grad
    if grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return grad.to_local()


def element_start(param: Tensor) -> int:
    """Return the row-major index of this rank's first element in the whole parameter.

    With this the stochastic rounding bits of a shard cut along dimension 0, as FSDP2 cuts, are those of the whole
    parameter. Shards cut otherwise are not one row-major range; their bits are just as random, but differ from the
    whole parameter's.
    """
    if not is_dtensor(param):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    start = 0
    for size, first in zip(param.shape, offset, strict=True):
        start = start * size + min(first, size)
    return start


@dataclass(frozen=True, slots=True)
class Part:
    """Of what a local tensor is a part: a mesh, and on how many of its ranks each of its elements lies."""

    mesh: DeviceMesh
    copies: int


def part_of(param: Tensor) -> Part | None:
    """Return what a DTensor's local tensor is a part of, None for any other tensor."""
    if not is_dtensor(param):
        return None
    mesh = param.device_mesh
    copies = math.prod(size for size, place in zip(mesh.shape, param.placements, strict=True) if place.is_replicate())
    return Part(mesh, copies)


def sum_over_mesh(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the sum of `tensor` over all ranks of `mesh`. A collective on it."""
    import torch.distributed as dist

    total = tensor.clone()
    for dim in range(mesh.ndim):
        dist.all_reduce(total, group=mesh.get_group(dim))
    return total


def any_over_meshes(flag: Tensor, params: Iterable[Tensor]) -> Tensor:
    """Return whether `flag` (0-dim bool) is set on any rank of the meshes that `params` live on.

    A collective on each mesh. Without a DTensor among `params` this is `flag`. All ranks of a mesh must call it, with
    params in the same order.
    """
    meshes = dict.fromkeys(param.device_mesh for param in params if is_dtensor(param))
    if not meshes:
        return flag
    import torch.distributed as dist

    for mesh in meshes:
        verdict = flag.to(mesh.device_type, torch.int32)
        for dim in range(mesh.ndim):
            dist.all_reduce(verdict, op=dist.ReduceOp.MAX, group=mesh.get_group(dim))
        flag = verdict.to(flag.device) != 0
    return flag
