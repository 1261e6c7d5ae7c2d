"""ADOPT in torchtitan: an `OptimizersContainer` that knows "ADOPT" and "ADOPTW" by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from sharded_adopt.adopt import ADOPT, ADOPTW

_OURS = {"ADOPT": ADOPT, "ADOPTW": ADOPTW}


class AdoptOptimizersContainer(OptimizersContainer):  # type: ignore[misc]
    """torchtitan's container, in which a parameter group may name "ADOPT" or "ADOPTW" as its optimizer.

    Put its `Config` (or `default_adopt`) into `Trainer.Config(optimizer=...)`. Groups, checkpoints and schedulers are
    torchtitan's. When torchtitan fakes a step on zero gradients to make the state, ADOPT does not count it.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):  # type: ignore[misc]
        """As torchtitan's; `implementation="fused_opt_states_bf16"` is for Adam alone and raises `ValueError`."""

    def __init__(self, config: Any, *, model_parts: list[Any]) -> None:
        names = {group.optimizer_name for group in config.param_groups} & set(_OURS)
        if names and config.implementation == "fused_opt_states_bf16":
            raise ValueError(
                f"implementation='fused_opt_states_bf16' leaves the state of {', '.join(sorted(names))} as it is: use "
                "'fused' and optimizer_kwargs={'state_dtype': torch.bfloat16}"
            )
        super().__init__(config, model_parts=model_parts)

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        if name in _OURS:
            return _OURS[name]
        factory: Callable[..., Optimizer] = OptimizersContainer._resolve_optimizer_factory(name)
        return factory


def default_adopt(lr: float = 1e-3, **keywords: Any) -> AdoptOptimizersContainer.Config:
    """Return the config of one ADOPTW over all parameters, with weight decay 0.1 as torchtitan's AdamW has it.

    The kernel is ADOPT's choice, the fused one where it can run; `keywords` are any of its arguments.
    """
    options = {"lr": lr, "weight_decay": 0.1, "fused": None, "foreach": None, **keywords}
    group = ParamGroupConfig(pattern=r".*", optimizer_name="ADOPTW", optimizer_kwargs=options)
    return AdoptOptimizersContainer.Config(param_groups=[group])
