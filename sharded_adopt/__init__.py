"""ADOPT as a sharded (ZeRO) optimizer for torch.

The public names are resolved when they are first used, so that `import sharded_adopt` (and `sharded-adopt --help`)
costs no import of torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sharded_adopt import checkpoint
    from sharded_adopt.adopt import ADOPT, ADOPTW, adopt
    from sharded_adopt.clipping import PowerClip
    from sharded_adopt.launch_env import init_distributed
    from sharded_adopt.sharding.optimizer import ShardedADOPT, ShardedOptimizer
    from sharded_adopt.sharding.scaler import GradScaler

__version__ = "0.1.0.dev0"

__all__ = [
    "ADOPT",
    "ADOPTW",
    "GradScaler",
    "PowerClip",
    "ShardedADOPT",
    "ShardedOptimizer",
    "adopt",
    "checkpoint",
    "init_distributed",
]

# public name -> the module that holds it
_HOMES = {
    "ADOPT": "sharded_adopt.adopt",
    "ADOPTW": "sharded_adopt.adopt",
    "GradScaler": "sharded_adopt.sharding.scaler",
    "PowerClip": "sharded_adopt.clipping",
    "ShardedADOPT": "sharded_adopt.sharding.optimizer",
    "ShardedOptimizer": "sharded_adopt.sharding.optimizer",
    "init_distributed": "sharded_adopt.launch_env",
}


def __getattr__(name: str) -> Any:
    if name == "checkpoint":
        return importlib.import_module("sharded_adopt.checkpoint")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sharded_adopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _Package(ModuleType):
    """The package, with `adopt` pinned to the function.

    Importing the submodule `sharded_adopt.adopt` writes the module over the package's attribute of that name; a
    property of the class wins over what is written to the instance, whatever was imported first.
    """

    @property
    def adopt(self) -> Any:
        return importlib.import_module("sharded_adopt.adopt").adopt

    @adopt.setter
    def adopt(self, submodule: ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Package
