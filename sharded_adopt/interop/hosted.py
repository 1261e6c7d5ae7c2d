"""What the hosts that wrap an optimizer have in common: who is inside, and the whole state where they save one rank's.

[Note: the whole state in a host's file]
transformers, accelerate and Lightning save `optimizer.state_dict()` of one process, and load that file in every
process. The state dict of a sharded optimizer holds that process's shards, so the file would lack all others: loading
it is refused, but by then the rest is lost. So each host's hook puts the whole state dict in its place. It is what the
unsharded optimizer would have saved (and the main values of 16-bit parameters), so loading needs no hook, at any
number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.utils.dlpack
from torch import Tensor, nn
from torch.optim import Optimizer

from sharded_adopt.adopt import ADOPT
from sharded_adopt.sharding.optimizer import ShardedOptimizer


def is_ours(optimizer: Any) -> bool:
    """Say whether `optimizer` itself is an `ADOPT` or a sharded optimizer."""
    return isinstance(optimizer, (ADOPT, ShardedOptimizer))


def unwrapped(optimizer: Any) -> Iterator[Any]:
    """Yield `optimizer` and, one after the other, what its wrappers hold, down to the optimizer that holds none.

    The wrappers of accelerate, DeepSpeed (its engine too) and Lightning all name it `optimizer`.
    """
    yield optimizer
    seen = {id(optimizer)}
    while (inner := getattr(optimizer, "optimizer", None)) is not None and id(inner) not in seen:
        seen.add(id(inner))
        optimizer = inner
        yield optimizer


def innermost(optimizer: Any) -> Any:
    """Return the optimizer that really steps, inside its wrappers."""
    return list(unwrapped(optimizer))[-1]


def require_ours(optimizer: Any, host: str) -> ADOPT | ShardedOptimizer:
    """Return the innermost optimizer. Raises `RuntimeError` that names what runs instead, if it is not one of ours."""
    inner = innermost(optimizer)
    if not isinstance(inner, (ADOPT, ShardedOptimizer)):
        raise RuntimeError(
            f"expected {host} to train with ADOPT or a sharded optimizer, but {type(inner).__module__}."
            f"{type(inner).__qualname__} is what runs; see docs/ecosystem.md for the ways in which it is swapped"
        )
    return inner


def require_given_gradients(optimizer: Optimizer, host: str) -> None:
    """Raise `ValueError` for a sharded optimizer that averages gradients which `host` averages and clips by itself."""
    if isinstance(optimizer, ShardedOptimizer) and optimizer.reduces_gradients:
        raise ValueError(
            f"{host} averages the gradients with DistributedDataParallel and clips them with torch's function, which "
            "sees this rank's shard only: construct the sharded optimizer with reduce_gradients=False"
        )


def write_full_state(optimizer: ShardedOptimizer, path: Path, *, everywhere: bool = False, writes: bool) -> None:
    """Put the whole state dict into `path`, in place of what the host has written there. Collective.

    `writes` says whether this process does: rank 0 only, or any with `everywhere`. The file is replaced at once by
    `os.replace`. When the call returns, it is there for every rank. Raises on every rank what went wrong on one.
    """
    whole = optimizer.full_state_dict(rank0_only=not everywhere, main_values=True)
    error: Exception | None = None
    if writes:
        try:
            if not path.exists():
                raise FileNotFoundError(
                    f"expected the host to have saved the optimizer in {path}, there is no such file"
                )
            beside = path.with_name(path.name + ".partial")
            torch.save(whole, beside)
            os.replace(beside, path)
        except Exception as caught:
            error = caught
    optimizer.collectives.raise_together(error)


def separate_storages(module: nn.Module) -> None:
    """Let `state_dict()` of `module` and its parts give every tensor a storage of its own; again: no effect.

    The memory stays the same. The parameters of a sharded optimizer are views of flat buffers: `torch.save` of a part
    of a model writes whole buffers, safetensors' `save_model` refuses them, and accelerate takes them for tied weights
    and writes only one of each buffer.
    """
    for part in module.modules():
        if _own_storages not in part._state_dict_hooks.values():
            part.register_state_dict_post_hook(_own_storages)


def _own_storages(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    for name, tensor in state_dict.items():
        if isinstance(tensor, Tensor) and name.startswith(prefix) and _is_part_of_storage(tensor):
            own = torch.utils.dlpack.from_dlpack(tensor.detach()) if tensor.numel() else torch.empty_like(tensor)
            state_dict[name] = own


def _is_part_of_storage(tensor: Tensor) -> bool:
    return tensor.numel() * tensor.element_size() < tensor.untyped_storage().nbytes()
