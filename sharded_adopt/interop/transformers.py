"""ADOPT in transformers' `Trainer`: which optimizer it is given, and a callback for what it does not do by itself."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from sharded_adopt.adopt import ADOPT
from sharded_adopt.interop.hosted import require_given_gradients, require_ours, write_full_state
from sharded_adopt.interop.scalars import from_scalars, parse
from sharded_adopt.sharding.optimizer import ShardedADOPT, ShardedOptimizer

_log = logging.getLogger(__name__)
_ADAMS = ("adam_beta1", "adam_beta2", "adam_epsilon")


def adopt_for(args: TrainingArguments, **arguments: Any) -> tuple[type[ADOPT | ShardedOptimizer], dict[str, Any]]:
    """Return what `Trainer(optimizer_cls_and_kwargs=...)` takes for these `TrainingArguments`.

    `ShardedADOPT` where DistributedDataParallel trains on several processes, `ADOPT` otherwise (one process, DeepSpeed,
    FSDP). `learning_rate` is its lr; `weight_decay` comes with Trainer's groups, which hold a value of their own each,
    so it belongs into `TrainingArguments`. `optim_args` holds ADOPT's other arguments as text:
    `optim_args="beta2=0.999,clip_exponent=none,decouple=true"` (`interop.scalars`); `arguments` win over it and over
    `learning_rate`, and may be those of `ShardedOptimizer` too where it is used.

    Raises `ValueError` for an `optim_args` that cannot be meant so, and for what would be passed over in silence:
    `weight_decay` in `optim_args` or `arguments`, and `adam_beta1`, `adam_beta2`, `adam_epsilon` where one was changed.
    """
    defaults = {field.name: field.default for field in TrainingArguments.__dataclass_fields__.values()}
    for name in _ADAMS:
        if getattr(args, name) != defaults[name]:
            option = name.removeprefix("adam_").replace("epsilon", "eps")
            raise ValueError(f"{name}={getattr(args, name)} is not ADOPT's: write optim_args='{option}=...'")
    options = {"lr": args.learning_rate, **from_scalars(parse(args.optim_args)), **arguments}
    if "weight_decay" in options:
        raise ValueError(
            f"weight_decay={options['weight_decay']} would not be used: each of Trainer's groups holds a value of its "
            f"own, from the TrainingArguments; write TrainingArguments(weight_decay={options['weight_decay']}) instead"
        )
    if _wraps_in_ddp(args):
        return ShardedADOPT, {"reduce_gradients": False, **options}
    return ADOPT, options


def _wraps_in_ddp(args: TrainingArguments) -> bool:
    """Say whether Trainer will wrap the model in DistributedDataParallel over several processes."""
    switched = any(
        os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1") for name in ("DEEPSPEED", "FSDP")
    )
    return bool(args.world_size > 1 and not args.deepspeed and not args.fsdp and not switched)


class AdoptCallback(TrainerCallback):  # type: ignore[misc]
    """See that ADOPT is what trains, and make the checkpoints of sharded state whole.

    When training begins it raises `RuntimeError` if another optimizer runs (with DeepSpeed, Trainer drops the instance
    in `optimizers=` for AdamW) and `ValueError` if gradients would be averaged by two; it logs a warning if ADOPT got
    Adam's constants (a DeepSpeed config with "auto"). After each save the whole state of a `ShardedOptimizer` replaces
    what rank 0 wrote to `optimizer.pt`. Trainer then resumes from it by itself, at any number of processes.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Look at the optimizer that Trainer has prepared."""
        inner = require_ours(optimizer, "Trainer")
        if args.world_size > 1:
            require_given_gradients(inner, "Trainer")
        for group in inner.param_groups:
            if "clip_lambda" in group and group["eps"] < 1e-7:
                _log.warning(
                    'ADOPT runs with eps=%g and betas=%s, which are Adam\'s; "auto" in a DeepSpeed config fills them '
                    "in. ADOPT's own are 1e-6 and (0.9, 0.9999)",
                    group["eps"],
                    group["betas"],
                )
                return

    def on_save(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Replace the shards of rank 0 by the state of all ranks. Every process comes here."""
        inner = require_ours(optimizer, "Trainer")
        if isinstance(inner, ShardedOptimizer) and not args.save_only_model:
            path = Path(args.output_dir, f"checkpoint-{state.global_step}", "optimizer.pt")
            write_full_state(inner, path, everywhere=args.save_on_each_node, writes=args.should_save)
