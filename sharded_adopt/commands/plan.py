"""`sharded-adopt plan`: bytes a rank and bytes on the wire, before anything is allocated."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.table import Table

from sharded_adopt.commands import GOOD, TOO_LARGE, Commands, UsageError, new_command, positive
from sharded_adopt.commands.model_file import DTYPES, read_dtype, read_model
from sharded_adopt.commands.printing import make_console, pairs, print_json, readable_size
from sharded_adopt.sharding.layout import BucketKey, Layout, ParamSpec, make_layout
from sharded_adopt.sharding.plan import (
    EngineOptions,
    MemoryPlan,
    StateCost,
    plan_memory,
    segment_dtype,
)

if TYPE_CHECKING:
    import torch

_THOUSANDS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}b": 1000 ** (power + 1) for power, prefix in enumerate("kmgt")}
_UNITS |= {f"{prefix}ib": 1024 ** (power + 1) for power, prefix in enumerate("kmgt")}
_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)
_MOST_TENSORS = 200_000


def add(commands: Commands) -> None:
    """Register `plan`."""
    plan = new_command(commands, "plan", _run, "show bytes a rank and bytes on the wire, before anything is allocated")
    plan.epilog = "exits with 0, with 2 for what cannot be, and with 6 where --device-memory is too small"
    what = plan.add_argument_group("the model").add_mutually_exclusive_group(required=True)
    what.add_argument("--params", type=_count, metavar="N", help="how many parameters: 7e9, 124M, 7B; shapes unknown")
    what.add_argument(
        "--model",
        nargs="+",
        action="extend",
        metavar="FILE",
        help='JSON {"name": [sizes], …}, .safetensors, their index, or a directory of them; values are not read',
    )
    job = plan.add_argument_group("the job")
    job.add_argument("--world-size", type=_ranks, required=True, metavar="W", help="how many ranks")
    job.add_argument(
        "--dtype", metavar="DTYPE", help="of the parameters: fp64, fp32, bf16, fp16 (default: FILE's, fp32)"
    )
    job.add_argument("--backend", choices=("nccl", "gloo"), default="nccl", help="gloo needs memory for what arrives")
    job.add_argument("--accumulate", action="store_true", help="several backwards a step, under no_sync()")
    job.add_argument("--activations", type=_size, default=0, metavar="SIZE", help="also count this much: 10GiB")
    job.add_argument("--device-memory", type=_size, metavar="SIZE", help="exit with 6 if it is not enough: 80GiB, 24GB")
    optimizer = plan.add_argument_group("the optimizer")
    optimizer.add_argument("--optimizer", default="adopt", metavar="NAME", help="adopt, adamw, sgd, … (default: adopt)")
    optimizer.add_argument("--state-dtype", metavar="DTYPE", help="ADOPT's state_dtype (default: fp32 for 16 bit)")
    optimizer.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="its arguments: --set momentum=0.9 amsgrad=true",
    )
    engine = plan.add_argument_group("the engine", "the arguments of ShardedOptimizer that change bytes")
    engine.add_argument("--shard-gradients", action="store_true", help="ZeRO-2 (default: ZeRO-1)")
    engine.add_argument("--no-reduce-gradients", action="store_true", help="gradients come averaged, from DDP")
    engine.add_argument("--no-overlap-grad-reduce", action="store_true", help="reduce in step()")
    engine.add_argument("--main-params", default="auto", metavar="WHAT", help="auto, fp32 or none (default: auto)")
    engine.add_argument("--reduce-dtype", metavar="DTYPE", help="what gradients travel in")
    engine.add_argument("--gather-dtype", metavar="DTYPE", help="what parameters are fetched in")
    engine.add_argument("--bucket-cap-mb", type=float, default=25.0, metavar="MIB", help="(default: 25)")


def _count(text: str) -> int:
    return _whole(text, _THOUSANDS, "a number of parameters like 7e9, 124M or 7B")


def _ranks(text: str) -> int:
    value = positive(text)
    if value >= 2**31:
        raise argparse.ArgumentTypeError(f"must be below 2**31, got {text:.80}")
    return value


def _size(text: str) -> int:
    return _whole(text, _UNITS, "a size like 80GiB, 24GB or 1048576")


def _whole(text: str, units: Mapping[str, int], expected: str) -> int:
    match = _NUMBER.fullmatch(text)
    factor = units.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    value = float(match[1]) * factor
    if not 1 <= value < 1e18:
        raise argparse.ArgumentTypeError(f"expected {expected}, at least 1 and below 1e18, got {text!r}")
    return round(value)


@dataclass(frozen=True, slots=True)
class _Peer:
    """What others hold on a rank and send in a step, as far as it is plain arithmetic over all parameters."""

    parameters: int
    gradients: int
    state: int
    main_parameters: int
    sent: int

    @property
    def peak(self) -> int:
        return self.parameters + self.gradients + self.state + self.main_parameters


def _run(arguments: argparse.Namespace) -> int:
    options = _engine_options(arguments)
    params = _params(arguments)
    layout = make_layout(params, arguments.world_size, max(1, int(arguments.bucket_cap_mb * 2**20)))
    state = _state_costs(arguments, layout, options)
    plan = plan_memory(layout, state, options)
    peers = _peers(layout, state, options)
    message = None
    if arguments.device_memory is not None:
        message = _verdict(arguments, layout, state, options, plan, peers["FSDP2"])
    if arguments.json:
        print_json(
            {
                "params": sum(param.numel for param in params),
                "tensors": len(params),
                "buckets": len(layout.buckets),
                "backend": arguments.backend,
                "plan": asdict(plan) | {name: getattr(plan, name) for name in _SUMS},
                "peers": {name: asdict(peer) | {"peak": peer.peak} for name, peer in peers.items()},
                "activations": arguments.activations,
                "device_memory": arguments.device_memory,
                "fits": None if arguments.device_memory is None else message is None,
                "message": message,
            }
        )
    else:
        _print(arguments, params, layout, plan, peers, message)
    return GOOD if message is None else TOO_LARGE


_SUMS = ("resident", "peak", "peak_accumulating", "sent")


def _params(arguments: argparse.Namespace) -> list[ParamSpec]:
    dtype = None if arguments.dtype is None else read_dtype(arguments.dtype)
    if arguments.model is not None:
        return read_model(arguments.model, dtype)
    # Shapes are not known: two parameters fill a bucket, so that buckets, not single parameters, are what counts.
    dtype = dtype or DTYPES["fp32"]
    numel = max(4, int(arguments.bucket_cap_mb * 2**20) // (2 * dtype.itemsize) // 8 * 8)
    if arguments.params > numel * _MOST_TENSORS:
        raise UsageError(
            f"--params {arguments.params:,} in buckets of {arguments.bucket_cap_mb:g} MiB are too many to plan: pass "
            "--model with the real shapes, or a larger --bucket-cap-mb"
        )
    key = BucketKey(dtype.name, "device")
    sizes = [numel] * (arguments.params // numel) + [arguments.params % numel] * (arguments.params % numel > 0)
    return [ParamSpec(f"p{index}", (size,), key, dtype.itemsize) for index, size in enumerate(sizes)]


def _engine_options(arguments: argparse.Namespace) -> EngineOptions:
    """The engine's options, refused for the reasons for which `ShardedOptimizer` refuses them."""
    from sharded_adopt.sharding.arguments import check_arguments

    try:
        check_arguments(
            mesh=None,
            sharding="full",
            shard_gradients=arguments.shard_gradients,
            reduce_gradients=not arguments.no_reduce_gradients,
            bucket_cap_mb=arguments.bucket_cap_mb,
            overlap_param_gather=False,
            reduce_dtype=_torch_dtype(arguments.reduce_dtype),
            gather_dtype=_torch_dtype(arguments.gather_dtype),
            main_params=arguments.main_params,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    return EngineOptions(
        shards_gradients=arguments.shard_gradients,
        reduces_gradients=not arguments.no_reduce_gradients,
        keeps_main=arguments.main_params != "none",
        reduce_dtype=None if arguments.reduce_dtype is None else read_dtype(arguments.reduce_dtype),
        gather_dtype=None if arguments.gather_dtype is None else read_dtype(arguments.gather_dtype),
        overlaps=not arguments.no_overlap_grad_reduce,
        exchanges=arguments.backend == "gloo",
    )


def _torch_dtype(text: str | None) -> torch.dtype | None:
    import torch

    if text is None:
        return None
    found: torch.dtype = getattr(torch, read_dtype(text).name)
    return found


def _state_costs(
    arguments: argparse.Namespace, layout: Layout, options: EngineOptions
) -> dict[tuple[int, str], StateCost]:
    """What the optimizer keeps for each dtype, found as the engine finds it: by one step of two elements."""
    import torch

    from sharded_adopt.sharding.inner import refuse_not_elementwise, state_cost

    defaults = _optimizer_arguments(arguments)
    optimizer_class = _optimizer_class(arguments.optimizer)
    # A step that a CUDA graph can capture keeps the same state, but does not run on the CPU.
    anywhere = {"capturable": False} if defaults.get("capturable") is True else {}
    costs: dict[tuple[int, str], StateCost] = {}
    for dtype in {DTYPES[param.key.dtype] for param in layout.params}:
        seen: torch.dtype = getattr(torch, segment_dtype(dtype, options).name)
        try:
            refuse_not_elementwise(optimizer_class)
            optimizer_class([torch.zeros(2, dtype=seen)], **defaults)  # refuses what it refuses anywhere
            costs[0, dtype.name] = state_cost(optimizer_class, defaults | anywhere, {}, seen, torch.device("cpu"))
        except Exception as error:  # the class's own code, over values that it may not expect: any error is about them
            given = f" with {pairs(defaults)}" if defaults else ""
            reason = str(error) if isinstance(error, (TypeError, ValueError, RuntimeError)) else repr(error)
            raise UsageError(f"--optimizer {arguments.optimizer}{given}: {reason}") from error
    return costs


def _optimizer_class(name: str) -> Any:
    import torch.optim

    from sharded_adopt.adopt import ADOPT, ADOPTW

    known: dict[str, Any] = {cls.__name__.lower(): cls for cls in (ADOPT, ADOPTW)}
    for cls in vars(torch.optim).values():
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer:
            known.setdefault(cls.__name__.lower(), cls)
    if name.lower() not in known:
        raise UsageError(f"unknown optimizer {name!r}: expected one of {', '.join(sorted(known))}")
    return known[name.lower()]


def _optimizer_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if arguments.state_dtype is not None:
        found["state_dtype"] = _torch_dtype(arguments.state_dtype)
    for setting in arguments.set:
        key, equals, value = setting.partition("=")
        if not (key and equals):
            raise UsageError(f"expected --set KEY=VALUE, got {setting!r}")
        if key in found:
            raise UsageError(f"{key} is given twice, the second time by --set {setting}: give it once")
        try:
            found[key] = json.loads(value)
        except ValueError as error:
            raise UsageError(f"--set {key}: expected a number, true, false or null, got {value!r}") from error
    return found


def _peers(layout: Layout, state: Mapping[tuple[int, str], StateCost], options: EngineOptions) -> dict[str, _Peer]:
    """The same training in DDP, with gradients that are views of its buckets, and the least that FSDP2 can hold.

    FSDP2 keeps shards of the parameters in the dtype of the main values, and fetches them twice a step; the layers that
    are whole while they compute come on top.
    """
    world_size = layout.world_size
    parameters = main = held = sent = shards = sharded_state = 0
    for param in layout.params:
        cost = state[param.group, param.key.dtype]
        seen = segment_dtype(DTYPES[param.key.dtype], options).itemsize
        parameters += param.numel * param.itemsize
        main += param.numel * seen * (seen != param.itemsize)
        held += param.numel * cost.of_element + cost.counters
        share = -(-param.numel // world_size)
        shards += share * seen
        sharded_state += share * cost.of_element + cost.counters
        sent += param.numel * param.itemsize * (world_size - 1) // world_size
    return {
        "DDP": _Peer(parameters, parameters, held, main, 2 * sent),
        "FSDP2": _Peer(shards, shards, sharded_state, 0, 3 * sent),
    }


def _needed(arguments: argparse.Namespace, plan: MemoryPlan) -> int:
    return (plan.peak_accumulating if arguments.accumulate else plan.peak) + int(arguments.activations)


def _verdict(
    arguments: argparse.Namespace,
    layout: Layout,
    state: Mapping[tuple[int, str], StateCost],
    options: EngineOptions,
    plan: MemoryPlan,
    fsdp2: _Peer,
) -> str | None:
    """None where the device is large enough, else what is missing and what to do."""
    there = int(arguments.device_memory)
    needed = _needed(arguments, plan)
    if needed <= there:
        return None
    counted = "with" if arguments.activations else "without"
    figures = f"{readable_size(needed)} a rank {counted} activations, and a device has {readable_size(there)}"
    if options.reduces_gradients and not options.shards_gradients:
        freed = _needed(arguments, plan_memory(layout, state, replace(options, shards_gradients=True)))
        if freed <= there:
            return (
                f"does not fit, use FSDP2 with plain ADOPT, or --shard-gradients, with which it fits: {figures}; "
                f"with --shard-gradients it is {readable_size(freed)}"
            )
    least = fsdp2.peak + int(arguments.activations)
    if least <= there:
        return (
            f"does not fit, use FSDP2 with plain ADOPT: {figures}; FSDP2 keeps at least {readable_size(least)}, and "
            "the layers that are whole while they compute"
        )
    return (
        f"does not fit, nor does FSDP2 with plain ADOPT: {figures}; FSDP2 keeps at least {readable_size(least)}. Take "
        "more ranks, or larger devices"
    )


def _print(
    arguments: argparse.Namespace,
    params: list[ParamSpec],
    layout: Layout,
    plan: MemoryPlan,
    peers: Mapping[str, _Peer],
    message: str | None,
) -> None:
    dtypes = " and ".join(sorted({param.key.dtype for param in params}))
    stage = (
        "gradients from DDP" if arguments.no_reduce_gradients else "ZeRO-2" if arguments.shard_gradients else "ZeRO-1"
    )
    table = Table(
        title=f"{sum(param.numel for param in params):,} parameters in {dtypes}, {arguments.optimizer}, "
        f"{arguments.world_size:,} ranks, {stage}, {arguments.backend}",
        title_justify="left",
    )
    ddp, fsdp2 = peers["DDP"], peers["FSDP2"]
    table.add_column("bytes a rank")
    for heading in ("here", "unsharded in DDP", "FSDP2, at least"):
        table.add_column(heading, justify="right")

    def row(name: str, ours: int, *others: int | None, style: str | None = None) -> None:
        cells = ("" if one is None else readable_size(one) for one in (ours, *others))
        table.add_row(name, *cells, style=style)

    row("parameters", plan.parameters, ddp.parameters, fsdp2.parameters)
    row("gradients", plan.gradients, ddp.gradients, fsdp2.gradients)
    row("optimizer state", plan.state, ddp.state, fsdp2.state)
    row("main values", plan.main_parameters, ddp.main_parameters, fsdp2.main_parameters)
    row("buffers in flight", plan.in_flight)
    row("largest gradient, before it is in its bucket", plan.largest_gradient)
    if arguments.accumulate:
        row("gradients that wait for the last backward", plan.accumulated)
    if arguments.activations:
        row("activations", *(3 * [arguments.activations]))
    row(
        "in all" if arguments.activations else "in all, without activations",
        _needed(arguments, plan),
        ddp.peak + arguments.activations,
        fsdp2.peak + arguments.activations,
        style="bold",
    )
    table.add_section()
    row("sent a step: gradients", plan.sent_gradients)
    row("sent a step: parameters", plan.sent_parameters)
    row("sent a step", plan.sent, ddp.sent, fsdp2.sent, style="bold")
    console = make_console()
    console.print(table)
    if arguments.model is None:
        console.print(
            f"Shapes are not known: {len(layout.buckets):,} full buckets are assumed. With --model the buffers and the "
            "largest gradient are those of the model."
        )
    if message is not None:
        console.print(message, style="bold red")
    elif arguments.device_memory is not None:
        console.print(f"fits into {readable_size(arguments.device_memory)}", style="green")
