"""ADOPT's arguments where a host has only names and scalars, often as one string that it splits at commas."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from sharded_adopt.adopt import ADOPT
from sharded_adopt.clipping import PowerClip
from sharded_adopt.interop.config_options import names, read_options, suggestion

_LITERALS = {"true": True, "false": False, "none": None, "null": None}


def parse(text: str | None) -> dict[str, str]:
    """Split "name=value,name=value" as transformers does.

    Raises `ValueError` for a part without `=`, and for a name that comes twice.
    """
    given: dict[str, str] = {}
    for part in (text or "").replace(" ", "").split(","):
        name, equals, value = part.partition("=")
        if part and (not equals or not name or name in given):
            raise ValueError(f"expected name=value, each name once, got {part!r} in {text!r}")
        if part:
            given[name] = value
    return given


def from_scalars(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments of `ADOPT` from scalars, or from strings that hold them.

    Beside ADOPT's own names: `beta1`, `beta2` (the other one keeps its default), `clip_exponent` ("none": no clip) and
    `clip_scale`. Numbers, `true`, `false` and `none` may be strings, and dtypes are named; nothing is evaluated. Raises
    `ValueError` for a name that ADOPT does not have, and for a value that it does not take.
    """
    options = {name: _value(value) for name, value in given.items()}
    betas = [options.pop(name, None) for name in ("beta1", "beta2")]
    if betas != [None, None]:
        _refuse_both("betas", "beta1 and beta2", options)
        defaults = inspect.signature(ADOPT).parameters["betas"].default
        options["betas"] = tuple(d if b is None else b for b, d in zip(betas, defaults, strict=True))
    if "clip_exponent" in options or "clip_scale" in options:
        _refuse_both("clip_lambda", "clip_exponent and clip_scale", options)
        default: PowerClip = inspect.signature(ADOPT).parameters["clip_lambda"].default
        scale, exponent = options.pop("clip_scale", default.scale), options.pop("clip_exponent", default.exponent)
        options["clip_lambda"] = None if exponent is None else {"exponent": exponent, "scale": scale}
    for name in options:
        if name not in names():
            known = [*names(), "beta1", "beta2", "clip_exponent", "clip_scale"]
            raise ValueError(f"ADOPT has no option {name!r}; {suggestion(name, known)}")
    return read_options(ADOPT, options)


def _refuse_both(whole: str, parts: str, options: Mapping[str, Any]) -> None:
    if whole in options:
        raise ValueError(f"give {whole} or {parts}, not both")


def _value(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.lower() in _LITERALS:
        return _LITERALS[value.lower()]
    try:
        return float(value)
    except ValueError:
        return value
