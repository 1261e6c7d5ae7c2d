"""`sharded-adopt doctor`: which kernels run here, and why; with a DeepSpeed config, what will go wrong with it.

With a config it exits with 0 for nothing to complain of, 1 for warnings, 2 for errors.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from rich.table import Table
from rich.text import Text

from sharded_adopt import __version__
from sharded_adopt.commands import GOOD, Commands, UsageError, new_command
from sharded_adopt.commands.printing import make_console, print_json

_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


def add(commands: Commands) -> None:
    """Register `doctor`."""
    about = "show which kernels run here, or what will go wrong with a DeepSpeed config"
    doctor = new_command(commands, "doctor", _run, about)
    doctor.add_argument(
        "config",
        metavar="DS_CONFIG",
        nargs="?",
        type=Path,
        help="a DeepSpeed config; exits with 0 for nothing to complain of, 1 for warnings, 2 for errors",
    )
    doctor.add_argument("--hf", action="store_true", help="the config is used through transformers or accelerate")


def _run(arguments: argparse.Namespace) -> int:
    if arguments.config is not None:
        return _examine(arguments.config, arguments.hf, arguments.json)
    if arguments.hf:
        raise UsageError("--hf says how a DeepSpeed config is used: expected a config before it")
    return _kernels(arguments.json)


def _examine(path: Path, hf: bool, as_json: bool) -> int:
    from sharded_adopt.interop.deepspeed_config import exit_code, findings
    from sharded_adopt.interop.deepspeed_host import look

    host = look()
    found = findings(_read(path, hf), host, hf=hf)
    code = exit_code(found)
    if as_json:
        print_json(
            {"config": str(path), "hf": hf, "host": asdict(host), "findings": list(map(asdict, found)), "exit": code}
        )
        return code
    console = make_console()
    for finding in found:
        line = Text(f"{finding.severity:<8}", style=_STYLES[finding.severity])
        console.print(line.append(f"{finding.where}: {finding.message}", style="default"), soft_wrap=True)
        console.print(f"         -> {finding.change}", highlight=False, soft_wrap=True)
    count = Counter(finding.severity for finding in found)
    summary = ", ".join(f"{count[severity]} {severity}{'s' * (count[severity] != 1)}" for severity in _STYLES)
    console.print(f"{path}: {summary}", highlight=False)
    return code


def _read(path: Path, hf: bool) -> Any:
    """Read a config as its reader does: DeepSpeed with hjson, which knows comments, the others without.

    A key that comes twice is an error, and so is an empty file, which hjson takes for an empty object.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if not text.strip():
            raise ValueError("it is empty")
        return _loads(hf)(text, object_pairs_hook=_once)
    except (OSError, ValueError) as error:
        plain = "; transformers and accelerate read plain JSON, without comments" if hf else ""
        raise UsageError(f"expected a DeepSpeed config in JSON in {path}: {error}{plain}") from None


def _loads(hf: bool) -> Callable[..., Any]:
    if not hf:
        with contextlib.suppress(ModuleNotFoundError):  # DeepSpeed brings it
            from hjson import loads

            return cast("Callable[..., Any]", loads)
    return json.loads


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    count = Counter(key for key, _ in pairs)
    if twice := [key for key in count if count[key] > 1]:
        raise ValueError(f"the key {twice[0]!r} comes {count[twice[0]]} times; DeepSpeed refuses that")
    return dict(pairs)


def _kernels(as_json: bool) -> int:
    import torch

    from sharded_adopt.kernels.fused import status

    kernels = status()
    found = {"version": __version__, "torch": torch.__version__, "threads": torch.get_num_threads(), **asdict(kernels)}
    if as_json:
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
