"""`sharded-adopt doctor`: which kernels run here, and why."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from rich.table import Table

from sharded_adopt import __version__
from sharded_adopt.commands import GOOD, Commands, new_command
from sharded_adopt.commands.printing import make_console, print_json


def add(commands: Commands) -> None:
    """Register `doctor`."""
    new_command(commands, "doctor", _run, "show which kernels run here, and why")


def _run(arguments: argparse.Namespace) -> int:
    import torch

    from sharded_adopt.kernels.fused import status

    kernels = status()
    found = {"version": __version__, "torch": torch.__version__, "threads": torch.get_num_threads(), **asdict(kernels)}
    if arguments.json:
        print_json(found)
        return GOOD
    cpu = f"fused, C for {kernels.cpu} from {kernels.cpu_library}" if kernels.cpu else f"foreach: {kernels.cpu_reason}"
    cuda = f"fused, Triton {kernels.cuda}" if kernels.cuda else f"foreach: {kernels.cuda_reason}"
    table = Table(show_header=False)
    table.add_row("sharded-adopt", __version__)
    table.add_row("torch", f"{found['torch']}, {found['threads']} threads")
    table.add_row("ADOPT on CPU runs", cpu)
    table.add_row("ADOPT on CUDA runs", cuda)
    make_console().print(table)
    return GOOD
