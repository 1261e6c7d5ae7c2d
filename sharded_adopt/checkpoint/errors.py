"""What can go wrong with a checkpoint, as exceptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class CheckpointError(Exception):
    """A checkpoint could not be written, found, read or used; raised itself where the file system fails."""


class CheckpointNotFound(CheckpointError):
    """There is no checkpoint where one was looked for."""


class CheckpointCorrupt(CheckpointError):
    """What is on disk is not what was written: bytes, sizes, or files that are missing or too many."""


class CheckpointMismatch(CheckpointError):
    """The checkpoint is good but does not fit what it was to be loaded into; nothing was changed.

    `missing`: names that the optimizer or model holds and the checkpoint does not. `unexpected`: the other way round.
    `misshapen`: one line for each name that both hold with another shape or dtype.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        misshapen: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.missing = list(missing)
        self.unexpected = list(unexpected)
        self.misshapen = list(misshapen)


class CheckpointWriteError(CheckpointError):
    """A checkpoint was not written; the older ones are as they were.

    `ranks` says what went wrong on which rank. It is the same on every rank.
    """

    def __init__(self, message: str, *, ranks: Mapping[int, str] | None = None) -> None:
        super().__init__(message)
        self.ranks = dict(ranks or {})
