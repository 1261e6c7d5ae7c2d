"""What will go wrong with ADOPT under a DeepSpeed config: a function of the config and of facts about the host.

DeepSpeed's defaults and behaviour are those of 0.19.8, accelerate's of 1.15.0, transformers' of 5.23.0.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sharded_adopt.adopt import ADOPT, ADOPTW
from sharded_adopt.clipping import clip_to_data
from sharded_adopt.interop.config_options import meant, names, problems
from sharded_adopt.interop.deepspeed_host import Host

ERROR, WARNING, NOTE = "error", "warning", "note"
_CLASSES = {cls.__name__: cls for cls in (ADOPT, ADOPTW)}
# What transformers fills in; for `optimizer.params` these only.
_FILLED_BY_TRAINER = {"lr", "weight_decay", "betas", "eps"}
_ADAMS = {"betas": "[0.9, 0.999]", "eps": "1e-8"}
_OURS = {"betas": "[0.9, 0.9999]", "eps": "1e-6"}
# "auto" that is DeepSpeed's own and needs nobody to fill it in.
_DEEPSPEEDS_OWN_AUTO = ("pipeline", "autotuning", "tensor_parallel")
STALE_SECONDS = 600.0
"""Age at which a lock file cannot belong to a build any more: ADOPT needs one operation, which takes a minute."""


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


def findings(config: Mapping[str, Any], host: Host, *, hf: bool = False) -> tuple[Finding, ...]:
    """Return what will go wrong, errors first; nothing is read or imported beyond the arguments.

    `config`: a DeepSpeed config as its JSON reads. `hf`: it is handed to transformers or accelerate, which fill in
    "auto" and may bring another optimizer.
    """
    found = [
        *_optimizer(config, hf),
        *_autos(config, hf),
        *_clipping(config),
        *_zero(config),
        *_precision(config),
        *_checkpoints(config),
        *_host(host),
    ]
    return tuple(sorted(found, key=lambda finding: (ERROR, WARNING, NOTE).index(finding.severity)))


def exit_code(found: tuple[Finding, ...]) -> int:
    """Return 2 where there is an error, 1 where there is a warning, else 0."""
    return 2 if any(f.severity == ERROR for f in found) else 1 if any(f.severity == WARNING for f in found) else 0


def _optimizer(config: Mapping[str, Any], hf: bool) -> Iterator[Finding]:
    optimizer = _at(config, "optimizer")
    kind = optimizer.get("type")
    if kind is None:
        yield from _no_optimizer(config, hf)
        return
    if kind not in _CLASSES:
        meant = next((name for name in _CLASSES if name.lower() == str(kind).lower()), None)
        if meant:
            what = f'DeepSpeed looks {kind!r} up as it is written, and it is registered as "{meant}"'
        else:
            what = f"the config trains with {kind!r}, not with ADOPT"
            meant = next(iter(difflib.get_close_matches(str(kind).upper(), _CLASSES, 1, 0.75)), "ADOPT")
        yield Finding(ERROR, "type", "optimizer.type", what, f'"type": "{meant}"')
    params = optimizer.get("params") or {}
    cls = _CLASSES.get(kind, ADOPT)
    if kind in _CLASSES or str(kind).upper() in _CLASSES:
        yield from _params(cls, params, hf)


def _params(cls: type[ADOPT], params: Mapping[str, Any], hf: bool) -> Iterator[Finding]:
    given = {k: v for k, v in params.items() if not (hf and v == "auto" and k in _FILLED_BY_TRAINER)}
    for name, problem in problems(cls, given).items():
        change = _option_line(cls, name, params.get(name))
        if name == "together":
            change = "one of them"
        if name == "max_grad_norm":
            problem, change = "DeepSpeed refuses it here", f'"gradient_clipping": {params[name]}, at the top level'
        yield Finding(ERROR, "option", f"optimizer.params.{name}", problem, change)
    for name in ("betas", "eps"):
        if hf and params.get(name) == "auto":
            yield Finding(
                WARNING,
                "adams-constants",
                f"optimizer.params.{name}",
                f"\"auto\" is filled with Adam's {_ADAMS[name]}, ADOPT's own is {_OURS[name]}",
                f'"{name}": {_OURS[name]}',
            )
    eps = params.get("eps")
    if isinstance(eps, float) and 0 < eps < 1e-7:
        message = f"{eps:g} is Adam's; ADOPT's eps is a lower bound of √v, and it takes 1e-6"
        yield Finding(WARNING, "adams-constants", "optimizer.params.eps", message, '"eps": 1e-6')
    if cls is ADOPT and params.get("weight_decay") and "decouple" not in params:
        yield Finding(
            WARNING,
            "coupled-decay",
            "optimizer.params.weight_decay",
            "ADOPT adds it to the gradient, as Adam does and AdamW does not",
            '"decouple": true, or "decouple": false if that is meant',
        )


def _option_line(cls: type[ADOPT], name: str, value: Any) -> str:
    """What to write in the place of an option that cannot be used: the name that is meant, or a value that can be."""
    if name not in names(cls):
        near = meant(name, names(cls))
        return f'"{near}": {json.dumps(value)}' if near else f'take "{name}" out'
    default = inspect.signature(cls).parameters.get(name, inspect.signature(ADOPT).parameters[name]).default
    plain = clip_to_data(default) if name == "clip_lambda" else default
    return f'"{name}": {json.dumps(plain)}, or another value that it may have'


def _no_optimizer(config: Mapping[str, Any], hf: bool) -> Iterator[Finding]:
    write = '"optimizer": {"type": "ADOPT", "params": {"lr": 1e-3}}'
    if "optimizer" in config:
        yield Finding(ERROR, "type", "optimizer.type", "without a type DeepSpeed reads no optimizer", write)
        return
    keeps = config.get("zero_force_ds_cpu_optimizer") is False
    if _is_offloaded(config) and not keeps:
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


def _autos(config: Mapping[str, Any], hf: bool) -> Iterator[Finding]:
    if hf:
        return
    for key in _keys_with(config, "auto"):
        top = key.partition(".")[0]
        if top not in _DEEPSPEEDS_OWN_AUTO and not key.startswith("optimizer.params."):
            message = 'DeepSpeed does not know "auto"; transformers and accelerate fill it in'
            change = "write the value, or run the doctor with --hf"
            yield Finding(ERROR, "auto", key, message, change)


def _keys_with(config: Mapping[str, Any], value: Any, path: str = "") -> Iterator[str]:
    for key, held in config.items():
        if isinstance(held, Mapping):
            yield from _keys_with(held, value, f"{path}{key}.")
        elif held == value:
            yield f"{path}{key}"


def _clipping(config: Mapping[str, Any]) -> Iterator[Finding]:
    if "gradient_clipping" not in config:
        message = "left out, it is not off: DeepSpeed clips the gradient's norm at 1.0"
        change = '"gradient_clipping": 0.0 for none, or 1.0 if that is meant'
        yield Finding(WARNING, "hidden-clipping", "gradient_clipping", message, change)


def _zero(config: Mapping[str, Any]) -> Iterator[Finding]:
    zero = _at(config, "zero_optimization")
    offload = _at(zero, "offload_optimizer")
    where = "zero_optimization.offload_optimizer"
    if isinstance(ratio := offload.get("ratio", 1.0), (int, float)) and ratio != 1.0:
        message = "a part of the state on the GPU is DeepSpeed's with its own Adam only; it stops"
        yield Finding(ERROR, "adam-only", f"{where}.ratio", message, '"ratio": 1.0')
    if offload.get("super_offload"):
        message = "SuperOffload updates with DeepSpeedCPUAdam in processes of its own, whatever the optimizer is"
        yield Finding(ERROR, "adam-only", f"{where}.super_offload", message, '"super_offload": false')
    if zero.get("zenflow"):
        message = "ZenFlow updates the important gradients with an AdamW of its own, whatever the optimizer is"
        yield Finding(ERROR, "adam-only", "zero_optimization.zenflow", message, 'take "zenflow" out')
    if offload.get("device") == "nvme":
        message = "ADOPT has not been tried with state on NVMe"
        yield Finding(WARNING, "untested", f"{where}.device", message, '"device": "cpu"')


def _precision(config: Mapping[str, Any]) -> Iterator[Finding]:
    stage = _stage(config)
    bf16, fp16 = _at(config, "bf16"), _at(config, "fp16")
    change = '"zero_optimization": {"stage": 1}'
    if stage == 0 and fp16.get("enabled") is True:
        message = "fp16 without ZeRO steps once on zero gradients when it is made, and did not train as fp32 does"
        yield Finding(WARNING, "16-bit-without-zero", "fp16.enabled", message, change)
    if stage == 0 and bf16.get("enabled") is True:
        message = (
            "bf16 without ZeRO steps once on zero gradients when it is made; this ADOPT does not count that step, "
            "other optimizers lose their first"
        )
        yield Finding(NOTE, "16-bit-without-zero", "bf16.enabled", message, f"nothing, or {change}")
    needs_adam = {
        "fp16.fp16_master_weights_and_grads": fp16.get("fp16_master_weights_and_grads"),
        "bf16.bf16_master_weights_and_grads": bf16.get("bf16_master_weights_and_grads")
        and (not bf16.get("bf16_optimizer_states") or _is_offloaded(config)),
    }
    for key, is_on in needs_adam.items():
        if is_on:
            message = "DeepSpeed keeps 16-bit main weights with DeepSpeedCPUAdam only; it stops"
            yield Finding(ERROR, "adam-only", key, message, f'"{key.partition(".")[2]}": false')


def _checkpoints(config: Mapping[str, Any]) -> Iterator[Finding]:
    if _at(config, "zero_optimization").get("elastic_checkpoint"):
        message = "what is saved with it cannot be loaded: it wants the step of a group, ADOPT's are the parameters'"
        yield Finding(
            ERROR,
            "elastic-checkpoint",
            "zero_optimization.elastic_checkpoint",
            message,
            '"elastic_checkpoint": false, and ds_to_universal for another number of ranks',
        )
    if _at(config, "checkpoint").get("load_universal") is not True:
        return
    if _stage(config) == 3:
        yield Finding(
            WARNING,
            "universal-groups",
            "checkpoint.load_universal",
            "at ZeRO-3 every parameter group gets the options of the first one when a universal checkpoint is loaded",
            "one group, or set weight_decay, lr, ... of each group again after loading",
        )
    if _at(config, "optimizer", "params").get("state_dtype"):
        yield Finding(
            WARNING,
            "universal-state",
            "optimizer.params.state_dtype",
            "a universal checkpoint brings exp_avg and exp_avg_sq back in fp32",
            "expect the memory of fp32 state, or load an ordinary checkpoint",
        )


def _host(host: Host) -> Iterator[Finding]:
    if not host.has_deepspeed:
        message = "DeepSpeed is not installed for this Python"
        yield Finding(ERROR, "no-deepspeed", "host", message, "pip install 'sharded-adopt[deepspeed]'")
    yield from _name_of_host(host)
    if host.missing_build_tools and not host.has_cuda:
        message = (
            f"{' and '.join(host.missing_build_tools)} not found: on CPUs every initialize() compiles "
            "deepspeed_shm_comm first, and stops"
        )
        change = "apt-get install g++ ninja-build"
        yield Finding(ERROR, "build-tools", "host", message, change)
    for lock, age in host.locks:
        is_stale = age >= STALE_SECONDS
        state = f"{age / 60:.0f} minutes old, so no build runs" if is_stale else "a build runs, or was killed"
        message = f"{lock} makes every run wait for it, for ever and in silence; {state}"
        yield Finding(ERROR if is_stale else WARNING, "build-lock", "host", message, f"rm {lock}")
    if host.extensions_are_shared and not host.has_cuda:
        message = f"{host.extensions} is shared: virtual environments rebuild each other's operations there"
        change = "export TORCH_EXTENSIONS_DIR=... for each environment"
        yield Finding(NOTE, "shared-build-folder", "host", message, change)


def _name_of_host(host: Host) -> Iterator[Finding]:
    if host.gloo_interface:
        return
    change = "export GLOO_SOCKET_IFNAME=lo on one machine, the interface that the machines share on several"
    # 127.0.0.1 is what one machine needs; Debian writes 127.0.1.1, where gloo listens and no other rank finds it
    if not host.addresses:
        message = f"the host name {host.name} does not resolve, and gloo asks for it"
        yield Finding(WARNING, "host-name", "host", message, change)
    elif wrong := [a for a in host.addresses if a.startswith("127.") and a != "127.0.0.1"]:
        message = f"the host name {host.name} is {wrong[0]}, where ranks on other machines look for gloo in vain"
        yield Finding(WARNING, "host-name", "host", message, change)


def _is_offloaded(config: Mapping[str, Any]) -> bool:
    return _at(config, "zero_optimization", "offload_optimizer").get("device", "none") in ("cpu", "nvme")


def _stage(config: Mapping[str, Any]) -> int:
    stage = _at(config, "zero_optimization").get("stage", 0)
    return stage if isinstance(stage, int) else 0


def _at(config: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """The mapping at `keys`, empty where there is none."""
    for key in keys:
        held = config.get(key)
        config = held if isinstance(held, Mapping) else {}
    return config
