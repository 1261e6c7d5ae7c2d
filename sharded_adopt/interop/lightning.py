"""ADOPT in Lightning: a callback that saves the state of all ranks, and refuses what would be averaged twice."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy

from sharded_adopt.interop.hosted import innermost, require_given_gradients
from sharded_adopt.sharding.optimizer import ShardedOptimizer


class AdoptCallback(Callback):  # type: ignore[misc]
    """Put the whole state of sharded optimizers into Lightning's checkpoints.

    `trainer.fit(..., ckpt_path=...)` then resumes from them by itself, at any number of processes. When training begins
    it raises `ValueError` for a sharded optimizer that averages the gradients although Lightning's DDP does.
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at the optimizers that `configure_optimizers` gave."""
        if isinstance(trainer.strategy, DDPStrategy):
            for optimizer in trainer.optimizers:
                require_given_gradients(innermost(optimizer), "Lightning")

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Replace this rank's shards by the state of all ranks. Every process comes here; rank 0 writes the file."""
        for number, optimizer in enumerate(trainer.optimizers):
            inner = innermost(optimizer)
            if isinstance(inner, ShardedOptimizer):
                checkpoint["optimizer_states"][number] = inner.full_state_dict(main_values=True)
