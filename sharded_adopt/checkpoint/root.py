"""The directory that holds the checkpoints of a run: names, order, the lock of a writer, debris.

    root/
      ckpt-00000123-step-000000001000/     committed; appeared by one rename and is never changed
      .tmp-ckpt-…-<16 hex>/                being written, or left by a writer that died
      .trash-ckpt-…-<16 hex>/              being deleted

The counter orders checkpoints: not the step, to which a run may go back, and not the time, which machines disagree on.

[Note: the lock] Whoever writes holds `flock` on the root itself, which the kernel gives back when the process dies: no
file is left behind, and what lies there half-made while the lock is held is nobody's. File systems that cannot lock a
directory (NFS) leave two writers to the rename, which only one of them can win, and debris is swept by its age.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import stat
from pathlib import Path
from typing import NamedTuple

from sharded_adopt.checkpoint.errors import CheckpointError, CheckpointWriteError
from sharded_adopt.checkpoint.storage import DIRECTORY_MODE, sync_directory

logger = logging.getLogger("sharded_adopt.checkpoint")

_COMMITTED = re.compile(r"ckpt-([0-9]{8,18})-step-([0-9]{12,18})")
_DEBRIS = re.compile(r"\.(tmp|trash)-ckpt-.*-[0-9a-f]{16}")
_CANNOT_LOCK = {errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
UNLOCKED_DEBRIS_SECONDS = 24 * 3600.0


class Entry(NamedTuple):
    """A committed checkpoint by its name; sorted, the newest is the last."""

    counter: int
    step: int

    @property
    def name(self) -> str:
        """The name of its directory."""
        return f"ckpt-{self.counter:08d}-step-{self.step:012d}"


def parse_name(name: str) -> Entry | None:
    """What the name of a checkpoint's directory says; None for any other name."""
    match = _COMMITTED.fullmatch(name)
    entry = match and Entry(int(match[1]), int(match[2]))
    return entry if entry and entry.name == name else None


def list_entries(root: Path) -> list[Entry]:
    """The committed checkpoints in `root`, oldest first; none where there is no such directory.

    Raises `CheckpointError` where `root` cannot be read.
    """
    try:
        with os.scandir(root) as found:
            entries = [parse_name(one.name) for one in found if one.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{root} cannot be read: {error.strerror}") from error
    return sorted(entry for entry in entries if entry is not None)


def committed(root: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in `root` as absolute paths, oldest first; empty where there is no such directory.

    A checkpoint is in the list as soon as it is committed. Nothing is read from it: see `verify`.
    """
    path = absolute(root)
    return [path / entry.name for entry in list_entries(path)]


def latest(root: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint in `root`, or None."""
    found = committed(root)
    return found[-1] if found else None


def absolute(path: str | os.PathLike[str]) -> Path:
    """`path` from the root of the file system, links left as they are."""
    return Path(os.path.abspath(path))


def make_root(root: Path) -> None:
    """Make `root`, for its owner only, and the directories above it, each durably. One that is there stays as it is."""
    if root.is_dir():
        found = root.stat()
        if stat.S_IMODE(found.st_mode) & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
            logger.warning("everybody may write to %s: anybody can replace the checkpoints in it", root)
        elif found.st_uid not in (os.geteuid(), 0):
            logger.warning("%s belongs to user %d, who can replace the checkpoints in it", root, found.st_uid)
        return
    missing = [root]
    while not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    for path in reversed(missing):
        path.mkdir(mode=DIRECTORY_MODE if path == root else 0o777, exist_ok=True)
        sync_directory(path.parent)


class RootLock:
    """The right to write in `root`, held until `release()`. See [Note: the lock].

    `held` is False where the file system cannot lock. Raises `CheckpointWriteError` where somebody else holds it.
    """

    def __init__(self, root: Path) -> None:
        self._fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.held = True
        except BlockingIOError:
            os.close(self._fd)
            raise CheckpointWriteError(
                f"another process is writing to {root}: let it finish, or give each run a directory of its own"
            ) from None
        except OSError as error:
            if error.errno not in _CANNOT_LOCK:
                os.close(self._fd)
                raise
            self.held = False

    def release(self) -> None:
        """Let others write. Idempotent."""
        if self._fd >= 0:
            # Closing would not do while a child that was forked meanwhile has the descriptor too.
            if self.held:
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
            self._fd = -1


def unique(kind: str, name: str) -> str:
    """A name for a directory that is not a checkpoint: `kind` is `tmp` or `trash`."""
    return f".{kind}-{name}-{secrets.token_hex(8)}"


def sweep(root: Path, locked: bool, current: str) -> None:
    """Delete what dead writers left, but not `current`, just made. What cannot be deleted is logged and left.

    Without the lock, only what is a day older than `current` is taken for dead: both times are the file system's.
    """
    now = os.stat(root / current).st_mtime
    for name in os.listdir(root):
        if name == current or not _DEBRIS.fullmatch(name):
            continue
        try:
            found = os.stat(root / name, follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode) and (locked or found.st_mtime < now - UNLOCKED_DEBRIS_SECONDS):
                shutil.rmtree(root / name)
        except OSError as error:
            logger.warning("%s was left by an earlier save and cannot be deleted: %s", root / name, error)


def remove(root: Path, name: str) -> None:
    """Delete the checkpoint `name`: out of sight by one rename first, so that none is ever seen half-deleted."""
    trash = unique("trash", name)
    os.rename(root / name, root / trash)
    sync_directory(root)
    shutil.rmtree(root / trash)
