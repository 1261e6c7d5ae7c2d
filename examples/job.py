"""Start a torchrun job on this machine, and end all of it with SIGKILL, as a power cut would."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any


class Job:
    """`torchrun --standalone --nproc-per-node ranks script arguments…`, started at once, killed on leaving `with`."""

    def __init__(
        self,
        ranks: int,
        script: Path,
        arguments: Sequence[str] = (),
        *,
        torchrun: Sequence[str] = (),
        output: IO[Any] | None = None,
        directory: Path | None = None,
    ) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        # torchrun sets one thread a process and warns about it, unless somebody has decided already.
        threads = max(1, (os.cpu_count() or 1) // ranks)
        self.process = subprocess.Popen(
            [*command, *torchrun, str(script), *arguments],
            env={"OMP_NUM_THREADS": str(threads), **os.environ},
            cwd=directory,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
        )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait(self, timeout: float) -> int:
        """Wait for the job and return its exit code; raises `subprocess.TimeoutExpired` after `timeout` seconds."""
        return self.process.wait(timeout)

    def running(self) -> bool:
        """Say whether the agent of torchrun is still there."""
        return self.process.poll() is None

    def kill(self) -> list[int]:
        """SIGKILL the agent and everything below it; return the ids that were killed, when they are gone.

        Each worker of torchrun leads a session of its own, so a signal to one process group would miss them, and a
        killed agent does not take its workers along.
        """
        if not self.running():
            return []
        doomed = [self.process.pid, *descendants(self.process.pid)]
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        deadline = time.monotonic() + 10
        while any(alive(pid) for pid in doomed[1:]):
            if time.monotonic() > deadline:
                raise RuntimeError(f"some of {doomed} are still alive 10 s after SIGKILL")
            time.sleep(0.01)
        return doomed


def descendants(pid: int) -> list[int]:
    """Return the ids of all processes below `pid`, parents before children."""
    children: dict[int, list[int]] = {}
    for child, parent in _parents():
        children.setdefault(parent, []).append(child)
    found: list[int] = []
    level = [pid]
    while level:
        level = [child for parent in level for child in children.get(parent, [])]
        found += level
    return found


def _parents() -> list[tuple[int, int]]:
    """Return (process, parent) for all processes: from /proc, or from ps where there is no /proc."""
    if not Path("/proc/self/stat").exists():
        listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], check=True, capture_output=True, text=True).stdout
        return [(int(pid), int(parent)) for pid, parent in (line.split() for line in listing.splitlines())]
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended while we looked
            # "pid (name) state parent …", and the name may hold spaces and brackets
            found.append((int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])))
    return found


def alive(pid: int) -> bool:
    """Say whether `pid` still runs; a zombie waiting for its new parent to notice does not."""
    try:
        if Path("/proc/self/stat").exists():
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        os.kill(pid, 0)
    except (OSError, ProcessLookupError):
        return False
    return True
