"""ADOPT's arguments as a config file can say them: plain data, where a misspelt name must not pass in silence."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sharded_adopt.adopt import ADOPT

# What users of other optimizers write, where no spelling is near.
_OTHER_NAMES = {
    "decoupled": "decouple",
    "weight_decouple": "decouple",
    "adam_w_mode": "decouple",
    "clip_exp": "clip_lambda",
    "clip": "clip_lambda",
    "learning_rate": "lr",
    "epsilon": "eps",
}
_DTYPES = {
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
    **dict.fromkeys(("float16", "fp16", "half"), torch.float16),
    **dict.fromkeys(("float32", "fp32", "float"), torch.float32),
    **dict.fromkeys(("float64", "fp64", "double"), torch.float64),
}


def names(optimizer_class: type[ADOPT] = ADOPT) -> tuple[str, ...]:
    """Return the names of the options that `optimizer_class` takes, in its order."""
    listed = [p for cls in (optimizer_class, ADOPT) for p in inspect.signature(cls).parameters.values()]
    named = [p.name for p in listed if p.kind is not inspect.Parameter.VAR_KEYWORD and p.name != "params"]
    return tuple(dict.fromkeys(named))


def read_options(optimizer_class: type[ADOPT], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options in `config` as keyword arguments of `optimizer_class`.

    Lists stand for tuples; `clip_lambda` is a number (an exponent), None or `{"exponent": …, "scale": …}`;
    `state_dtype` is the name of a dtype, or a pair of names. Nothing is evaluated. Raises `ValueError` that lists every
    name and value that cannot be meant so.
    """
    if wrong := problems(optimizer_class, config):
        listed = "".join(f"\n  {name}: {problem}" for name, problem in wrong.items())
        raise ValueError(f"the options of {optimizer_class.__name__} in the config cannot be used:{listed}")
    return {name: _from_data(name, value) for name, value in config.items()}


def problems(optimizer_class: type[ADOPT], config: Mapping[str, Any]) -> dict[str, str]:
    """Return, by the name of the option, what is wrong with it; nothing where `config` can be used."""
    known = names(optimizer_class)
    found = {name: _problem(optimizer_class, known, name, value) for name, value in config.items()}
    wrong = {name: problem for name, problem in found.items() if problem is not None}
    if not wrong and (problem := _refused(optimizer_class, config)):
        wrong["together"] = problem  # each may be used, but not with the others
    return wrong


def meant(name: str, known: Sequence[str]) -> str | None:
    """Return which of the `known` names is meant by another one, None where none is near."""
    return _OTHER_NAMES.get(name) or next(iter(difflib.get_close_matches(name, known, 1)), None)


def suggestion(name: str, known: Sequence[str]) -> str:
    """Return what to write for a `name` that is none of the `known` ones."""
    near = meant(name, known)
    return f"did you mean {near!r}?" if near else f"the options are {', '.join(known)}"


def _problem(optimizer_class: type[ADOPT], known: tuple[str, ...], name: str, value: Any) -> str | None:
    if name not in known:
        return f"{optimizer_class.__name__} has no such option; {suggestion(name, known)}"
    if value == "auto":
        return (
            'it is still "auto", which only transformers and accelerate fill in, and not for every option; '
            f"write its value or leave {name!r} out"
        )
    if name == "clip_lambda" and isinstance(value, str):
        return (
            'expected a number (an exponent), null or {"exponent": 0.25, "scale": 1.0}, got the string '
            f"{value!r}; a config is data and is never evaluated"
        )
    return _refused(optimizer_class, {name: value})


def _refused(optimizer_class: type[ADOPT], config: Mapping[str, Any]) -> str | None:
    """What the optimizer itself says against these values."""
    try:
        optimizer_class([torch.zeros(1, requires_grad=True)], **{n: _from_data(n, v) for n, v in config.items()})
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def _from_data(name: str, value: Any) -> Any:
    if name != "state_dtype":
        return value
    if isinstance(value, (list, tuple)):
        return tuple(_dtype(each) for each in value)
    return _dtype(value)


def _dtype(value: Any) -> Any:
    return _DTYPES.get(value.removeprefix("torch."), value) if isinstance(value, str) else value
