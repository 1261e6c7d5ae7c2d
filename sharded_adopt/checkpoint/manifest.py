"""The manifest: everything about a checkpoint but the elements.

`manifest.json` is one JSON object, a newline, the lower-case hex SHA-256 of all bytes before it, and a newline. That
hex is the checkpoint's digest. What each field means stands in docs/checkpoints.md; here it is read and written.

A `Manifest` that exists is consistent: names are unique, ranges lie inside their parameters and cover every element
once, and every list has the length that the others ask for. Whoever holds one need not check again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sharded_adopt.checkpoint.errors import CheckpointCorrupt, CheckpointMismatch
from sharded_adopt.checkpoint.plain import Fields, dumps, from_plain, loads, to_plain
from sharded_adopt.checkpoint.records import StoredFile, StoredGroup, StoredParam, StoredTensor
from sharded_adopt.sharding.layout import StoredRange, reshard_plan

FORMAT = "sharded_adopt checkpoint"
VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_NBYTES = 64 << 20
CHUNK_NBYTES = 1 << 20
# checksum -> hex digits of one
CHECKSUM_DIGITS = {"crc32": 8, "sha256": 64}
_DIGEST_NBYTES = 65  # 64 hex digits and a newline
_HEX = re.compile(r"[0-9a-f]*")


def file_name(rank: int, world_size: int) -> str:
    """The name of the file of `rank`."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


