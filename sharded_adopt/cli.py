"""The `sharded-adopt` command.

Exit codes: 0 good, 1 corrupt, 2 usage, 3 none found, 4 does not fit, 5 input or output failed. With `--json` the result
is one JSON value on the standard output, an error being `{"error": …, "message": …}`; without it, a table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sharded_adopt import __version__

GOOD, CORRUPT, USAGE, NOT_FOUND, MISMATCH, IO_FAILED = range(6)
# The exit code of each exception, by the name of its class: the classes come with torch, which `--help` must not load.
_EXIT_CODES = {
    "CheckpointCorrupt": CORRUPT,
    "CheckpointNotFound": NOT_FOUND,
    "CheckpointMismatch": MISMATCH,
    "CheckpointWriteError": IO_FAILED,
    "CheckpointError": IO_FAILED,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's arguments) and return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except Exception as error:
        kind = type(error).__name__
        if kind not in _EXIT_CODES:
            raise
        if arguments.json:
            _print_json({"error": kind, "message": str(error)})
        else:
            Console(stderr=True, soft_wrap=True).print(Text(f"{kind}: {error}"))
        return _EXIT_CODES[kind]
    except KeyboardInterrupt:
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sharded-adopt",
        description="ADOPT as a sharded optimizer: tools around it.",
        epilog="exit codes: 0 good, 1 corrupt, 2 usage, 3 none found, 4 does not fit, 5 input or output failed",
    )
    parser.add_argument("--version", action="version", version=f"sharded-adopt {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    ckpt = commands.add_parser("ckpt", help="list, describe, verify and prune checkpoints")
    actions = ckpt.add_subparsers(title="actions", metavar="ACTION", required=True)

    def action(name: str, run: Callable[[argparse.Namespace], int], about: str, path: str) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        added.add_argument("path", metavar="PATH", help=path)
        added.add_argument("--json", action="store_true", help="print JSON instead of a table")
        added.set_defaults(run=run)
        return added

    either = "a checkpoint, or a directory of checkpoints"
    action("ls", _ls, "list the checkpoints in a directory, oldest first", either)
    action("inspect", _inspect, "show what a checkpoint holds", f"{either} (the newest is shown)")
    verify = action("verify", _verify, "read and check every byte", f"{either} (all are verified)")
    verify.add_argument("--expect", metavar="DIGEST", help="also require the (newest) checkpoint to have this digest")
    prune = action("prune", _prune, "delete old checkpoints", "a directory of checkpoints")
    prune.add_argument("--last", type=_positive, required=True, metavar="N", help="keep the N newest")
    prune.add_argument("--every", type=_positive, metavar="STEPS", help="keep each whose step is a multiple of STEPS")
    doctor = commands.add_parser("doctor", help="show which kernels run here, and why")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table")
    doctor.set_defaults(run=_doctor)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _doctor(arguments: argparse.Namespace) -> int:
    import torch

    from sharded_adopt.kernels.fused import status

    kernels = status()
    found = {"version": __version__, "torch": torch.__version__, "threads": torch.get_num_threads(), **asdict(kernels)}
    if arguments.json:
        _print_json(found)
        return GOOD
    cpu = f"fused, C for {kernels.cpu} from {kernels.cpu_library}" if kernels.cpu else f"foreach: {kernels.cpu_reason}"
    cuda = f"fused, Triton {kernels.cuda}" if kernels.cuda else f"foreach: {kernels.cuda_reason}"
    table = Table(show_header=False)
    table.add_row("sharded-adopt", __version__)
    table.add_row("torch", f"{found['torch']}, {found['threads']} threads")
    table.add_row("ADOPT on CPU runs", cpu)
    table.add_row("ADOPT on CUDA runs", cuda)
    _console().print(table)
    return GOOD


def _ls(arguments: argparse.Namespace) -> int:
    from sharded_adopt.checkpoint import CheckpointError, inspect
    from sharded_adopt.checkpoint.single import all_checkpoints

    rows: list[dict[str, Any]] = []
    for path in all_checkpoints(arguments.path):
        row: dict[str, Any] = {"path": str(path), "error": None}
        try:
            found = inspect(path)
            row |= {key: found[key] for key in ("counter", "step", "world_size", "nbytes", "created", "digest")}
            row["elements"] = _elements(found)
        except CheckpointError as error:
            row["error"] = str(error)
        rows.append(row)
    if arguments.json:
        _print_json(rows)
        return GOOD
    table = Table(title=str(arguments.path))
    for heading in ("checkpoint", "step", "ranks", "elements", "size", "created", "digest"):
        table.add_column(heading, justify="right" if heading in ("step", "ranks", "elements", "size") else "left")
    for row in rows:
        name = row["path"].rsplit("/", 1)[-1]
        if row["error"] is not None:
            table.add_row(name, "", "", "", "", "", Text(f"damaged: {row['error']}", style="red"))
        else:
            size = _size(row["nbytes"])
            elements = f"{row['elements']:,}"
            step, ranks = str(row["step"]), str(row["world_size"])
            table.add_row(name, step, ranks, elements, size, row["created"], row["digest"][:12])
    _console().print(table)
    return GOOD


def _inspect(arguments: argparse.Namespace) -> int:
    from sharded_adopt.checkpoint import inspect
    from sharded_adopt.checkpoint.plain import to_plain

    found = inspect(arguments.path)
    if arguments.json:
        _print_json(to_plain(found, "checkpoint", depth=-20))  # `extra` was as deep before
        return GOOD
    about = Table(title=found["path"], show_header=False)
    about.add_row("step", str(found["step"]))
    about.add_row("counter", str(found["counter"]))
    about.add_row("created", f"{found['created']} by {_pairs(found['written_by'])}")
    about.add_row("run", found["run_id"])
    about.add_row("digest", found["digest"])
    about.add_row("checksum", found["checksum"])
    about.add_row("size", f"{_size(found['nbytes'])} in {found['world_size']} rank files")
    about.add_row("optimizer", str(found["optimizer"]))
    about.add_row("elements", f"{_elements(found):,} in {len(found['params'])} parameters")
    for number, group in enumerate(found["groups"]):
        about.add_row(f"group {number}", f"{len(group['params'])} parameters, {_pairs(group['hyperparameters'])}")
    about.add_row("extra", json.dumps(found["extra"]))
    parameters = Table(title="parameters, and what else the model holds")
    for heading in ("name", "dtype", "shape", "state"):
        parameters.add_column(heading, overflow="fold")
    for param in found["params"]:
        state = [f"{key} {dtype}" for key, dtype in sorted(param["tensors"].items()) if key != "param"]
        state += [f"{key} {scalar['value']}" for key, scalar in sorted(param["scalars"].items())]
        parameters.add_row(Text(param["name"]), param["dtype"], str(param["shape"]), ", ".join(state))
    for tensor in found["model"]["tensors"]:
        parameters.add_row(Text(tensor["name"]), tensor["dtype"], str(tensor["shape"]), "not optimized")
    for name in found["model"]["values"]:
        parameters.add_row(Text(name), "JSON", "", "not optimized")
    console = _console()
    console.print(about)
    console.print(parameters)
    return GOOD


def _verify(arguments: argparse.Namespace) -> int:
    from sharded_adopt.checkpoint import CheckpointCorrupt, verify
    from sharded_adopt.checkpoint.single import all_checkpoints

    paths = all_checkpoints(arguments.path)
    rows: list[dict[str, Any]] = []
    for path in paths:
        try:
            digest = verify(path, expect_digest=arguments.expect if path == paths[-1] else None)
            rows.append({"path": str(path), "good": True, "digest": digest})
        except CheckpointCorrupt as error:
            rows.append({"path": str(path), "good": False, "message": str(error)})
    if arguments.json:
        _print_json(rows)
    else:
        table = Table(title=str(arguments.path))
        for heading in ("checkpoint", "verdict", "digest or damage"):
            table.add_column(heading, overflow="fold")
        for row in rows:
            verdict = Text("good", style="green") if row["good"] else Text("corrupt", style="red")
            table.add_row(row["path"].rsplit("/", 1)[-1], verdict, Text(row.get("digest") or row["message"]))
        _console().print(table)
    return GOOD if all(row["good"] for row in rows) else CORRUPT


def _prune(arguments: argparse.Namespace) -> int:
    from sharded_adopt.checkpoint import Keep, prune

    removed = [str(path) for path in prune(arguments.path, Keep(arguments.last, arguments.every))]
    if arguments.json:
        _print_json(removed)
    else:
        for path in removed:
            print(f"deleted {path}")
        print(f"{len(removed)} deleted")
    return GOOD


def _elements(found: dict[str, Any]) -> int:
    return sum(segment[2] - segment[1] for file in found["files"] for segment in file["segments"])


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _size(nbytes: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024  # type: ignore[assignment]
    return f"{nbytes:.4g} TiB"


def _console() -> Console:
    # A pipe has no width; what is cut off there cannot be searched for.
    # What is printed comes from files and users: none of it is markup.
    return Console(markup=False, emoji=False, width=None if sys.stdout.isatty() else 200)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


if __name__ == "__main__":
    sys.exit(main())
