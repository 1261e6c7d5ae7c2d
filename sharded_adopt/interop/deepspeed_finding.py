"""What the doctor of DeepSpeed configs reports, and how it reads a config that may be wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ERROR, WARNING, NOTE = "error", "warning", "note"
_TRUE = ("true", "1", "1.0", "on", "yes", "t", "y")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that will go wrong, and the line to change.

    Attributes:
        severity: "error": the run stops, hangs, or trains with another optimizer; "warning": it trains, but hardly as
            meant; "note": worth knowing.
        trap: a name for the kind of finding, stable over releases.
        where: the key in the config, dots between levels; "host" for the machine.
        message: what is the case, and what follows.
        change: the line to write, or the command to give.
    """

    severity: str
    trap: str
    where: str
    message: str
    change: str


def is_on(value: Any) -> bool:
    """Say whether DeepSpeed, through pydantic, takes `value` for true."""
    return str(value).lower() in _TRUE


def is_offloaded(config: Mapping[str, Any]) -> bool:
    """Say whether the optimizer's state is offloaded, by the present key or by the old one."""
    zero = at(config, "zero_optimization")
    return at(zero, "offload_optimizer").get("device", "none") in ("cpu", "nvme") or is_on(zero.get("cpu_offload"))


def stage(config: Mapping[str, Any]) -> int | None:
    """Return the ZeRO stage as DeepSpeed reads it, also from "2" or 2.0; None for what it refuses."""
    if config.get("zero_optimization") is True:  # an old way to write stage 1
        return 1
    section = config.get("zero_optimization", {})
    written: Any = section.get("stage", 0) if isinstance(section, Mapping) else 0 if section is False else None
    if written == "auto":  # passed over, where nobody fills it in
        return 0
    try:
        number = float(written)
    except (TypeError, ValueError):
        return None
    return int(number) if number in (0, 1, 2, 3) else None


def at(config: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """Return the mapping at `keys`, empty where there is none."""
    for key in keys:
        held = config.get(key)
        config = held if isinstance(held, Mapping) else {}
    return config