@dataclass(frozen=True, slots=True)
class Manifest:
    """A checkpoint without its elements. Raises `ValueError` where its parts contradict each other.

    `parent` is (counter, digest) of the checkpoint that was the newest when this one was written. `ranges` tells which
    files hold which elements of each parameter, by name.
    """

    counter: int
    step: int
    run_id: str
    parent: tuple[int, str] | None
    created: str
    written_by: Mapping[str, Any]
    checksum: str
    optimizer: str | None
    params: tuple[StoredParam, ...]
    groups: tuple[StoredGroup, ...]
    model_tensors: tuple[StoredTensor, ...]
    model_values: Mapping[str, Any]
    extra: Any
    files: tuple[StoredFile, ...]
    ranges: Mapping[str, tuple[StoredRange, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.checksum not in CHECKSUM_DIGITS:
            raise ValueError(f"checksum must be one of {', '.join(CHECKSUM_DIGITS)}, got {self.checksum!r}")
        names = [param.name for param in self.params]
        _refuse_repeated("parameter", names)
        _refuse_repeated("model entry", [*(tensor.name for tensor in self.model_tensors), *self.model_values])
        if sorted(name for group in self.groups for name in group.params) != sorted(names):
            raise ValueError("the groups do not hold every parameter once")
        if not self.files:
            raise ValueError("it lists no file")
        for rank, file in enumerate(self.files):
            if file.name != file_name(rank, self.world_size):
                raise ValueError(f"file {rank} must be called {file_name(rank, self.world_size)}, got {file.name!r}")
            chunks = -(-file.nbytes // CHUNK_NBYTES)
            if len(file.checksums) != chunks * CHECKSUM_DIGITS[self.checksum] or not _HEX.fullmatch(file.checksums):
                raise ValueError(f"{file.name} needs {chunks} checksums in hex for its {file.nbytes} bytes")
        object.__setattr__(self, "ranges", _cover(self.params, self.files))

    @property
    def world_size(self) -> int:
        """How many ranks wrote it."""
        return len(self.files)

    def to_json(self) -> dict[str, Any]:
        """Plain data, as it stands in the file."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "counter": self.counter,
            "step": self.step,
            "run_id": self.run_id,
            "parent": None if self.parent is None else {"counter": self.parent[0], "digest": self.parent[1]},
            "created": self.created,
            "written_by": dict(self.written_by),
            "world_size": self.world_size,
            "checksum": self.checksum,
            "chunk_nbytes": CHUNK_NBYTES,
            "optimizer": self.optimizer,
            "params": [param.to_json() for param in self.params],
            "groups": [group.to_json() for group in self.groups],
            "model": {
                "tensors": [tensor.to_json() for tensor in self.model_tensors],
                "values": to_plain(self.model_values, "model"),
            },
            "extra": to_plain(self.extra, "extra"),
            "files": [file.to_json() for file in self.files],
        }

    def to_bytes(self) -> bytes:
        """The contents of `manifest.json`. Raises `ValueError` where they would be larger than a reader accepts."""
        text = dumps(self.to_json()) + b"\n"
        if len(text) + _DIGEST_NBYTES > MAX_MANIFEST_NBYTES:
            raise ValueError(
                f"the manifest would have {len(text)} bytes, and {MAX_MANIFEST_NBYTES} are the most: store less in "
                "`extra`, or use checksum='crc32', which needs an eighth of the space of 'sha256'"
            )
        return text + hashlib.sha256(text).hexdigest().encode() + b"\n"


def digest_of(data: bytes) -> str:
    """The digest at the end of `manifest.json`. Raises `CheckpointCorrupt` where it is not that of the bytes before."""
    text, stated = data[:-_DIGEST_NBYTES], data[-_DIGEST_NBYTES:]
    found = hashlib.sha256(text).hexdigest()
    if not text.endswith(b"\n") or stated != found.encode() + b"\n":
        raise CheckpointCorrupt(f"{MANIFEST_NAME} is damaged: its SHA-256 is not the one that it ends with")
    return found


def identity_of(data: bytes) -> tuple[str, str]:
    """The run's id and the digest, without reading the rest. Raises `CheckpointCorrupt`."""
    digest = digest_of(data)
    try:
        return Fields(loads(data[:-_DIGEST_NBYTES]), "the manifest").text("run_id"), digest
    except ValueError as error:
        raise CheckpointCorrupt(f"{MANIFEST_NAME} is not valid: {error}") from error


def parse_manifest(data: bytes) -> Manifest:
    """Read the contents of `manifest.json`.

    Raises `CheckpointCorrupt` where they are damaged or contradict themselves, `CheckpointMismatch` where a later
    version of the format wrote them.
    """
    digest_of(data)
    try:
        fields = Fields(loads(data[:-_DIGEST_NBYTES]), "the manifest")
        if fields.text("format") != FORMAT:
            raise ValueError(f"'format' must be {FORMAT!r}, got {fields.text('format')!r}")
        version = fields.count("version")
        if version == VERSION:
            return _manifest(fields)
    except ValueError as error:
        raise CheckpointCorrupt(f"{MANIFEST_NAME} is not valid: {error}") from error
    raise CheckpointMismatch(
        f"the checkpoint has format version {version}, and this sharded_adopt reads version {VERSION}: use the one "
        "that wrote it, or a later one"
    )


def _manifest(fields: Fields) -> Manifest:
    model = Fields(fields.object("model"), "model")
    files = fields.list("files", StoredFile.from_json)
    if fields.count("world_size") != len(files):
        raise ValueError(f"world_size is {fields.count('world_size')}, but there are {len(files)} files")
    if fields.count("chunk_nbytes") != CHUNK_NBYTES:
        raise ValueError(f"chunk_nbytes must be {CHUNK_NBYTES}, got {fields.count('chunk_nbytes')}")
    parent = fields.any("parent")
    if parent is not None:
        of_parent = Fields(parent, "parent")
        parent = (of_parent.count("counter"), of_parent.text("digest"))
    return Manifest(
        counter=fields.count("counter"),
        step=fields.count("step"),
        run_id=fields.text("run_id"),
        parent=parent,
        created=fields.text("created"),
        written_by=fields.object("written_by"),
        checksum=fields.text("checksum"),
        optimizer=None if fields.any("optimizer") is None else fields.text("optimizer"),
        params=fields.list("params", StoredParam.from_json),
        groups=fields.list("groups", StoredGroup.from_json),
        model_tensors=model.list("tensors", StoredTensor.from_json),
        model_values=model.plain("values"),
        extra=from_plain(fields.any("extra")),
        files=files,
    )


def _refuse_repeated(what: str, names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"it lists the {what} {name!r} more than once")
        seen.add(name)


def _cover(params: Sequence[StoredParam], files: Sequence[StoredFile]) -> dict[str, tuple[StoredRange, ...]]:
    """Which file holds which range of each parameter. Raises `ValueError` unless every element is there once."""
    found: list[list[StoredRange]] = [[] for _ in params]
    for source, file in enumerate(files):
        before = -1
        for one in file.segments:
            if not before < one.param < len(params) or not one.start < one.stop <= params[one.param].numel:
                raise ValueError(f"{file.name}: segment {one.to_json()} is out of order or out of bounds")
            found[one.param].append(StoredRange(source, one.start, one.stop))
            before = one.param
    for param, ranges in zip(params, found, strict=True):
        try:
            reshard_plan(ranges, 0, param.numel)
        except ValueError as error:
            raise ValueError(f"parameter {param.name!r}: {error}") from error
    return {param.name: tuple(ranges) for param, ranges in zip(params, found, strict=True)}
