"""Files: written once with a checksum for every 1 MiB, and read back no byte unchecked.

Names are relative to an open directory and are never followed through a link, so what is read or written lies in that
directory whatever a manifest says.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import stat
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from sharded_adopt.checkpoint.errors import CheckpointCorrupt, CheckpointError, CheckpointNotFound
from sharded_adopt.checkpoint.manifest import CHECKSUM_DIGITS, CHUNK_NBYTES, MANIFEST_NAME, MAX_MANIFEST_NBYTES
from sharded_adopt.checkpoint.records import StoredFile

DIRECTORY_MODE = 0o700
FILE_MODE = 0o600
_WRITE_NBYTES = 8 << 20  # handed to the kernel at once
_WRITE_VIEWS = 512  # well below the 1024 that writev takes
_HASHES_AHEAD = 8  # lots of as much: what a hash slower than the disk may keep in memory


def empty_view(nbytes: int) -> memoryview:
    """Memory of `nbytes` bytes, a view of the same kind as those of tensors."""
    return memoryview((ctypes.c_ubyte * nbytes)())


@contextlib.contextmanager
def open_directory(path: Path | str, dir_fd: int | None = None) -> Iterator[int]:
    """A descriptor of the directory `path`; relative to `dir_fd` if given, and then not through a link."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if dir_fd is None else os.O_NOFOLLOW)
    fd = os.open(path, flags, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def sync_directory(path: Path | str) -> None:
    """Return when the names in that directory are on the disk."""
    with open_directory(path) as fd:
        sync_names(fd)


def sync_names(dir_fd: int) -> None:
    """`sync_directory` by descriptor. A file system that knows no such thing (SMB) says EINVAL, and is left alone."""
    try:
        os.fsync(dir_fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def checksum_of(kind: str, views: Iterable[memoryview]) -> str:
    """The hex checksum of `views`, one behind the other. Other threads run meanwhile."""
    if kind == "crc32":
        value = 0
        for view in views:
            value = zlib.crc32(view, value)
        return f"{value:08x}"
    assert kind == "sha256"
    hasher = hashlib.sha256()
    for view in views:
        hasher.update(view)
    return hasher.hexdigest()


def _start_writeback(fd: int, start: int, nbytes: int) -> None:
    """Let the disk begin with what has just been written, so that `fsync` finds most of it done.

    On Linux "not needed" starts the writing of dirty pages and drops clean ones, of which there are none yet. 0.8 GB
    with checksums took 0.35 s instead of 0.56 s, plain `write` and `fsync` of the same bytes 0.43 s.
    """
    if nbytes and hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, start, nbytes, os.POSIX_FADV_DONTNEED)


def _checksums_of(kind: str, chunks: Iterable[Iterable[memoryview]]) -> str:
    return "".join(checksum_of(kind, chunk) for chunk in chunks)


class NewFile:
    """A file that did not exist, written front to back; `finish()` makes it durable.

    What is written is not copied: views of a tensor go to the kernel and to the checksum, which a thread of its own
    computes. They must not change before `finish()`. Left by an exception, the file is closed as it is.
    """

    def __init__(self, dir_fd: int, name: str, checksum: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(name, flags, FILE_MODE, dir_fd=dir_fd)
        self._checksum = checksum
        self._hasher = ThreadPoolExecutor(1, "checksums")
        self._hashing: deque[Future[str]] = deque()
        self._hashes: list[str] = []
        self._chunk: list[memoryview] = []  # of the chunk under way
        self._chunks: list[list[memoryview]] = []  # complete, not being hashed yet
        self._unwritten: list[memoryview] = []
        self._unwritten_nbytes = 0
        self.nbytes = 0

    def write(self, view: memoryview) -> None:
        """Append the bytes of `view`."""
        while len(view):
            room = CHUNK_NBYTES - self.nbytes % CHUNK_NBYTES
            piece, view = view[:room], view[room:]
            self._chunk.append(piece)
            self._unwritten.append(piece)
            self._unwritten_nbytes += len(piece)
            self.nbytes += len(piece)
            if len(piece) == room:
                self._chunks.append(self._chunk)
                self._chunk = []
            if self._unwritten_nbytes >= _WRITE_NBYTES or len(self._unwritten) >= _WRITE_VIEWS:
                self._flush()

    def finish(self) -> str:
        """Put everything on the disk and return the checksums, one behind the other."""
        if self._chunk:
            self._chunks.append(self._chunk)
        self._flush()
        os.fsync(self._fd)
        self._hashes.extend(hashing.result() for hashing in self._hashing)
        return "".join(self._hashes)

    def _flush(self) -> None:
        self._hashing.append(self._hasher.submit(_checksums_of, self._checksum, self._chunks))
        self._chunks = []
        while len(self._hashing) > _HASHES_AHEAD:
            self._hashes.append(self._hashing.popleft().result())
        views = deque(self._unwritten)
        while views:
            written = os.writev(self._fd, views)
            while views and written >= len(views[0]):
                written -= len(views.popleft())
            if written:
                views[0] = views[0][written:]
        _start_writeback(self._fd, self.nbytes - self._unwritten_nbytes, self._unwritten_nbytes)
        self._unwritten, self._unwritten_nbytes = [], 0

    def __enter__(self) -> NewFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hasher.shutdown(cancel_futures=True)
        os.close(self._fd)


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
