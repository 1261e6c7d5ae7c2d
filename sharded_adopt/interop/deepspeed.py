"""ADOPT by name in DeepSpeed's configs: `"optimizer": {"type": "ADOPT", "params": {…}}`, also `"ADOPTW"`.

Importing this module is all there is to do, before `deepspeed.initialize`; `sharded_adopt.run` does it for scripts that
do not. DeepSpeed itself is not imported here: the names are entered as soon as somebody has imported it.

[Note: how DeepSpeed 0.19 finds an optimizer]
It has no registry. A name that is not one of its own is looked up in torch.optim, so that is where ADOPT goes. ZeRO
refuses optimizers that are not on a list, exact types only, unless `zero_allow_untested_optimizer` is set; the list is
asked through `is_zero_supported_optimizer`, which is also the one place that knows, before anything is cut, both the
optimizer and that ZeRO will cut it. Without ZeRO it is not asked; the engine's `_do_optimizer_sanity_check` looks at
every optimizer, made by itself, an instance or a callable's. There a sharded optimizer that averages the gradients is
refused: DeepSpeed writes its averages through `.data`, which `param.grad` does not show.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from sharded_adopt.interop.after_import import after_import

if TYPE_CHECKING:
    from sharded_adopt.adopt import ADOPT

__all__ = ["assert_runs_adopt", "register"]


def register() -> None:
    """Make `"type": "ADOPT"` and `"ADOPTW"` known to DeepSpeed, now or as soon as it is imported. Again: no effect.

    Raises `ModuleNotFoundError` where DeepSpeed is not installed, and `RuntimeError` where torch.optim holds another
    optimizer of that name.
    """
    if sys.modules.get("deepspeed") is None and importlib.util.find_spec("deepspeed") is None:
        raise ModuleNotFoundError(
            "sharded_adopt.interop.deepspeed needs DeepSpeed, which is not installed; "
            "pip install 'sharded-adopt[deepspeed]', with torch installed first",
            name="deepspeed",
        )
    after_import("deepspeed", _enter)


def _enter() -> None:
    import torch
    from deepspeed.runtime import engine

    from sharded_adopt.adopt import ADOPT, ADOPTW

    for optimizer_class in (ADOPT, ADOPTW):
        name = optimizer_class.__name__
        present = getattr(torch.optim, name, None)
        if getattr(present, "optimizer_class", present) not in (None, optimizer_class):
            raise RuntimeError(
                f"torch.optim.{name} is {present!r} already, and DeepSpeed would take that one for "
                f'"type": "{name}"; pass the optimizer to deepspeed.initialize(optimizer=...) instead'
            )
        setattr(torch.optim, name, _constructor(optimizer_class))
    asked = getattr(engine, "is_zero_supported_optimizer", None)
    if asked is None:
        raise RuntimeError(
            "this DeepSpeed does not ask is_zero_supported_optimizer, which version 0.19.8 does; "
            "install a version that sharded-adopt[deepspeed] allows, or report this"
        )
    if not hasattr(asked, "knows_adopt"):
        engine.is_zero_supported_optimizer = _supporting_adopt(asked)
    looks = getattr(engine.DeepSpeedEngine, "_do_optimizer_sanity_check", None)
    if looks is None:
        raise RuntimeError(
            "this DeepSpeed does not look at optimizers in _do_optimizer_sanity_check, which version 0.19.8 does; "
            "install a version that sharded-adopt[deepspeed] allows, or report this"
        )
    if not hasattr(looks, "knows_adopt"):
        engine.DeepSpeedEngine._do_optimizer_sanity_check = _refusing_two_averages(looks)


def _constructor(optimizer_class: type[ADOPT]) -> Callable[..., ADOPT]:
    """What DeepSpeed calls with the parameters and the `params` of its config."""

    def construct(params: Any, **config: Any) -> ADOPT:
        from sharded_adopt.interop.config_options import read_options

        return optimizer_class(params, **read_options(optimizer_class, config))

    construct.__name__ = construct.__qualname__ = optimizer_class.__name__
    construct.__doc__ = f"Construct sharded_adopt.{optimizer_class.__name__} from options as a config file says them."
    construct.optimizer_class = optimizer_class  # type: ignore[attr-defined]
    return construct


def _supporting_adopt(asked: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """DeepSpeed's question whether ZeRO may cut an optimizer, with ADOPT and its subclasses among the answers."""

    @functools.wraps(asked)
    def is_zero_supported_optimizer(optimizer: Any) -> bool:
        from sharded_adopt.adopt import ADOPT

        if not isinstance(optimizer, ADOPT):
            return asked(optimizer)
        # A rank sees the gradients of its partition only, and one group a call: that all of these are zero does not
        # make a dummy step. ZeRO takes none (the 16-bit optimizers of stage 0 do, and are not asked about).
        optimizer.guard_dummy_step = False
        optimizer.register_step_pre_hook(_own_steps)
        return True

    is_zero_supported_optimizer.knows_adopt = True  # type: ignore[attr-defined]
    return is_zero_supported_optimizer


