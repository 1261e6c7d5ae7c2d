"""Files of a checkpoint read back, no byte of them unchecked.

Names are relative to an open directory and are never followed through a link, so what is read lies in that directory
whatever a manifest says.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from sharded_adopt.checkpoint.errors import CheckpointCorrupt, CheckpointError, CheckpointNotFound
from sharded_adopt.checkpoint.manifest import CHECKSUM_DIGITS, CHUNK_NBYTES, MANIFEST_NAME, MAX_MANIFEST_NBYTES
from sharded_adopt.checkpoint.records import StoredFile
from sharded_adopt.checkpoint.storage import checksum_of, empty_view, open_directory


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what the file system says about `name` into a `CheckpointError`."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointCorrupt(f"{name} is missing") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENOTDIR):
            raise CheckpointCorrupt(f"{name} is a link or not what it should be: {error.strerror}") from error
        raise CheckpointError(f"{name} cannot be read: {error.strerror}") from error


def _open_regular(dir_fd: int, name: str) -> tuple[int, int]:
    """Descriptor and size of a regular file."""
    # Without O_NONBLOCK a named pipe that lies there would hang us.
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=dir_fd)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        os.close(fd)
        raise CheckpointCorrupt(f"{name} is not a regular file")
    return fd, found.st_size


def _copy(source: memoryview, into: memoryview) -> None:
    # Python cannot assign between views of ctypes arrays.
    target, origin = ctypes.c_ubyte.from_buffer(into), ctypes.c_ubyte.from_buffer(source)
    ctypes.memmove(ctypes.addressof(target), ctypes.addressof(origin), len(into))


def _fill(fd: int, view: memoryview, start: int, name: str) -> None:
    while len(view):
        count = os.preadv(fd, [view], start)
        if count == 0:
            raise CheckpointCorrupt(f"{name} ends at byte {start}, before it should")
        view, start = view[count:], start + count


def read_manifest(path: Path) -> bytes:
    """The contents of `manifest.json` in the checkpoint at `path`, unchecked but for their size.

    Raises `CheckpointNotFound` where there is no such directory.
    """
    try:
        with open_directory(path) as dir_fd, reading(MANIFEST_NAME):
            fd, size = _open_regular(dir_fd, MANIFEST_NAME)
            try:
                if size > MAX_MANIFEST_NBYTES:
                    raise CheckpointCorrupt(f"{MANIFEST_NAME} has {size} bytes; {MAX_MANIFEST_NBYTES} are the most")
                data = empty_view(size)
                _fill(fd, data, 0, MANIFEST_NAME)
                return bytes(data)
            finally:
                os.close(fd)
    except FileNotFoundError:
        raise CheckpointNotFound(f"there is no checkpoint at {path}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def check_files(dir_fd: int, files: Sequence[StoredFile]) -> None:
    """Check that the directory holds these files in their size, the manifest, and nothing else.

    Raises `CheckpointCorrupt` naming everything that is not so.
    """
    with reading("the directory"):
        present = set(os.listdir(dir_fd))
    problems = [
        f"{name} is not in the manifest" for name in sorted(present - {MANIFEST_NAME, *(f.name for f in files)})
    ]
    for file in files:
        if file.name not in present:
            problems.append(f"{file.name} is missing")
            continue
        with reading(file.name):
            size = os.stat(file.name, dir_fd=dir_fd, follow_symlinks=False).st_size
        if size != file.nbytes:
            problems.append(f"{file.name} has {size} bytes instead of {file.nbytes}")
    if problems:
        raise CheckpointCorrupt("; ".join(problems))


class CheckedFile:
    """A file of a checkpoint, from which no byte comes that its checksum does not vouch for.

    Raises `CheckpointCorrupt` where the file is missing, no regular file, or of another size than stated.
    """

    def __init__(self, dir_fd: int, file: StoredFile, checksum: str) -> None:
        with reading(file.name):
            self._fd, size = _open_regular(dir_fd, file.name)
        self._file = file
        self._checksum = checksum
        self._spare = empty_view(min(CHUNK_NBYTES, file.nbytes))
        if size != file.nbytes:
            self.close()
            raise CheckpointCorrupt(f"{file.name} has {size} bytes instead of {file.nbytes}")

    def read(self, wanted: Iterable[tuple[int, memoryview]]) -> None:
        """Fill each view from its place (in bytes) in the file.

        Only the chunks that a view touches are read. Raises `CheckpointCorrupt` at the first wrong checksum; what is in
        the views then is not to be used.
        """
        parts: dict[int, list[tuple[int, memoryview]]] = {}
        for start, view in wanted:
            assert 0 <= start <= self._file.nbytes - len(view)
            while len(view):
                index, inside = divmod(start, CHUNK_NBYTES)
                piece = view[: CHUNK_NBYTES - inside]
                parts.setdefault(index, []).append((inside, piece))
                view, start = view[len(piece) :], start + len(piece)
        for index in sorted(parts):
            self._read_chunk(index, parts[index])

    def check(self) -> None:
        """Check every chunk."""
        for index in range(-(-self._file.nbytes // CHUNK_NBYTES)):
            self._read_chunk(index, [])

    def _read_chunk(self, index: int, parts: list[tuple[int, memoryview]]) -> None:
        nbytes = min(CHUNK_NBYTES, self._file.nbytes - index * CHUNK_NBYTES)
        whole = len(parts) == 1 and len(parts[0][1]) == nbytes
        chunk = parts[0][1] if whole else self._spare[:nbytes]
        with reading(self._file.name):
            _fill(self._fd, chunk, index * CHUNK_NBYTES, self._file.name)
        digits = CHECKSUM_DIGITS[self._checksum]
        if checksum_of(self._checksum, [chunk]) != self._file.checksums[index * digits : (index + 1) * digits]:
            raise CheckpointCorrupt(
                f"{self._file.name}: chunk {index} (bytes {index * CHUNK_NBYTES} to {index * CHUNK_NBYTES + nbytes}) "
                f"does not have its {self._checksum} checksum"
            )
        if not whole:
            for inside, view in parts:
                _copy(chunk[inside : inside + len(view)], view)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def __enter__(self) -> CheckedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
