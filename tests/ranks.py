"""Real gloo ranks for tests, cheap enough for thousands of cases."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import os
import pickle
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class RanksFailed(AssertionError):
    """A rank raised, died or hung; the message holds every such rank's traceback."""


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """Run `fn(rank, world_size, *args)` on `world_size` gloo ranks and return their results, by rank.

    The ranks are forked (torch is imported once), meet through a file, talk over the loopback interface and have one
    thread each. After `timeout` seconds every rank is made to write its stack and is killed. The first rank that raises
    ends the others after two seconds: long enough for them to report what they saw.

    Raises `RanksFailed` with the tracebacks. Results travel as pickles through a pipe.
    """
    with tempfile.TemporaryDirectory() as directory:
        ranks = [_Rank(rank, world_size, fn, args, Path(directory), timeout) for rank in range(world_size)]
        try:
            deadline = time.monotonic() + timeout
            while pending := [r for r in ranks if not r.ended]:
                left = deadline - time.monotonic()
                if left <= 0:
                    for rank in pending:
                        rank.dump_stack()
                    break
                readable, _, _ = select.select([r.pipe for r in pending], [], [], left)
                for rank in pending:
                    if rank.pipe in readable:
                        rank.read()
                        if rank.failure is not None:
                            deadline = min(deadline, time.monotonic() + 2.0)
        finally:
            for rank in ranks:
                rank.end()
        failures = [f"--- rank {r.rank} of {world_size} ---\n{r.failure}" for r in ranks if r.failure is not None]
        if failures:
            raise RanksFailed("\n".join(failures))
        return [r.result for r in ranks]


class _Rank:
    """One forked process and what is known of it."""

    def __init__(
        self, rank: int, world_size: int, fn: Callable[..., Any], args: tuple[Any, ...], directory: Path, timeout: float
    ) -> None:
        self.rank = rank
        self.result: Any = None
        self.failure: str | None = None
        self.ended = False
        self.stack = directory / f"stack-{rank}"
        self._received = b""
        sys.stdout.flush()
        sys.stderr.flush()
        self.pipe, write_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.pipe)
            _child(rank, world_size, fn, args, directory, timeout, write_end, self.stack)
        os.close(write_end)

    def read(self) -> None:
        data = os.read(self.pipe, 1 << 20)
        self._received += data
        if data:
            return
        self.ended = True
        if not self._received:
            _, status = os.waitpid(self.pid, 0)
            self.pid = 0
            self.failure = f"ended without a result, exit code {os.waitstatus_to_exitcode(status)}"
            return
        good, value = pickle.loads(self._received)
        if good:
            self.result = value
        else:
            self.failure = value

    def dump_stack(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)
        time.sleep(0.2)
        stack = self.stack.read_text() if self.stack.exists() else "(no stack)"
        self.failure = f"did not end in time; it was here:\n{stack}"

    def end(self) -> None:
        os.close(self.pipe)
        if self.pid:
            if not self.ended:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        if not self.ended and self.failure is None:
            self.failure = "was still running when another rank failed"


def _child(
    rank: int,
    world_size: int,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    directory: Path,
    timeout: float,
    write_end: int,
    stack: Path,
) -> None:
    """The life of a rank: never returns, never runs the parent's exit handlers."""
    code = 1
    try:
        with stack.open("w") as stack_file:
            faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            torch.set_num_threads(1)
            try:
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{directory}/rendezvous",
                    rank=rank,
                    world_size=world_size,
                    timeout=datetime.timedelta(seconds=timeout),
                )
                message = pickle.dumps((True, fn(rank, world_size, *args)))
                code = 0
            except BaseException:
                message = pickle.dumps((False, traceback.format_exc()))
            with open(write_end, "wb") as pipe:
                pipe.write(message)
            if code == 0:
                dist.destroy_process_group()
    finally:
        os._exit(code)
