"""The `sharded-adopt` command: its parser, and the exit code of every error. The commands are in `commands/`.

Exit codes: 0 good, 1 corrupt, 2 usage, 3 none found, 4 does not fit this program, 5 input or output failed, 6 too large
for the device; those of `doctor` with a DeepSpeed config are 0 clean, 1 warnings, 2 errors. With `--json` the result is
one JSON value on the standard output, an error being `{"error": …, "message": …}`; without it, a table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from sharded_adopt import __version__
from sharded_adopt.commands import CORRUPT, IO_FAILED, MISMATCH, NOT_FOUND, USAGE, ckpt, doctor, plan
from sharded_adopt.commands.printing import print_json

# In the order of `--help`.
_COMMANDS = (plan, ckpt, doctor)
# The exit code of each exception, by the name of its class: the classes come with torch, which `--help` must not load.
_EXIT_CODES = {
    "CheckpointCorrupt": CORRUPT,
    "UsageError": USAGE,
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
            print_json({"error": kind, "message": str(error)})
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
        epilog="exit codes: 0 good, 1 corrupt, 2 usage, 3 none found, 4 does not fit this program, "
        "5 input or output failed, 6 too large for the device",
    )
    parser.add_argument("--version", action="version", version=f"sharded-adopt {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
