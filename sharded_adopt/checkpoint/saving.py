"""Writing a checkpoint: every rank its file, then one rename.

The protocol, in the order that makes it safe to be killed anywhere (docs/checkpoints.md explains each step):

1. every rank looks at what it will write, and all compare what must be the same;
2. rank 0 takes the lock, sweeps debris, and makes `.tmp-…`;
3. every rank writes its file there, with checksums, and fsyncs it;
4. rank 0 sees every file in its size, writes the manifest, fsyncs it and the directory, renames it, fsyncs the root;
5. rank 0 deletes what need not be kept, and tells all.

After each step all ranks learn of every failure and raise the same `CheckpointWriteError`.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import logging
import operator
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from sharded_adopt import __version__
from sharded_adopt.checkpoint.contents import Checkpointable, Contents, collect
from sharded_adopt.checkpoint.errors import CheckpointError, CheckpointWriteError
from sharded_adopt.checkpoint.manifest import (
    CHECKSUM_DIGITS,
    MANIFEST_NAME,
    Manifest,
    digest_of,
    file_name,
    identity_of,
)
from sharded_adopt.checkpoint.plain import dumps
from sharded_adopt.checkpoint.reading import read_manifest
from sharded_adopt.checkpoint.records import StoredFile
from sharded_adopt.checkpoint.retention import Keep, prune_locked
from sharded_adopt.checkpoint.root import Entry, RootLock, absolute, list_entries, make_root, sweep, unique
from sharded_adopt.checkpoint.storage import DIRECTORY_MODE, NewFile, open_directory, sync_names
from sharded_adopt.checkpoint.tensors import byte_views
from sharded_adopt.checkpoint.together import Failure, collectives_for, first_difference, on_all, on_first
from sharded_adopt.sharding.collectives import Collectives

if TYPE_CHECKING:
    import torch.distributed

logger = logging.getLogger("sharded_adopt.checkpoint")

# On a network file system a file that another machine has written may stay unseen for a minute.
VISIBLE_SECONDS = 60.0
_SPACE_MARGIN = 1.02
_KEEP = Keep(last=3)


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that is on the disk: it survives the death of any process from now on.

    `digest` is the hex SHA-256 of its manifest, `nbytes` counts all its files, `seconds` is how long the save took.
    """

    path: Path
    step: int
    digest: str
    nbytes: int
    seconds: float


def save(
    root: str | os.PathLike[str],
    *,
    step: int,
    optimizer: Checkpointable,
    model: nn.Module | None = None,
    extra: Any = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    checksum: str = "crc32",
    keep: Keep | None = _KEEP,
) -> Saved:
    """Write parameters, optimizer state, model, `extra` and random number states to a new checkpoint in `root`.

    Collective: every rank calls it, at the same step. Each writes the segments that it owns; the first one also writes
    the entries of `model.state_dict()` that the optimizer does not hold (buffers, frozen parameters), and `extra`,
    plain JSON (scheduler, position in the data). They all become visible together, by one rename, when all is on the
    disk. Then the checkpoints that `keep` does not ask for are deleted (None: nothing is).

    `root` is made if need be; all ranks must see the same directory. `checksum`, one for every 1 MiB: `crc32` finds
    accidents; with `sha256` the digest also vouches for the contents.

    Raises on every rank: `ValueError` or `TypeError` for arguments that cannot be written, `CheckpointWriteError` with
    the failures by rank where writing failed anywhere. What was there before is then as it was.
    """
    started = time.perf_counter()
    with collectives_for(optimizer.collectives, process_group) as group:
        saving = _Saving(group, absolute(root), checksum, keep)
        digests = on_all(group, lambda: saving.collect(step, optimizer, model, extra), _bad_arguments)
        if len(set(digests)) > 1:
            _raise_difference(on_all(group, saving.shared, write_error))
        return saving.run(started)


