"""Which checkpoints stay."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sharded_adopt.checkpoint.errors import CheckpointNotFound, CheckpointWriteError
from sharded_adopt.checkpoint.root import Entry, RootLock, absolute, list_entries, remove


@dataclass(frozen=True, slots=True)
class Keep:
    """Keep the `last` newest checkpoints, and for ever each one whose step is a multiple of `every`.

    `last` is at least 1, and 3 unless given: were the newest ever found damaged, there would be others. Only committed
    checkpoints count.
    """

    last: int = 3
    every: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("last", self.last), ("every", self.every)):
            if (name, value) != ("every", None) and (type(value) is not int or value < 1):
                raise ValueError(f"Keep needs `{name}` to be a whole number of at least 1, got {value!r}")

    def removable(self, entries: Sequence[Entry]) -> list[Entry]:
        """Those of `entries` (oldest first) that need not be kept, oldest first."""
        return [entry for entry in entries[: -self.last] if self.every is None or entry.step % self.every]


def prune(root: str | os.PathLike[str], keep: Keep) -> list[Path]:
    """Delete every checkpoint in `root` that `keep` does not ask for, and return their paths, oldest first.

    Needs no process group. Raises `CheckpointNotFound` where `root` holds none, `CheckpointWriteError` where a save is
    under way there or one cannot be deleted.
    """
    path = absolute(root)
    if not isinstance(keep, Keep):
        raise TypeError(f"keep must be a checkpoint.Keep, got {type(keep).__name__}")
    if not list_entries(path):
        raise CheckpointNotFound(f"there is no checkpoint in {path}")
    try:
        lock = RootLock(path)
        try:
            return prune_locked(path, keep)
        finally:
            lock.release()
    except OSError as error:
        raise CheckpointWriteError(f"{path} could not be pruned: {error}") from error


def prune_locked(root: Path, keep: Keep) -> list[Path]:
    """What `prune` does, for a caller that holds the lock."""
    entries = keep.removable(list_entries(root))
    for entry in entries:
        remove(root, entry.name)
    return [root / entry.name for entry in entries]
