"""What will go wrong with ADOPT under a DeepSpeed config: a function of the config and of facts about the host.

DeepSpeed's defaults and behaviour are those of 0.19.8, accelerate's of 1.15.0, transformers' of 5.23.0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sharded_adopt.interop.config_options import names
from sharded_adopt.interop.deepspeed_finding import ERROR, NOTE, WARNING, Finding, at, is_offloaded, is_on, stage
from sharded_adopt.interop.deepspeed_form import keys, not_an_object, shapes, values
from sharded_adopt.interop.deepspeed_host import Host
from sharded_adopt.interop.deepspeed_optimizer import TRAINERS, clipping, optimizer

# "auto" that is DeepSpeed's own and needs nobody to fill it in.
_DEEPSPEEDS_OWN_AUTO = ("pipeline", "autotuning", "tensor_parallel")
STALE_SECONDS = 600.0
"""Age at which a lock file cannot belong to a build any more: ADOPT needs one operation, which takes a minute."""


def findings(config: object, host: Host, *, hf: bool = False) -> tuple[Finding, ...]:
    """Return what will go wrong, errors first; nothing is read or imported beyond the arguments.

    `config`: a DeepSpeed config as its JSON reads. `hf`: it is handed to transformers or accelerate, which fill in
    "auto" and may bring another optimizer.
    """
    found = [*_of_config(config, hf), *_host(host)] if isinstance(config, Mapping) else [not_an_object(config)]
    return tuple(sorted(found, key=lambda finding: (ERROR, WARNING, NOTE).index(finding.severity)))


def exit_code(found: tuple[Finding, ...]) -> int:
    """Return 2 where there is an error, 1 where there is a warning, else 0."""
    return 2 if any(f.severity == ERROR for f in found) else 1 if any(f.severity == WARNING for f in found) else 0


def _of_config(config: Mapping[str, Any], hf: bool) -> Iterator[Finding]:
    yield from shapes(config)
    yield from keys(config, names(), TRAINERS if hf else ())
    yield from values(config, hf)
    yield from optimizer(config, hf)
    yield from _autos(config, hf)
    yield from clipping(config, hf)
    yield from _zero(config)
    yield from _precision(config)
    yield from _checkpoints(config)


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


def _zero(config: Mapping[str, Any]) -> Iterator[Finding]:
    zero = at(config, "zero_optimization")
    offload = at(zero, "offload_optimizer")
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
    bf16, fp16 = at(config, "bf16"), at(config, "fp16")
    change = '"zero_optimization": {"stage": 1}'
    if stage(config) == 0 and is_on(fp16.get("enabled")):
        message = "fp16 without ZeRO steps once on zero gradients when it is made, and did not train as fp32 does"
        yield Finding(WARNING, "16-bit-without-zero", "fp16.enabled", message, change)
    if stage(config) == 0 and is_on(bf16.get("enabled")):
        message = (
            "bf16 without ZeRO steps once on zero gradients when it is made; this ADOPT does not count that step, "
            "other optimizers lose their first"
        )
        yield Finding(NOTE, "16-bit-without-zero", "bf16.enabled", message, f"nothing, or {change}")
    needs_adam = {
        "fp16.fp16_master_weights_and_grads": fp16.get("fp16_master_weights_and_grads"),
        "bf16.bf16_master_weights_and_grads": bf16.get("bf16_master_weights_and_grads")
        and (not bf16.get("bf16_optimizer_states") or is_offloaded(config)),
    }
    for key, asked in needs_adam.items():
        if asked:
            message = "DeepSpeed keeps 16-bit main weights with DeepSpeedCPUAdam only; it stops"
            yield Finding(ERROR, "adam-only", key, message, f'"{key.partition(".")[2]}": false')


def _checkpoints(config: Mapping[str, Any]) -> Iterator[Finding]:
    if at(config, "zero_optimization").get("elastic_checkpoint"):
        message = "what is saved with it cannot be loaded: it wants the step of a group, ADOPT's are the parameters'"
        yield Finding(
            ERROR,
            "elastic-checkpoint",
            "zero_optimization.elastic_checkpoint",
            message,
            '"elastic_checkpoint": false, and ds_to_universal for another number of ranks',
        )
    if at(config, "checkpoint").get("load_universal") is not True:
        return
    if stage(config) == 3:
        yield Finding(
            WARNING,
            "universal-groups",
            "checkpoint.load_universal",
            "at ZeRO-3 every parameter group gets the options of the first one when a universal checkpoint is loaded",
            "one group, or set weight_decay, lr, ... of each group again after loading",
        )
    if at(config, "optimizer", "params").get("state_dtype"):
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
    if host.locks and host.extensions_are_shared and not host.has_cuda:
        message = f"{host.extensions} is shared: virtual environments wait for each other's builds there"
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
