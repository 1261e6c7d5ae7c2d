"""The commands of `sharded-adopt`, one module each, and what they share: exit codes and how to register.

A module has one public function, `add(commands)`: it calls `new_command` with the function that runs, and gives the
parser that comes back the command's own arguments. `cli.py` lists the modules. What needs torch is imported when the
command runs: `--help` must not wait for it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeAlias

GOOD, CORRUPT, USAGE, NOT_FOUND, MISMATCH, IO_FAILED, TOO_LARGE = range(7)

# Takes the parsed arguments, prints the result, returns the exit code.
Run: TypeAlias = Callable[[argparse.Namespace], int]
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class UsageError(Exception):
    """The arguments cannot be meant so; the message says what was expected, what came and what to do."""


def new_command(commands: Commands, name: str, run: Run, about: str) -> argparse.ArgumentParser:
    """Register the command `name` (with `--json`) and return its parser, which takes its other arguments.

    `about`: one line without a full stop. `run` may raise what `cli.py` has an exit code for.
    """
    added = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
    added.add_argument("--json", action="store_true", help="print JSON instead of a table")
    added.set_defaults(run=run)
    return added


def positive(text: str) -> int:
    """The type of an argument that is a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value
