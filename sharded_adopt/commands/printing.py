"""How commands print: tables for people, one JSON value for programs."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console


def make_console() -> Console:
    """Where tables go: the standard output, with nothing read as markup."""
    # A pipe has no width; what is cut off there cannot be searched for.
    # What is printed comes from files and users: none of it is markup.
    return Console(markup=False, emoji=False, width=None if sys.stdout.isatty() else 200)


def print_json(value: Any) -> None:
    """Print `value` as JSON; `ValueError` for numbers that JSON has no words for."""
    print(json.dumps(value, indent=2, allow_nan=False))


def readable_size(nbytes: int) -> str:
    """`nbytes` in the unit that leaves the fewest digits, powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024  # type: ignore[assignment]
    return f"{nbytes:.4g} TiB"


def pairs(values: dict[str, Any]) -> str:
    """`values` on one line."""
    return ", ".join(f"{key} {value}" for key, value in values.items())