class _Saving:
    """One save on one rank."""

    def __init__(self, group: Collectives, root: Path, checksum: str, keep: Keep | None) -> None:
        self._group = group
        self._root = root
        self._checksum = checksum
        self._keep = keep
        self._step = 0
        self._contents: Contents
        self._lock: RootLock | None = None
        self._tmp: str | None = None  # set on rank 0 while it is there to be removed

    def collect(self, step: int, optimizer: Checkpointable, model: nn.Module | None, extra: Any) -> str:
        """Check the arguments and take stock; returns a hash of what must be the same on all ranks."""
        if isinstance(step, bool) or not 0 <= operator.index(step) < 10**18:
            raise ValueError(f"step must be a whole number of at least 0, got {step!r}")
        if self._checksum not in CHECKSUM_DIGITS:
            raise ValueError(f"checksum must be one of {', '.join(CHECKSUM_DIGITS)}, got {self._checksum!r}")
        if not (self._keep is None or isinstance(self._keep, Keep)):
            raise TypeError(f"keep must be a checkpoint.Keep or None, got {type(self._keep).__name__}")
        self._step = operator.index(step)
        self._contents = collect(optimizer, model, extra, self._group.rank == 0)
        return hashlib.sha256(dumps(self.shared())).hexdigest()

    def shared(self) -> dict[str, Any]:
        """What must be the same on all ranks."""
        return {"step": self._step, "checksum": self._checksum, **self._contents.shared()}

    def run(self, started: float) -> Saved:
        """Steps 2 to 5."""
        group = self._group
        try:
            table = self._contents.table()
            nbytes = sum(on_all(group, lambda: len(table.header()) + table.data_nbytes, write_error))
            begun = on_first(group, lambda: self._begin(nbytes), write_error)
            files = on_all(group, lambda: self._write(begun["tmp"]), write_error)
            done = on_first(group, lambda: self._commit(begun, files), write_error)
        finally:
            self._clean_up()
        seconds = time.perf_counter() - started
        return Saved(self._root / done["name"], self._step, done["digest"], done["nbytes"], seconds)

    def _begin(self, nbytes: int) -> dict[str, Any]:
        """Rank 0: make the directory to write to."""
        make_root(self._root)
        self._lock = RootLock(self._root)
        entries = list_entries(self._root)
        counter = entries[-1].counter + 1 if entries else 1
        name = Entry(counter, self._step).name
        tmp = unique("tmp", name)
        os.mkdir(self._root / tmp, DIRECTORY_MODE)
        self._tmp = tmp
        sweep(self._root, self._lock.held, current=tmp)
        _require_space(self._root, nbytes)
        run_id, parent = _parent(self._root, entries)
        return {"tmp": tmp, "counter": counter, "name": name, "run_id": run_id, "parent": parent}

    def _write(self, tmp: str) -> dict[str, Any]:
        """Every rank: write and fsync its file."""
        contents, table = self._contents, self._contents.table()
        name = file_name(self._group.rank, self._group.world_size)
        try:
            with (
                open_directory(self._root) as root_fd,
                open_directory(tmp, dir_fd=root_fd) as fd,
                NewFile(fd, name, self._checksum) as file,
            ):
                file.write(memoryview(table.header()))
                for tensor in table.tensors.values():
                    for view in byte_views(contents.tensors[tensor.name]):
                        file.write(view)
                checksums = file.finish()
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{self._root / tmp} is not there, though rank 0 has made it: is it on a disk that all ranks share?"
            ) from error
        return StoredFile(name, file.nbytes, checksums, contents.segments, contents.rng).to_json()

    def _commit(self, begun: Mapping[str, Any], files: list[Any]) -> dict[str, Any]:
        """Rank 0: make the checkpoint appear."""
        contents = self._contents
        manifest = Manifest(
            counter=begun["counter"],
            step=self._step,
            run_id=begun["run_id"],
            parent=begun["parent"],
            created=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            written_by={"sharded_adopt": __version__, "torch": str(torch.__version__)},
            checksum=self._checksum,
            optimizer=contents.optimizer,
            params=contents.params,
            groups=contents.groups,
            model_tensors=contents.model_tensors,
            model_values=contents.model_values,
            extra=contents.extra,
            files=tuple(StoredFile.from_json(file, f"rank {rank}") for rank, file in enumerate(files)),
        )
        data = manifest.to_bytes()
        with open_directory(self._root) as root_fd:
            with open_directory(begun["tmp"], dir_fd=root_fd) as fd:
                _wait_for(fd, manifest.files)
                with NewFile(fd, MANIFEST_NAME, self._checksum) as file:
                    file.write(memoryview(data))
                    file.finish()
                sync_names(fd)
            entries = list_entries(self._root)
            if entries and entries[-1].counter >= begun["counter"]:
                raise CheckpointError(f"another process has written {entries[-1].name} meanwhile")
            os.rename(begun["tmp"], begun["name"], src_dir_fd=root_fd, dst_dir_fd=root_fd)
            self._tmp = None
            sync_names(root_fd)
        if self._keep is not None:
            try:
                prune_locked(self._root, self._keep)
            except (OSError, CheckpointError) as error:
                logger.warning("an old checkpoint in %s cannot be deleted: %s", self._root, error)
        nbytes = len(data) + sum(one.nbytes for one in manifest.files)
        return {"name": begun["name"], "digest": digest_of(data), "nbytes": nbytes}

    def _clean_up(self) -> None:
        if self._tmp is not None:
            shutil.rmtree(self._root / self._tmp, ignore_errors=True)
        if self._lock is not None:
            self._lock.release()


