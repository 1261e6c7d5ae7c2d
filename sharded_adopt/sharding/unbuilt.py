"""What the signatures name and later versions will do: until then it is refused by name."""

from __future__ import annotations

from typing import Any


def refuse_unbuilt(**arguments: tuple[Any, Any]) -> None:
    """Raise `NotImplementedError` for an argument whose value is not the one that is built; each is (value, built)."""
    for name, (value, built) in arguments.items():
        if value != built:
            raise NotImplementedError(f"{name}={value!r} is not built yet: leave it at {built!r}")
