"""A save may be killed, or fail, at any moment: nothing acknowledged is lost, and nothing half-made is ever seen."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from checkpointing import PlainOptimizer, Spec, tree
from ranks import RanksFailed, run_ranks

from sharded_adopt import checkpoint
from sharded_adopt.checkpoint import root as root_module
from sharded_adopt.checkpoint import saving
from sharded_adopt.checkpoint.root import RootLock
from sharded_adopt.sharding.collectives import Collectives

SMALL = (Spec("weight", (9, 3)), Spec("bias", (3,)))
KEEP = checkpoint.Keep(last=2)
TRACED = ("open", "mkdir", "writev", "fsync", "rename", "unlink", "rmdir", "scandir", "listdir", "stat")


class Tracer:
    """Counts this process's calls into the file system and does something before one of them."""

    def __init__(self, at: int | None, do: Callable[[], None]) -> None:
        self.calls: list[str] = []
        self._at = at
        self._do = do
        self._originals = {name: getattr(os, name) for name in TRACED} | {"flock": fcntl.flock}

    def __enter__(self) -> Tracer:
        for name, original in self._originals.items():
            setattr(fcntl if name == "flock" else os, name, self._wrap(name, original))
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals.items():
            setattr(fcntl if name == "flock" else os, name, original)

    def _wrap(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            number = len(self.calls)
            self.calls.append(name)
            if number == self._at:
                self._do()
            return original(*args, **kwargs)

        return call


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fail() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def _save(root: Path, seed: int, ranks: Collectives | None = None) -> checkpoint.Saved:
    optimizer = PlainOptimizer(SMALL, seed=seed, collectives=ranks)
    return checkpoint.save(root, step=seed, optimizer=optimizer, keep=KEEP)


def _prepare(root: Path) -> None:
    """Two checkpoints, the older of which the next save will prune, and debris, which it will sweep."""
    for seed in (1, 2):
        _save(root, seed)
    (root / ".tmp-ckpt-00000001-step-000000000001-0123456789abcdef").mkdir()
    (root / ".trash-ckpt-00000001-step-000000000001-0123456789abcdef").mkdir()


def _traced_save(rank: int, world_size: int, root: Path) -> list[str]:
    with Tracer(None, _die) as tracer:
        _save(root, 3)
    return tracer.calls


def _killed_save(rank: int, world_size: int, root: Path, who: int, at: int) -> None:
    report = root.parent / f"report-{rank}"
    with Tracer(at if rank == who else None, _die):
        try:
            _save(root, 3)
            report.write_text("saved")
        except Exception as error:
            report.write_text(type(error).__name__)
            raise


def _check_after_crash(root: Path, acknowledged: int, written: int) -> None:
    """What is committed is good; the newest is one that was acknowledged, or a later one; the next save cleans up."""
    found = checkpoint.committed(root)
    for path in found:
        checkpoint.verify(path)
    optimizer = PlainOptimizer(SMALL)
    loaded = checkpoint.load(root, optimizer=optimizer)
    assert loaded.skipped == []
    assert acknowledged <= loaded.step <= written
    optimizer.assert_holds(loaded.step)
    # Pruning comes after the commit.
    assert len(found) >= KEEP.last
    _save(root, written + 1)
    assert [path.name for path in root.iterdir() if not path.name.startswith("ckpt-")] == []


def test_killed_before_any_call_into_the_file_system_a_save_loses_nothing(tmp_path: Path) -> None:
    # T22
    (tmp_path / "0").mkdir()
    template = tmp_path / "template"
    _prepare(template)
    shutil.copytree(template, tmp_path / "0" / "root")
    calls = run_ranks(2, _traced_save, tmp_path / "0" / "root")
    points = [(rank, at) for rank in (0, 1) for at in range(len(calls[rank]))]
    names = {calls[rank][at] for rank, at in points}
    assert names >= {"flock", "mkdir", "open", "writev", "fsync", "rename", "unlink", "rmdir"}
    assert len(points) >= 24
    survivors = set()
    for number, (who, at) in enumerate(points, start=1):
        root = tmp_path / str(number) / "root"
        shutil.copytree(template, root)
        started = time.monotonic()
        with contextlib.suppress(RanksFailed):
            run_ranks(2, _killed_save, root, who, at, timeout=20)
        assert time.monotonic() - started < 10, f"rank {who} killed before call {at} ({calls[who][at]})"
        reports = [root.parent / f"report-{rank}" for rank in (0, 1)]
        assert not reports[who].exists()
        survivor = reports[1 - who].read_text()
        survivors.add(survivor)
        _check_after_crash(root, acknowledged=3 if survivor == "saved" else 2, written=3)
        shutil.rmtree(root.parent)
    # Whoever is left hears of it, unless all was over.
    assert survivors <= {"saved", "CheckpointWriteError"}
    assert "CheckpointWriteError" in survivors


def _save_until_killed(rank: int, world_size: int, root: Path, who: tuple[int, ...], after: float) -> None:
    optimizer = PlainOptimizer(SMALL)
    loaded = checkpoint.load(root, optimizer=optimizer)
    assert loaded.skipped == []
    optimizer.assert_holds(loaded.step)
    acknowledged = os.open(root.parent / "acknowledged", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if rank in who:
        # With the handler taken away (pytest has one), the kernel ends the process wherever it is.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, after)
    for step in range(loaded.step + 1, loaded.step + 1000):
        _save(root, step, optimizer.collectives)
        os.write(acknowledged, f"{step}\n".encode())


def test_killed_at_random_moments_saves_lose_nothing(tmp_path: Path) -> None:
    root = tmp_path / "root"
    _save(root, 1)
    numbers = random.Random(0)
    half_written = 0
    for _ in range(40):
        who = numbers.choice([(0,), (1,), (0, 1)])
        with pytest.raises(RanksFailed):
            run_ranks(2, _save_until_killed, root, who, numbers.uniform(0.002, 0.1), timeout=30)
        half_written += any(path.name.startswith(".tmp-") for path in root.iterdir())
        acknowledged = tmp_path / "acknowledged"
        steps = [int(line) for line in acknowledged.read_text().split()] if acknowledged.exists() else [1]
        newest = checkpoint.latest(root)
        assert newest is not None
        assert int(newest.name[-12:]) >= max(steps, default=1)
        for path in checkpoint.committed(root):
            checkpoint.verify(path)
    # The moments did fall into saves.
    assert half_written >= 5


def _failing_saves(rank: int, world_size: int, root: Path, who: int) -> list[str]:
    outcomes: list[str] = []
    ranks = Collectives()
    while True:
        seed = 3 + len(outcomes)
        before = tree(root)
        with Tracer(len(outcomes) if rank == who else None, _fail) as tracer:
            try:
                _save(root, seed, ranks)
                outcome, blamed = "saved", []
            except checkpoint.CheckpointWriteError as error:
                outcome, blamed = str(error), list(error.ranks)
        assert outcome == "saved" or (blamed == [who] and "Input/output error" in outcome)
        heard = ranks.all_gather_json([outcome, rank != who or len(tracer.calls) > len(outcomes)])
        assert len({text for text, _ in heard}) == 1, heard
        if not all(reached for _, reached in heard):
            return outcomes
        if rank == 0:
            after = tree(root)
            gone = [name for name in before if name not in after and name.startswith("ckpt-")]
            new = {name.split("/")[0] for name in after if name not in before}
            if outcome == "saved":
                assert any(name.endswith(f"-step-{seed:012d}") for name in new)
            else:
                assert not gone
                # Only a checkpoint that could not be made durable in the very last call may be there.
                assert all(name.startswith("ckpt-") for name in new), (new, outcome)
            for path in checkpoint.committed(root):
                checkpoint.verify(path)
        outcomes.append(outcome)


@pytest.mark.parametrize("who", [0, 1])
def test_an_error_at_any_call_is_the_same_on_all_ranks_and_training_goes_on(tmp_path: Path, who: int) -> None:
    # T31
    root = tmp_path / "root"
    _prepare(root)
    outcomes = run_ranks(2, _failing_saves, root, who)[0]
    failed = [outcome for outcome in outcomes if outcome != "saved"]
    assert len(failed) >= (12 if who == 0 else 4)
    optimizer = PlainOptimizer(SMALL)
    optimizer_step = checkpoint.load(root, optimizer=optimizer).step
    optimizer.assert_holds(optimizer_step)


def _full_disk(rank: int, world_size: int, root: Path, how: str) -> str:
    original_open, original_writev = os.open, os.writev
    if rank == 1 and how == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    elif rank == 1 and how == "full":

        def full(path: Any, *args: Any, **kwargs: Any) -> int:
            if str(path).startswith("rank-"):
                return original_open("/dev/full", os.O_WRONLY)
            return original_open(path, *args, **kwargs)

        os.open = full  # type: ignore[assignment]
    elif rank == 1:
        # The kernel may take less than it is given, down to a byte.
        os.writev = lambda fd, views: original_writev(fd, [views[0][:1]])
    optimizer = PlainOptimizer(SMALL, seed=3)
    try:
        return str(checkpoint.save(root, step=3, optimizer=optimizer).path)
    except checkpoint.CheckpointWriteError as error:
        return str(error)


@pytest.mark.parametrize(("how", "text"), [("full", "No space left on device"), ("limit", "File too large")])
def test_a_full_disk_on_one_rank_is_an_error_on_all_and_leaves_nothing(tmp_path: Path, how: str, text: str) -> None:
    root = tmp_path / "root"
    _save(root, 1)
    before = tree(root)
    heard = run_ranks(2, _full_disk, root, how)
    assert heard[0] == heard[1]
    assert text in heard[0]
    assert "rank 1" in heard[0]
    assert tree(root) == before


def test_short_writes_are_continued(tmp_path: Path) -> None:
    heard = run_ranks(2, _full_disk, tmp_path / "root", "short")
    checkpoint.verify(heard[0])


def _logged_save(rank: int, world_size: int, root: Path) -> list[tuple[float, str, str, int]]:
    """Every change to the file system, in time: (when, what, the path it had then, size of the file)."""
    log: list[tuple[float, str, str, int]] = []

    def path_of(fd: int) -> str:
        return os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), root)

    def logged(what: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(first, *args, **kwargs)
            fd = result if what == "open" else first
            if what in ("open", "writev", "fsync"):
                log.append((time.monotonic(), what, path_of(fd), os.fstat(fd).st_size))
            else:
                log.append((time.monotonic(), what, str(first), 0))
            return result

        return call

    originals = {name: getattr(os, name) for name in ("open", "writev", "fsync", "rename", "mkdir")}
    for name, original in originals.items():
        setattr(os, name, logged(name, original))
    try:
        checkpoint.save(root, step=3, optimizer=PlainOptimizer(SMALL, seed=3))
    finally:
        for name, original in originals.items():
            setattr(os, name, original)
    log.append((time.monotonic(), "return", "", 0))
    return log


def test_everything_is_on_the_disk_before_it_gets_its_name_and_the_name_before_it_is_acknowledged(
    tmp_path: Path,
) -> None:
    """kill -9 cannot show this: what the kernel holds survives a process, but not a loss of power."""
    root = tmp_path / "deep" / "root"
    root.parent.mkdir()
    logs = run_ranks(2, _logged_save, root)
    events = sorted(event for log in logs for event in log)
    checkpoint_path = checkpoint.latest(root)
    assert checkpoint_path is not None
    renamed = next(when for when, what, path, _ in events if what == "rename" and path.startswith(".tmp-"))
    tmp = next(path for _, what, path, _ in events if what == "rename")

    def times(what: str, path: str) -> list[float]:
        return [when for when, name, at, _ in events if (name, at) == (what, path)]

    for file in checkpoint_path.iterdir():
        path = f"{tmp}/{file.name}"
        synced = [when for when, what, at, size in events if (what, at, size) == ("fsync", path, file.stat().st_size)]
        assert times("writev", path)[-1] < synced[-1] < renamed, path
        # The names in the directory, too.
        assert times("open", path)[0] < times("fsync", tmp)[-1] < renamed
    assert renamed < times("fsync", ".")[-1] < min(times("return", ""))
    # And the name of the root itself, which was made.
    assert times("fsync", "..")[-1] < renamed


def test_a_second_writer_is_refused_while_one_writes(tmp_path: Path) -> None:
    # T22
    _save(tmp_path, 1)
    before = tree(tmp_path)
    lock = RootLock(tmp_path)
    heard = run_ranks(2, _refused_save, tmp_path)
    assert heard[0] == heard[1]
    assert "another process is writing" in heard[0]
    with pytest.raises(checkpoint.CheckpointWriteError, match="another process is writing"):
        checkpoint.prune(tmp_path, KEEP)
    assert tree(tmp_path) == before
    lock.release()
    lock.release()
    _save(tmp_path, 2)


def _refused_save(rank: int, world_size: int, root: Path) -> str:
    with pytest.raises(checkpoint.CheckpointWriteError) as caught:
        _save(root, 3)
    assert list(caught.value.ranks) == [0]
    return str(caught.value)


def _save_alone(rank: int, world_size: int, root: Path) -> list[str]:
    """Each rank is a job of its own; both write to one root."""
    groups = [dist.new_group([one]) for one in range(world_size)]
    alone = Collectives(groups[rank])
    saved = []
    while len(saved) < 8:
        optimizer = PlainOptimizer(SMALL, seed=100 * rank + len(saved), collectives=alone)
        with contextlib.suppress(checkpoint.CheckpointWriteError):
            saved.append(checkpoint.save(root, step=optimizer.seed, optimizer=optimizer, keep=None).path.name)
    return saved


def test_two_jobs_in_one_root_never_overwrite_each_other(tmp_path: Path) -> None:
    names = [name for job in run_ranks(2, _save_alone, tmp_path) for name in job]
    assert sorted(names) == [path.name for path in checkpoint.committed(tmp_path)]
    assert [int(name[5:13]) for name in sorted(names)] == list(range(1, 17))
    for path in checkpoint.committed(tmp_path):
        checkpoint.verify(path)


def test_without_locks_the_rename_still_lets_one_writer_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS cannot lock a directory: then a second writer is noticed at the commit, and its files are not swept."""

    def no_lock(fd: int, operation: int) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(fcntl, "flock", no_lock)
    original = saving._wait_for

    def overtaken(*args: Any) -> None:
        monkeypatch.setattr(saving, "_wait_for", original)
        _save(tmp_path, 2)
        original(*args)

    _save(tmp_path, 1)
    monkeypatch.setattr(saving, "_wait_for", overtaken)
    with pytest.raises(checkpoint.CheckpointWriteError, match="another process has written ckpt-00000002"):
        _save(tmp_path, 1)
    assert [path.name[-1] for path in checkpoint.committed(tmp_path)] == ["1", "2"]
    # What is a day older than the file system's present is dead even so.
    debris = tmp_path / ".tmp-ckpt-00000009-step-000000000009-0123456789abcdef"
    debris.mkdir()
    _save(tmp_path, 3)
    assert debris.exists()
    os.utime(debris, (0, time.time() - root_module.UNLOCKED_DEBRIS_SECONDS - 60))
    _save(tmp_path, 4)
    assert not debris.exists()


def test_only_debris_of_ours_is_swept(tmp_path: Path) -> None:
    others = ["notes", ".tmp-mine", ".trash-ckpt-1", "ckpt-1-step-2", "ckpt-00000001-step-000000000001x"]
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("precious")
    outside = tmp_path.parent / "outside"
    outside.mkdir()
    (outside / "file").write_text("precious")
    link = tmp_path / ".tmp-ckpt-00000001-step-000000000001-0123456789abcdef"
    link.symlink_to(outside)
    _save(tmp_path, 1)
    assert [path.name for path in checkpoint.committed(tmp_path)] == ["ckpt-00000001-step-000000000001"]
    assert all((tmp_path / name / "file").exists() for name in others)
    assert (outside / "file").exists()


def test_files_that_other_machines_wrote_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, lies = os.stat, 5

    def late(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        nonlocal lies
        if str(path).startswith("rank-") and lies:
            lies -= 1
            raise FileNotFoundError(path)
        return original(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", late)
    _save(tmp_path, 1)
    assert lies == 0
    lies = 10**9
    monkeypatch.setattr(saving, "VISIBLE_SECONDS", 0.2)
    with pytest.raises(checkpoint.CheckpointWriteError, match="is the directory on a disk that all ranks share"):
        _save(tmp_path, 2)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_root_that_is_not_shared_is_said_to_be(tmp_path: Path) -> None:
    heard = run_ranks(2, _save_apart, tmp_path)
    assert heard[0] == heard[1]
    assert "is it on a disk that all ranks share" in heard[0]
    assert list((tmp_path / "0").iterdir()) == []


def _save_apart(rank: int, world_size: int, root: Path) -> str:
    (root / str(rank)).mkdir()
    with pytest.raises(checkpoint.CheckpointWriteError) as caught:
        _save(root / str(rank), 1)
    return str(caught.value)


def test_too_little_space_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(tmp_path, 1)
    before = tree(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(checkpoint.CheckpointWriteError, match="has 1000 free"):
        _save(tmp_path, 2)
    assert tree(tmp_path) == before
    # A file system that knows no total knows no rest either.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(total=0, free=0))
    _save(tmp_path, 2)


def test_a_root_that_cannot_be_written_is_the_same_error_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root, text in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "root", "Not a directory")):
        heard = run_ranks(2, _unwritable_save, root, False)
        assert heard[0] == heard[1]
        assert text in heard[0]
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    heard = run_ranks(2, _unwritable_save, locked, True)
    assert heard[0] == heard[1]
    assert "Permission denied" in heard[0]


def _unwritable_save(rank: int, world_size: int, root: Path, drop: bool) -> str:
    ranks = Collectives()
    if drop and os.geteuid() == 0:
        os.setuid(65534)  # the superuser may write everywhere
    with pytest.raises(checkpoint.CheckpointWriteError) as caught:
        _save(root, 1, ranks)
    return str(caught.value)


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_directories_and_files_are_the_owners_alone(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        path = _save(tmp_path / "new" / "root", 1).path
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o700
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o600}


def test_a_root_that_everybody_may_write_to_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tmp_path.chmod(0o777)
    _save(tmp_path, 1)
    assert "everybody may write" in caplog.text
    assert json.loads(json.dumps(caplog.messages)) != []