def _raise_difference(everyone: list[Any]) -> NoReturn:
    """Raise `CheckpointWriteError` naming, for each rank, the first thing that is not as on rank 0."""
    failures: dict[int, Failure] = {}
    for rank, other in enumerate(everyone):
        difference = first_difference(everyone[0], other, "")
        if difference is not None:
            failures[rank] = Failure("ValueError", f"not as on rank 0:{difference} here")
    raise write_error(failures)


def write_error(failures: Mapping[int, Failure]) -> CheckpointWriteError:
    """The exception of a save that failed on these ranks."""
    ranks = {rank: failure.text for rank, failure in failures.items()}
    told = "; ".join(f"rank {rank}: {text}" for rank, text in ranks.items())
    return CheckpointWriteError(f"no checkpoint was written, earlier ones are as they were: {told}", ranks=ranks)


def _bad_arguments(failures: Mapping[int, Failure]) -> Exception:
    """`TypeError` or `ValueError` where a rank was given something wrong; `CheckpointWriteError` for the rest."""
    for rank, failure in failures.items():
        if failure.kind in ("TypeError", "ValueError"):
            return (TypeError if failure.kind == "TypeError" else ValueError)(f"rank {rank}: {failure.text}")
    return write_error(failures)


def _require_space(root: Path, nbytes: int) -> None:
    usage = shutil.disk_usage(root)
    needed = int(nbytes * _SPACE_MARGIN)
    # Some network file systems know no total.
    if usage.total and usage.free < needed:
        raise CheckpointError(
            f"the checkpoint needs {needed} bytes and {root} has {usage.free} free: make room, or keep fewer"
        )


def _parent(root: Path, entries: list[Entry]) -> tuple[str, tuple[int, str] | None]:
    """The run's id, and counter and digest of the newest checkpoint that can be read; a new id where none can."""
    for entry in reversed(entries):
        with contextlib.suppress(CheckpointError):
            run_id, digest = identity_of(read_manifest(root / entry.name))
            return run_id, (entry.counter, digest)
    return os.urandom(8).hex(), None


def _wait_for(dir_fd: int, files: tuple[StoredFile, ...]) -> None:
    """Return when every file is seen in its size."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    for file in files:
        while True:
            size = -1
            with contextlib.suppress(FileNotFoundError):
                size = os.stat(file.name, dir_fd=dir_fd, follow_symlinks=False).st_size
            if size == file.nbytes:
                break
            if time.monotonic() > deadline:
                seen = "no such file" if size < 0 else f"{size} bytes"
                raise CheckpointError(
                    f"{file.name} was written with {file.nbytes} bytes, but rank 0 sees {seen}: is the directory on a "
                    "disk that all ranks share?"
                )
            time.sleep(0.05)
