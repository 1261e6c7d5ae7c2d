"""ADOPT with accelerate: `prepare` that looks at what it got, and `save_state` that saves the state of all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sharded_adopt.interop.hosted import (
    innermost,
    is_ours,
    require_given_gradients,
    require_ours,
    separate_storages,
    write_full_state,
)
from sharded_adopt.sharding.optimizer import ShardedOptimizer


def prepare(accelerator: Accelerator, *objects: Any) -> Any:
    """Call `accelerator.prepare(*objects)` and return what it returns. Models can then be saved as accelerate does.

    Raises `RuntimeError` if none of the optimizers that run is one of ours (accelerate swaps a client's optimizer for
    DeepSpeedCPUAdam where DeepSpeed offloads), and `ValueError` for a sharded one that averages the gradients although
    the model was wrapped in DistributedDataParallel, which does. Where a sharded optimizer averages by itself, the
    `clip_grad_norm_` and `clip_grad_value_` of `accelerator` raise `RuntimeError` from then on: they see what this rank
    holds only, and every rank would clip by another norm.
    """
    prepared = accelerator.prepare(*objects)
    for one in objects:
        if isinstance(one, nn.Module):
            separate_storages(one)
    each = prepared if isinstance(prepared, tuple) else (prepared,)
    optimizers = [innermost(one) for one in each if hasattr(one, "param_groups")]
    if not any(is_ours(one) for one in optimizers):
        for one in optimizers:
            require_ours(one, "accelerate")
    if any(isinstance(one, DistributedDataParallel) for one in each):
        for one in optimizers:
            require_given_gradients(one, "accelerate")
    if accelerator.num_processes > 1 and any(getattr(one, "reduces_gradients", False) for one in optimizers):
        accelerator.clip_grad_norm_ = accelerator.clip_grad_value_ = _refuse_to_clip
    return prepared


def _refuse_to_clip(*_: Any, **__: Any) -> None:
    raise RuntimeError(
        "the gradients of a sharded optimizer that averages them lie in shards, of which accelerate sees one; "
        "clip with optimizer.optimizer.clip_grad_norm_(max_norm) on the prepared optimizer"
    )


def save_state(accelerator: Accelerator, output_dir: str | Path | None = None, **keywords: Any) -> str:
    """Call `accelerator.save_state` and make the state of sharded optimizers in it whole; returns its directory.

    Every process calls it. `accelerator.load_state` then loads it at any number of processes.
    """
    location: str = accelerator.save_state(None if output_dir is None else str(output_dir), **keywords)
    everywhere: bool = accelerator.project_configuration.save_on_each_node
    writes = accelerator.is_local_main_process if everywhere else accelerator.is_main_process
    for number, wrapped in enumerate(accelerator._optimizers):
        inner = innermost(wrapped)
        if isinstance(inner, ShardedOptimizer):
            name = f"optimizer_{number}.bin" if number else "optimizer.bin"
            write_full_state(inner, Path(location, name), everywhere=everywhere, writes=writes)
    return location
