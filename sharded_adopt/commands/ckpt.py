"""`sharded-adopt ckpt`: list, describe, verify and prune checkpoints."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.table import Table
from rich.text import Text

from sharded_adopt.commands import CORRUPT, GOOD, Commands, Run, new_command, positive
from sharded_adopt.commands.printing import make_console, pairs, print_json, readable_size


def add(commands: Commands) -> None:
    """Register `ckpt` with its actions."""
    ckpt = commands.add_parser("ckpt", help="list, describe, verify and prune checkpoints")
    actions = ckpt.add_subparsers(title="actions", metavar="ACTION", required=True)

    def action(name: str, run: Run, about: str, path: str) -> argparse.ArgumentParser:
        added = new_command(actions, name, run, about)
        added.add_argument("path", metavar="PATH", help=path)
        return added

    either = "a checkpoint, or a directory of checkpoints"
    action("ls", _ls, "list the checkpoints in a directory, oldest first", either)
    action("inspect", _inspect, "show what a checkpoint holds", f"{either} (the newest is shown)")
    verify = action("verify", _verify, "read and check every byte", f"{either} (all are verified)")
    verify.add_argument("--expect", metavar="DIGEST", help="also require the (newest) checkpoint to have this digest")
    prune = action("prune", _prune, "delete old checkpoints", "a directory of checkpoints")
    prune.add_argument("--last", type=positive, required=True, metavar="N", help="keep the N newest")
    prune.add_argument("--every", type=positive, metavar="STEPS", help="keep each whose step is a multiple of STEPS")


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
        print_json(rows)
        return GOOD
    table = Table(title=str(arguments.path))
    for heading in ("checkpoint", "step", "ranks", "elements", "size", "created", "digest"):
        table.add_column(heading, justify="right" if heading in ("step", "ranks", "elements", "size") else "left")
    for row in rows:
        name = row["path"].rsplit("/", 1)[-1]
        if row["error"] is not None:
            table.add_row(name, "", "", "", "", "", Text(f"damaged: {row['error']}", style="red"))
        else:
            size = readable_size(row["nbytes"])
            elements = f"{row['elements']:,}"
            step, ranks = str(row["step"]), str(row["world_size"])
            table.add_row(name, step, ranks, elements, size, row["created"], row["digest"][:12])
    make_console().print(table)
    return GOOD


def _inspect(arguments: argparse.Namespace) -> int:
    from sharded_adopt.checkpoint import inspect
    from sharded_adopt.checkpoint.plain import to_plain

    found = inspect(arguments.path)
    if arguments.json:
        print_json(to_plain(found, "checkpoint", depth=-20))  # `extra` was as deep before
        return GOOD
    about = Table(title=found["path"], show_header=False)
    about.add_row("step", str(found["step"]))
    about.add_row("counter", str(found["counter"]))
    about.add_row("created", f"{found['created']} by {pairs(found['written_by'])}")
    about.add_row("run", found["run_id"])
    about.add_row("digest", found["digest"])
    about.add_row("checksum", found["checksum"])
    about.add_row("size", f"{readable_size(found['nbytes'])} in {found['world_size']} rank files")
    about.add_row("optimizer", str(found["optimizer"]))
    about.add_row("elements", f"{_elements(found):,} in {len(found['params'])} parameters")
    for number, group in enumerate(found["groups"]):
        about.add_row(f"group {number}", f"{len(group['params'])} parameters, {pairs(group['hyperparameters'])}")
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
    console = make_console()
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
        print_json(rows)
    else:
        table = Table(title=str(arguments.path))
        for heading in ("checkpoint", "verdict", "digest or damage"):
            table.add_column(heading, overflow="fold")
        for row in rows:
            verdict = Text("good", style="green") if row["good"] else Text("corrupt", style="red")
            table.add_row(row["path"].rsplit("/", 1)[-1], verdict, Text(row.get("digest") or row["message"]))
        make_console().print(table)
    return GOOD if all(row["good"] for row in rows) else CORRUPT


def _prune(arguments: argparse.Namespace) -> int:
    from sharded_adopt.checkpoint import Keep, prune

    removed = [str(path) for path in prune(arguments.path, Keep(arguments.last, arguments.every))]
    if arguments.json:
        print_json(removed)
    else:
        for path in removed:
            print(f"deleted {path}")
        print(f"{len(removed)} deleted")
    return GOOD


def _elements(found: dict[str, Any]) -> int:
    return sum(segment[2] - segment[1] for file in found["files"] for segment in file["segments"])