def _refusing_two_averages(looks: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """DeepSpeed's look at an optimizer, which raises `ValueError` for one that averages the gradients too."""

    @functools.wraps(looks)
    def _do_optimizer_sanity_check(self: Any, basic_optimizer: Any) -> Any:
        if _averages(basic_optimizer):
            raise ValueError(f"DeepSpeed got {type(basic_optimizer).__name__}, {_TWO_AVERAGES}")
        return looks(self, basic_optimizer)

    _do_optimizer_sanity_check.knows_adopt = True  # type: ignore[attr-defined]
    return _do_optimizer_sanity_check


_TWO_AVERAGES = (
    "which averages the gradients over the ranks, and so does DeepSpeed: give it ADOPT, and let ZeRO shard that"
)


def _averages(optimizer: Any) -> bool:
    from sharded_adopt.sharding.optimizer import ShardedOptimizer

    return isinstance(optimizer, ShardedOptimizer) and optimizer.reduces_gradients


def _own_steps(optimizer: Any, args: Any, keywords: Any) -> None:
    """Give every partition its own `step`: loading a universal checkpoint, ZeRO-3 hands one tensor to all of them."""
    seen: set[int] = set()
    for state in optimizer.state.values():
        step = state.get("step")
        if id(step) in seen:
            state["step"] = step.clone()
        elif step is not None:
            seen.add(id(step))


def assert_runs_adopt(engine: Any) -> None:
    """Raise `AssertionError` unless ADOPT is what `engine` steps; nothing is sent, each rank looks at its own engine.

    `engine` is what `deepspeed.initialize` returned, or accelerate's wrapper of it, an `Accelerator`, or a transformers
    `Trainer` that has begun to train. The message names what runs instead.
    """
    from torch.optim import Optimizer

    from sharded_adopt.adopt import ADOPT

    path = list(_wrapped(engine))
    beside = [f"{name}={type(one).__name__}" for o in path for name in _BESIDE if (one := getattr(o, name, None))]
    if isinstance(path[-1], ADOPT) and not beside:
        return
    chain = " > ".join(type(each).__name__ for each in path)
    if _averages(path[-1]):
        raise AssertionError(f"this engine trains with {chain}, {_TWO_AVERAGES}")
    is_there = len(path) > 1 or isinstance(path[-1], Optimizer)
    runs = type(path[-1]).__name__ if is_there and not isinstance(path[-1], ADOPT) else ""
    what = f"{runs} runs" if runs else ("it does not run alone" if beside else "no optimizer is there")
    raise AssertionError(
        f"expected this engine to train with ADOPT, but {what}: {', '.join([chain, *beside])}; "
        'write "optimizer": {"type": "ADOPT"} into the DeepSpeed config and look for what replaces it with '
        "`sharded-adopt doctor ds_config.json` (--hf with transformers or accelerate)"
    )


# Optimizers that DeepSpeed runs beside, or in the place of, the one that it was given.
_BESIDE = ("backup_optimizer", "selective_optimizer", "superoffload_cpu_optimizer")
# Where an engine is, in what holds one: Trainer, Accelerator, its wrapper of an engine, Lightning's strategy.
_HELD_AS = ("deepspeed", "deepspeed_engine_wrapped", "engine", "deepspeed_engine")


def _wrapped(engine: Any) -> Iterator[Any]:
    """Yield the engine and, one after the other, what its wrappers hold, down to the optimizer that holds none."""
    from sharded_adopt.interop.hosted import unwrapped

    for name in _HELD_AS:
        # An engine shows the attributes of its model as its own: once there, look no further.
        if not hasattr(type(engine), "zero_optimization_stage"):
            engine = getattr(engine, name, None) or engine
    yield from unwrapped(engine)


register()
