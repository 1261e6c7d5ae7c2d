"""What will go wrong with the optimizer of a DeepSpeed config, and with the options that Trainer compares with its own.

transformers fills "auto" in from its `TrainingArguments`, passes over what of these the config leaves out, and stops
where the two say different things. Its defaults are those of 5.23.0.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any

from sharded_adopt.adopt import ADOPT, ADOPTW
from sharded_adopt.clipping import PowerClip, clip_to_data
from sharded_adopt.interop.config_options import meant, names, problems
from sharded_adopt.interop.deepspeed_finding import ERROR, NOTE, WARNING, Finding, is_offloaded

_CLASSES = {cls.__name__: cls for cls in (ADOPT, ADOPTW)}
# The options that transformers fills in: its arguments for each, and the value where nobody passes them.
TRAINERS: dict[str, tuple[tuple[str, ...], Any]] = {
    "lr": (("learning_rate",), 5e-5),
    "weight_decay": (("weight_decay",), 0.0),
    "betas": (("adam_beta1", "adam_beta2"), [0.9, 0.999]),
    "eps": (("adam_epsilon",), 1e-8),
    "gradient_clipping": (("max_grad_norm",), 1.0),
}
_ADAMS = ("betas", "eps")  # of these, Trainer's defaults are not ADOPT's
_WHOLE = {"beta1": "betas", "beta2": "betas", "clip_exponent": "clip_lambda", "clip_scale": "clip_lambda"}


def optimizer(config: Mapping[str, Any], hf: bool) -> Iterator[Finding]:
    """Yield what will go wrong with `optimizer`; what is no object, or no name, is told elsewhere."""
    if not isinstance(section := config.get("optimizer", {}), Mapping):
        return
    kind = section.get("type")
    if kind is None:
        yield from _no_optimizer(config, hf)
        return
    if not isinstance(kind, str):
        return
    if kind not in _CLASSES:
        meant = next((name for name in _CLASSES if name.lower() == kind.lower()), None)
        if meant:
            what = f'DeepSpeed looks {kind!r} up as it is written, and it is registered as "{meant}"'
        else:
            what = f"the config trains with {kind!r}, not with ADOPT"
            meant = next(iter(difflib.get_close_matches(kind.upper(), _CLASSES, 1, 0.75)), "ADOPT")
        yield Finding(ERROR, "type", "optimizer.type", what, f'"type": "{meant}"')
    cls = _CLASSES.get(kind.upper())
    if cls and isinstance(section.get("params", {}), (Mapping, type(None))):
        yield from _params(cls, section.get("params") or {}, hf)


def clipping(config: Mapping[str, Any], hf: bool) -> Iterator[Finding]:
    """Yield what will go wrong with `gradient_clipping`."""
    if "gradient_clipping" not in config:
        message = "left out, it is not off: DeepSpeed clips the gradient's norm at 1.0"
        change = '"gradient_clipping": 0.0 for none, or 1.0 if that is meant'
        if hf:
            message += ", whatever TrainingArguments(max_grad_norm) says"
            change = '"gradient_clipping": "auto"'
        yield Finding(WARNING, "hidden-clipping", "gradient_clipping", message, change)
    elif hf:
        yield from _refused_by_trainer("gradient_clipping", config["gradient_clipping"], "gradient_clipping")


def _params(cls: type[ADOPT], params: Mapping[str, Any], hf: bool) -> Iterator[Finding]:
    given = {k: v for k, v in params.items() if not (hf and v == "auto" and k in TRAINERS)}
    wrong = problems(cls, given)
    for name, problem in wrong.items():
        change = _instead(cls, name, params, hf)
        if name == "max_grad_norm":
            problem = "DeepSpeed refuses it here"
        yield Finding(ERROR, "option", f"optimizer.params.{name}", problem, change)
    if hf:
        yield from _against_trainer(cls, params, set(wrong))
    eps = params.get("eps")
    if isinstance(eps, float) and 0 < eps < 1e-7:
        message = f"{eps:g} is Adam's; ADOPT's eps is a lower bound of √v, and it takes 1e-6"
        change = _trainers("eps", 1e-6) if hf else '"eps": 1e-6'
        yield Finding(WARNING, "adams-constants", "optimizer.params.eps", message, change)
    if cls is ADOPT and params.get("weight_decay") and "decouple" not in params:
        yield Finding(
            WARNING,
            "coupled-decay",
            "optimizer.params.weight_decay",
            "ADOPT adds it to the gradient, as Adam does and AdamW does not",
            '"decouple": true, or "decouple": false if that is meant',
        )


def _against_trainer(cls: type[ADOPT], params: Mapping[str, Any], told: set[str]) -> Iterator[Finding]:
    """What Trainer makes of `params`: filled in, passed over or refused; those of `told` have a line already."""
    misspelt = {meant(name, names(cls)) for name in told if name not in names(cls)}
    for name in ("lr", "weight_decay"):
        if name not in params and name not in misspelt:
            argument = TRAINERS[name][0][0]
            message = f"left out, TrainingArguments({argument}) is passed over in silence for {_default(cls, name)}"
            yield Finding(WARNING, "trainer-passed-over", f"optimizer.params.{name}", message, f'"{name}": "auto"')
    for name in _ADAMS:
        if params.get(name) == "auto":
            adams, ours = TRAINERS[name][1], _default(cls, name)
            message = f"\"auto\" is filled with Adam's {json.dumps(adams)}, ADOPT's own is {json.dumps(ours)}"
            yield Finding(
                WARNING, "adams-constants", f"optimizer.params.{name}", message, _trainers(name, _default(cls, name))
            )
    for name, value in params.items():
        if name in TRAINERS and name not in told:
            yield from _refused_by_trainer(name, value, f"optimizer.params.{name}")


def _refused_by_trainer(name: str, value: Any, where: str) -> Iterator[Finding]:
    arguments, default = TRAINERS[name]
    if value not in ("auto", None, default):
        message = (
            f"Trainer stops where TrainingArguments({', '.join(arguments)}) says anything else, and it says "
            f"{json.dumps(default)} by itself"
        )
        yield Finding(WARNING, "trainer-refuses", where, message, _trainers(name, value))


def _trainers(name: str, value: Any, written: str = "") -> str:
    """How `value` comes to ADOPT under Trainer, which compares config and arguments. `written`: the key as it is."""
    arguments = TRAINERS[name][0]
    each = value if isinstance(value, (list, tuple)) and len(value) == len(arguments) else [value] * len(arguments)
    passed = f"TrainingArguments({', '.join(f'{a}={v!r}' for a, v in zip(arguments, each, strict=True))})"
    if name not in _ADAMS:
        return f'"{name}": "auto", with {passed}'
    own = json.dumps(_default(ADOPT, name))
    return f'take "{written or name}" out (ADOPT\'s own is {own}), or "{name}": "auto" with {passed}'


def _instead(cls: type[ADOPT], name: str, params: Mapping[str, Any], hf: bool) -> str:
    """What to write in the place of an option that cannot be used: the name that is meant, or a value that can be."""
    if name == "together":
        return "one of them"
    if name == "max_grad_norm":
        clip = (
            _trainers("gradient_clipping", params[name]) if hf else f'"gradient_clipping": {json.dumps(params[name])}'
        )
        return f"{clip}, at the top level"
    known = name in names(cls)
    target = name if known else _WHOLE.get(name) or meant(name, names(cls))
    if target is None:
        return f'take "{name}" out'
    if not known and target in params:
        return f'take "{name}" out, "{target}" is there'
    value = _whole(name, params)
    is_bad = bool(problems(cls, {target: value}))
    if is_bad:
        value = _default(cls, target)
    if hf and target in TRAINERS:
        return _trainers(target, value, name)
    return f'"{target}": {json.dumps(value)}' + (", or another value that it may have" if is_bad else "")


def _whole(name: str, params: Mapping[str, Any]) -> Any:
    """The value of the option that `name` is meant for, or is a part of; the other part keeps its default."""
    if name not in _WHOLE:
        return params[name]
    if _WHOLE[name] == "betas":
        return [params.get(part, own) for part, own in zip(("beta1", "beta2"), _default(ADOPT, "betas"), strict=True)]
    own = PowerClip()
    exponent, scale = params.get("clip_exponent", own.exponent), params.get("clip_scale", own.scale)
    if exponent in (None, "none"):
        return None
    return exponent if scale == 1.0 else {"exponent": exponent, "scale": scale}


def _default(cls: type[ADOPT], name: str) -> Any:
    """The default of an option, as a config says it."""
    default = inspect.signature(cls).parameters.get(name, inspect.signature(ADOPT).parameters[name]).default
    if name == "clip_lambda":
        return clip_to_data(default)
    return list(default) if isinstance(default, tuple) else default


def _no_optimizer(config: Mapping[str, Any], hf: bool) -> Iterator[Finding]:
    params = '{"lr": "auto", "weight_decay": "auto"}' if hf else '{"lr": 1e-3}'
    write = f'"optimizer": {{"type": "ADOPT", "params": {params}}}'
    if "optimizer" in config:
        yield Finding(ERROR, "type", "optimizer.type", "without a type DeepSpeed reads no optimizer", write)
        return
    keeps = config.get("zero_force_ds_cpu_optimizer") is False
    if is_offloaded(config) and not keeps:
        if hf:
            message = (
                "an optimizer that is made in Python is swapped for DeepSpeedCPUAdam in silence, for being offloaded"
            )
        else:
            message = "DeepSpeed refuses to offload an optimizer that is made in Python"
        yield Finding(
            ERROR,
            "offloaded-client",
            "zero_force_ds_cpu_optimizer",
            message,
            f'{write}, or "zero_force_ds_cpu_optimizer": false',
        )
    elif hf:
        message = (
            "Trainer drops optimizers=(ADOPT(...), None) for AdamW in silence, and takes AdamW where nothing is passed"
        )
        change = f"{write}, or Trainer(optimizer_cls_and_kwargs=adopt_for(args))"
        yield Finding(WARNING, "client-dropped", "optimizer", message, change)
    else:
        message = "the script must pass the optimizer to deepspeed.initialize; from here it cannot be seen which it is"
        yield Finding(NOTE, "client", "optimizer", message, f"{write}, or assert_runs_adopt(engine) in the script")
