"""One checkpoint on the disk: found, described, verified; no process group, no optimizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import safetensors

from sharded_adopt.checkpoint.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointMismatch,
    CheckpointNotFound,
)
from sharded_adopt.checkpoint.manifest import MANIFEST_NAME, Manifest, digest_of, parse_manifest
from sharded_adopt.checkpoint.plain import from_plain
from sharded_adopt.checkpoint.reading import CheckedFile, check_files, read_manifest
from sharded_adopt.checkpoint.root import absolute, list_entries, parse_name
from sharded_adopt.checkpoint.staging import table_of
from sharded_adopt.checkpoint.storage import open_directory


class Candidate(NamedTuple):
    """A checkpoint by its name in a root; None where the path that was given is the checkpoint itself."""

    name: str | None

    def path(self, root: Path) -> Path:
        """Its directory."""
        return root if self.name is None else root / self.name


def find_candidates(path: Path) -> list[Candidate]:
    """The checkpoint at `path`, or those in it, oldest first. Raises `CheckpointNotFound` where there is none."""
    try:
        if path.is_dir() and (parse_name(path.name) or (path / MANIFEST_NAME).exists()):
            return [Candidate(None)]
        exists = path.exists()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    found = [Candidate(entry.name) for entry in list_entries(path)]
    if not found:
        where = "the directory holds none" if exists else "the directory does not exist"
        raise CheckpointNotFound(f"there is no checkpoint in {path}: {where}")
    return found


def all_checkpoints(path: str | os.PathLike[str]) -> list[Path]:
    """The checkpoint at `path`, or those in it, oldest first. Raises `CheckpointNotFound` where there is none."""
    root = absolute(path)
    return [candidate.path(root) for candidate in find_candidates(root)]


def read_checked(path: Path, expect_digest: str | None = None) -> tuple[bytes, Manifest]:
    """The manifest of the checkpoint at `path`, as bytes and read, when its files are there in their sizes.

    Raises `CheckpointCorrupt` where it is damaged, belongs to a directory of another name, or files are missing or too
    many; `CheckpointMismatch` where it has another digest than `expect_digest` or a later format.
    """
    data = read_manifest(path)
    digest = digest_of(data)
    if expect_digest is not None and digest != expect_digest.strip().lower():
        raise CheckpointMismatch(f"{path} has digest {digest}, expected {expect_digest}")
    manifest = parse_manifest(data)
    entry = parse_name(path.name)
    if entry is not None and entry != (manifest.counter, manifest.step):
        raise CheckpointCorrupt(
            f"its manifest is that of counter {manifest.counter}, step {manifest.step}: the directory was renamed or "
            "the manifest swapped"
        )
    with open_directory(path) as dir_fd:
        check_files(dir_fd, manifest.files)
    return data, manifest


def verify(path: str | os.PathLike[str], *, expect_digest: str | None = None) -> str:
    """Read every byte of the checkpoint at `path` (or the newest in it), check it, and return its digest.

    Raises `CheckpointNotFound`; `CheckpointCorrupt` for wrong checksums and sizes, missing and unlisted files, and a
    manifest that is damaged or contradicts a file; `CheckpointMismatch` for another digest than `expect_digest`;
    `CheckpointError` where the file system refuses.
    """
    checkpoint = all_checkpoints(path)[-1]
    data, manifest = read_checked(checkpoint, expect_digest)
    with open_directory(checkpoint) as dir_fd:
        for index, stored in enumerate(manifest.files):
            with CheckedFile(dir_fd, stored, manifest.checksum) as file:
                file.check()
                table = table_of(manifest, index)
                table.check_header(file, stored.nbytes, stored.name)
            # What we accept must also be what other programs accept.
            _check_with_library(checkpoint / stored.name, set(table.tensors))
    return digest_of(data)


def _check_with_library(path: Path, names: set[str]) -> None:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found = set(file.keys())
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointCorrupt(f"{path.name} is not a safetensors file: {error}") from error
    if found != names:
        raise CheckpointCorrupt(f"{path.name}: the safetensors library finds other tensors in it")


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the checkpoint at `path` (or the newest in it) says of itself, as plain data; no element is read.

    It is the manifest without the checksums, with `path`, `digest` and `nbytes` (of all files). Raises as `verify`, but
    sees damage only in the manifest and in the number and sizes of the files.
    """
    checkpoint = all_checkpoints(path)[-1]
    data, manifest = read_checked(checkpoint)
    described: dict[str, Any] = from_plain(manifest.to_json())
    for file in described["files"]:
        del file["checksums"]
    nbytes = len(data) + sum(file.nbytes for file in manifest.files)
    return {"path": str(checkpoint), "digest": digest_of(data), "nbytes": nbytes, **described}
