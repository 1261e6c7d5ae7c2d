"""Checkpoints that survive being killed while they are written, and load at any world size.

`save` and `load` are collective over the optimizer's ranks; everything else needs no process group. The format, the
protocol and what they promise are in docs/checkpoints.md.
"""

from __future__ import annotations

from sharded_adopt.checkpoint.contents import Checkpointable
from sharded_adopt.checkpoint.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointMismatch,
    CheckpointNotFound,
    CheckpointWriteError,
)
from sharded_adopt.checkpoint.later import AsyncSaver, export, reshard
from sharded_adopt.checkpoint.loading import Loaded, load
from sharded_adopt.checkpoint.retention import Keep, prune
from sharded_adopt.checkpoint.root import committed, latest
from sharded_adopt.checkpoint.saving import Saved, save
from sharded_adopt.checkpoint.single import inspect, verify

__all__ = [
    "AsyncSaver",
    "CheckpointCorrupt",
    "CheckpointError",
    "CheckpointMismatch",
    "CheckpointNotFound",
    "CheckpointWriteError",
    "Checkpointable",
    "Keep",
    "Loaded",
    "Saved",
    "committed",
    "export",
    "inspect",
    "latest",
    "load",
    "prune",
    "reshard",
    "save",
    "verify",
]
