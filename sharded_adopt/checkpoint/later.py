"""Names of the contract that are not built yet; each says so."""

from __future__ import annotations

from typing import Any, NoReturn


class AsyncSaver:
    """Save in the background. Not built yet: its constructor raises `NotImplementedError`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("checkpoint.AsyncSaver is not built yet: use checkpoint.save")


def reshard(source: Any, target: Any, world_size: int) -> NoReturn:
    """Rewrite a checkpoint for another world size. Not built yet: raises `NotImplementedError`."""
    raise NotImplementedError("checkpoint.reshard is not built yet: checkpoint.load loads at any world size")


def export(path: Any, out: Any, format: str) -> NoReturn:
    """Write a checkpoint in a foreign format. Not built yet: raises `NotImplementedError`."""
    raise NotImplementedError("checkpoint.export is not built yet: use optimizer.full_state_dict() and torch.save")
