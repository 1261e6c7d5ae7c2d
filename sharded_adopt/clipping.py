"""The clip bound of ADOPT as data.

ADOPT clips the normalised gradient elementwise to [-c, c], where c = clip_lambda(step) grows with the number of
updates. The authors' package takes any callable and forgets it when the optimizer is saved. `PowerClip` says the same
as data, so that a checkpoint, a JSON config and a kernel in C can carry it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

Clip = Callable[[Any], "float | Tensor"]
"""A clip bound: takes `step` (an int, or a 0-dim tensor where nothing may be read on the host), gives the bound c."""


@dataclass(frozen=True, slots=True)
class PowerClip:
    """The bound c(step) = scale * step ** exponent.

    `step` counts updates: it is 1 at the first update that moves a parameter, where c = scale. An int or float gives a
    float; a 0-dim tensor gives a 0-dim fp64 tensor on the same device. `exponent` is at least 0 (0: a constant bound),
    `scale` above 0; anything else raises `ValueError`. The authors use `PowerClip(0.25)` (`step ** 0.25`), timm 1/3.

    >>> PowerClip(0.25)(16)
    2.0
    """

    exponent: float = 0.25
    scale: float = 1.0

    def __post_init__(self) -> None:
        exponent = _as_float("exponent", self.exponent)
        scale = _as_float("scale", self.scale)
        if not 0.0 <= exponent < math.inf:
            raise ValueError(f"PowerClip: exponent must be finite and at least 0, got {self.exponent!r}")
        if not 0.0 < scale < math.inf:
            raise ValueError(f"PowerClip: scale must be finite and above 0, got {self.scale!r}")
        object.__setattr__(self, "exponent", exponent)
        object.__setattr__(self, "scale", scale)

    def __call__(self, step: float | Tensor) -> Any:
        """Return the bound at `step`: a float, or a 0-dim fp64 tensor for a tensor."""
        if isinstance(step, Tensor):
            return self.scale * step.to(torch.float64) ** self.exponent
        try:
            return self.scale * float(step) ** self.exponent
        except OverflowError:  # Python raises where a tensor gives inf: no bound at all
            return math.inf


def is_number(value: Any) -> bool:
    """Return whether `value` is a real number; a bool is not meant as one, and a tensor is not on the host."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _as_float(name: str, value: Any) -> float:
    if not is_number(value):
        raise ValueError(f"PowerClip: {name} must be a number, got {value!r}")
    return float(value)


def as_clip(value: Any) -> Clip | None:
    """Return the clip that `value` stands for: a `PowerClip`, `None`, an exponent, a mapping of the two, a callable.

    A string is refused, also one that looks like a formula: configs are data and are never evaluated. Raises
    `ValueError`.
    """
    if value is None or isinstance(value, PowerClip):
        return value
    if is_number(value):
        return _clip_of({"exponent": value})
    if isinstance(value, Mapping):
        if "exponent" not in value or not set(value) <= {"exponent", "scale"}:
            raise ValueError(
                f"clip_lambda: a mapping must hold 'exponent' and may hold 'scale', got {dict(value)!r}; "
                'write {"exponent": 0.25, "scale": 1.0}'
            )
        return _clip_of(value)
    if callable(value):
        clip: Clip = value
        return clip
    raise ValueError(
        f"clip_lambda must be a PowerClip, None, an exponent (0.25 for step ** 0.25) or a callable, got {value!r}"
    )


def _clip_of(fields: Mapping[str, Any]) -> PowerClip:
    try:
        return PowerClip(**fields)
    except ValueError as error:
        raise ValueError(f"clip_lambda: {error}") from None


def clip_to_data(clip: Clip | None) -> dict[str, Any] | None:
    """Return `clip` as what a state dict may hold: numbers, strings and None. A callable leaves only its name."""
    if clip is None:
        return None
    if isinstance(clip, PowerClip):
        return {"exponent": clip.exponent, "scale": clip.scale}
    return {"custom": _name_of(clip)}


def clip_from_data(data: Any, current: Any) -> Clip | None:
    """Return the clip that a state dict holds; `current` is the optimizer's own, needed where only a name was saved.

    Raises `ValueError` where `data` names a callable and `current` is not that callable: going on with another bound
    would change the run without a word.
    """
    if not (isinstance(data, Mapping) and "custom" in data):
        return as_clip(data)
    clip = as_clip(current)
    have = clip_to_data(clip)
    if have != dict(data):
        raise ValueError(
            f"clip_lambda: the state dict was saved with the callable {data['custom']!r}, which is not in it; "
            f"construct the optimizer with the same callable before loading (it has {have!r} now), or replace the entry"
        )
    return clip


def _name_of(clip: Clip) -> str:
    named = clip if hasattr(clip, "__qualname__") else type(clip)
    return f"{named.__module__}.{named.__qualname__}"


def clip_bound(clip: Clip | None, step: int | Tensor) -> float | Tensor | None:
    """Return the bound at `step`, or None for no clip. Raises `ValueError` where a callable gives no bound."""
    if clip is None:
        return None
    bound: Any = clip(step)
    if isinstance(bound, Tensor):
        return bound
    if not is_number(bound) or not bound >= 0:
        raise ValueError(f"clip_lambda({step!r}) must give a number of at least 0, got {bound!r}")
    return float(bound)
