"""Whatever happens to the bytes of a checkpoint, nobody gets a wrong number out of it."""

from __future__ import annotations

import ast
import contextlib
import os
import random
import resource
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpointing import PlainOptimizer, Spec, rewrite_manifest, state_hash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import run_ranks

from sharded_adopt import checkpoint
from sharded_adopt.checkpoint import CheckpointCorrupt, CheckpointError, CheckpointMismatch

SMALL = (Spec("weight", (9, 3)), Spec("bias", (3,), group=1))


def _save(rank: int, world_size: int, root: Path, seed: int) -> Path:
    return checkpoint.save(root, step=seed, optimizer=PlainOptimizer(SMALL, seed=seed), keep=None).path


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A root with two checkpoints of world size 2, of steps 1 and 2."""
    root = tmp_path / "root"
    paths = [run_ranks(2, _save, root, seed)[0] for seed in (1, 2)]
    return root, paths[0], paths[1]


@pytest.fixture
def alone(tmp_path: Path) -> tuple[Path, Path, Path]:
    """The same of world size 1, which this process loads by itself and needs every byte of."""
    root = tmp_path / "root"
    paths = [_save(0, 1, root, seed) for seed in (1, 2)]
    return root, paths[0], paths[1]


def _assert_falls_back(root: Path, newest: Path, what: str) -> None:
    with pytest.raises(CheckpointCorrupt):
        checkpoint.verify(newest)
    optimizer = PlainOptimizer(SMALL)
    loaded = checkpoint.load(root, optimizer=optimizer)
    assert loaded.step == 1, what
    optimizer.assert_holds(1)
    assert len(loaded.skipped) == 1
    assert newest.name in loaded.skipped[0]
    assert what in loaded.skipped[0]


def test_every_changed_byte_is_found_by_verify_and_by_load(alone: tuple[Path, Path, Path]) -> None:
    # T22
    root, _, newest = alone
    numbers = random.Random(1)
    for file in sorted(newest.iterdir()):
        original = file.read_bytes()
        places = range(len(original)) if len(original) < 400 else numbers.sample(range(len(original)), 300)
        for place in {*places, 0, 7, 8, len(original) - 1}:
            changed = bytearray(original)
            changed[place] ^= numbers.randrange(1, 256)
            file.write_bytes(changed)
            _assert_falls_back(root, newest, file.name)
        file.write_bytes(original)
    checkpoint.verify(newest)


def test_truncated_and_longer_files_are_found(alone: tuple[Path, Path, Path]) -> None:
    root, _, newest = alone
    for file in sorted(newest.iterdir()):
        original = file.read_bytes()
        for size in (0, 1, 8, 64, 65, 66, len(original) // 2, len(original) - 1):
            file.write_bytes(original[:size])
            _assert_falls_back(root, newest, file.name)
        for changed in (original + b"\0", original + original, bytes(len(original)), b"\n" + original):
            file.write_bytes(changed)
            _assert_falls_back(root, newest, file.name)
        file.write_bytes(original)
    checkpoint.verify(newest)


def _symlink(file: Path) -> None:
    target = file.parent.parent / "elsewhere"
    file.rename(target)
    file.symlink_to(target)


def _fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("replace", [Path.unlink, _symlink, _fifo, _directory])
@pytest.mark.parametrize("name", ["manifest.json", "rank-00000-of-00001.safetensors"])
def test_a_file_that_is_missing_or_no_regular_file_is_found(
    alone: tuple[Path, Path, Path], name: str, replace: Callable[[Path], None]
) -> None:
    root, _, newest = alone
    started = time.monotonic()
    replace(newest / name)
    _assert_falls_back(root, newest, name)
    assert time.monotonic() - started < 5


def test_unlisted_files_are_found(alone: tuple[Path, Path, Path]) -> None:
    root, _, newest = alone
    for name in ("rank-00001-of-00002.safetensors", "notes.txt", ".hidden"):
        (newest / name).write_bytes(b"")
        _assert_falls_back(root, newest, name)
        (newest / name).unlink()
    (newest / "directory").mkdir()
    _assert_falls_back(root, newest, "directory")


def _swap(one: Path, other: Path) -> None:
    spare = one.with_name("spare")
    one.rename(spare)
    other.rename(one)
    spare.rename(other)


def test_swapped_files_are_found(two: tuple[Path, Path, Path]) -> None:
    """Also two files of the same size and of the same name, from two checkpoints."""
    _, older, newest = two
    names = sorted(path.name for path in newest.iterdir())
    pairs = [(newest / names[1], newest / names[2])]
    pairs += [(older / name, newest / name) for name in names]
    for one, other in pairs:
        _swap(one, other)
        with pytest.raises(CheckpointCorrupt):
            checkpoint.verify(newest)
        with pytest.raises(CheckpointCorrupt):
            checkpoint.verify(other.parent if other.parent != newest else one.parent)
        _swap(one, other)
    _swap(older, newest)
    with pytest.raises(CheckpointCorrupt, match="the directory was renamed"):
        checkpoint.verify(newest)
    _swap(older, newest)
    checkpoint.verify(newest)


def _flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def _load_everywhere(rank: int, world_size: int, root: Path) -> tuple[int, list[str]]:
    optimizer = PlainOptimizer(SMALL)
    loaded = checkpoint.load(root, optimizer=optimizer)
    optimizer.assert_holds(loaded.step)
    return loaded.step, loaded.skipped


def test_all_ranks_go_back_to_the_same_older_checkpoint_and_say_why(
    two: tuple[Path, Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    root, older, newest = two
    newer = run_ranks(2, _save, root, 3)[0]
    # Each is damaged where one rank alone can see it.
    _flip(newer / "rank-00001-of-00002.safetensors", -1)
    _flip(newest / "rank-00000-of-00002.safetensors", -1)
    heard = run_ranks(2, _load_everywhere, root)
    assert heard[0] == heard[1]
    step, skipped = heard[0]
    assert step == 1
    assert [line.split(":")[0] for line in skipped] == [newer.name, newest.name]
    assert "rank 1: rank-00001-of-00002.safetensors: chunk 0" in skipped[0]
    assert "rank 0: rank-00000-of-00002.safetensors: chunk 0" in skipped[1]
    # Another world size needs both files too.
    assert run_ranks(3, _load_everywhere, root)[2][0] == 1
    _flip(older / "manifest.json", 0)
    for told in run_ranks(2, _refused_everywhere, root, {}):
        assert all(path.name in told for path in (newer, newest, older))
    for told in run_ranks(2, _refused_everywhere, root, {"fallback": False}):
        assert newer.name in told
        assert newest.name not in told


def _refused_everywhere(rank: int, world_size: int, root: Path, options: dict[str, Any]) -> str:
    optimizer = PlainOptimizer(SMALL)
    before = state_hash(optimizer)
    with pytest.raises(CheckpointCorrupt) as caught:
        checkpoint.load(root, optimizer=optimizer, **options)
    assert state_hash(optimizer) == before
    assert optimizer.loads == 0
    return str(caught.value)


# It ends just before 2 MiB, with header and all.
LARGE = (Spec("weight", ((1 << 19) - 256,)),)


def test_what_nobody_needs_is_not_read_when_resharding(tmp_path: Path) -> None:
    """One rank's random numbers fill the end of a file here; at another world size nobody wants them."""
    optimizer = PlainOptimizer(LARGE, states=())
    saved = checkpoint.save(tmp_path, step=1, optimizer=optimizer)
    file = saved.path / "rank-00000-of-00001.safetensors"
    assert file.stat().st_size > 2 << 20
    _flip(file, -1)
    assert run_ranks(2, _load_weight, tmp_path) == [1, 1]
    with pytest.raises(CheckpointCorrupt, match="chunk 2"):
        checkpoint.load(tmp_path, optimizer=optimizer)
    _flip(file, -1)
    _flip(file, 1 << 20)
    with pytest.raises(AssertionError, match="chunk 1"):
        run_ranks(2, _load_weight, tmp_path)


def _load_weight(rank: int, world_size: int, root: Path) -> int:
    optimizer = PlainOptimizer(LARGE, states=())
    return checkpoint.load(root, optimizer=optimizer).step


def test_an_expected_digest_is_required_and_never_falls_back(alone: tuple[Path, Path, Path]) -> None:
    root, older, newest = alone
    digest = checkpoint.verify(newest)
    optimizer = PlainOptimizer(SMALL)
    assert checkpoint.load(root, optimizer=optimizer, expect_digest=digest).step == 2
    before = state_hash(optimizer)
    for expected in (checkpoint.verify(older), "0" * 64, ""):
        with pytest.raises(CheckpointMismatch, match=f"has digest {digest}"):
            checkpoint.load(root, optimizer=optimizer, expect_digest=expected)
        with pytest.raises(CheckpointMismatch):
            checkpoint.verify(newest, expect_digest=expected)
    _flip(newest / "rank-00000-of-00001.safetensors", -1)
    with pytest.raises(CheckpointCorrupt):
        checkpoint.load(root, optimizer=optimizer, expect_digest=digest)
    assert state_hash(optimizer) == before


def test_sha256_ties_every_byte_to_the_digest(tmp_path: Path) -> None:
    """CRC-32 can be forged: the same digest may then belong to other numbers. SHA-256 cannot."""
    saved = checkpoint.save(tmp_path, step=1, optimizer=PlainOptimizer(SMALL), checksum="sha256")
    _flip(saved.path / "rank-00000-of-00001.safetensors", -1)
    with pytest.raises(CheckpointCorrupt, match="sha256"):
        checkpoint.verify(tmp_path)


# --- manifests that somebody made ----------------------------------------------------------------------------------

_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 3)
    | st.sampled_from([2**31, 2**63 - 1, 2**63, 2**200, -1, 0.5, 1e400])
    | st.sampled_from(["", "../../etc/passwd", "/etc/passwd", "rank-00000-of-00001.safetensors", "float32", "weight"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "$float", "x"]), inner),
    max_leaves=4,
)


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, child in children for place in _places(child, (*at, key)))]


def _changed(value: Any, data: st.DataObject) -> Any:
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(_places(value)[1:]))
        parent = value
        for key in place[:-1]:
            parent = parent[key]
        how = data.draw(st.sampled_from(["replace", "nudge", "delete", "repeat"]))
        old = parent[place[-1]]
        if how == "nudge" and type(old) is int:
            parent[place[-1]] = old + data.draw(st.sampled_from([-1, 1, 1 << 20]))
        elif how == "delete":
            del parent[place[-1]]
        elif how == "repeat" and isinstance(parent, list):
            parent.append(old)
        else:
            parent[place[-1]] = data.draw(_VALUES)
    return value


def test_a_manifest_made_by_anybody_raises_nothing_but_checkpoint_errors(tmp_path: Path) -> None:
    """Its digest fits, so that every later check is reached. Where all pass, what is loaded has the model's shape."""
    path = _save(0, 1, tmp_path, 1)
    original = (path / "manifest.json").read_bytes()
    heard = set()

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.data())
    def use_one(data: st.DataObject) -> None:
        (path / "manifest.json").write_bytes(original)
        rewrite_manifest(path, lambda value: _changed(value, data))
        optimizer = PlainOptimizer(SMALL, seed=2)
        before = state_hash(optimizer)
        for use in (checkpoint.inspect, checkpoint.verify):
            with contextlib.suppress(CheckpointError):
                use(path)
        try:
            checkpoint.load(tmp_path, optimizer=optimizer)
            heard.add("loaded")
        except CheckpointError as error:
            heard.add(type(error).__name__)
            assert state_hash(optimizer) == before

    use_one()
    assert {"loaded", "CheckpointCorrupt"} <= heard <= {"loaded", "CheckpointCorrupt", "CheckpointMismatch"}


def _set(*place: Any) -> Callable[[Any], Any]:
    """A change that puts the last of `place` where the others lead."""
    *keys, last, new = place

    def change(value: Any) -> Any:
        parent = value
        for key in keys:
            parent = parent[key]
        parent[last] = new
        return value

    return change


HOSTILE = {
    "a path upwards": _set("files", 0, "name", "../../../etc/passwd"),
    "an absolute path": _set("files", 0, "name", "/etc/passwd"),
    "another name": _set("files", 0, "name", "rank-00001-of-00001.safetensors"),
    "a huge file": _set("files", 0, "nbytes", 2**62),
    "a huge shape": _set("params", 0, "shape", [2**40, 2**20]),
    "a shape beyond all numbers": _set("params", 0, "shape", [2**40, 2**40]),
    "a negative size": _set("params", 0, "shape", [-9, -3]),
    "a bool for a number": _set("step", True),
    "a float for a number": _set("step", 1.0),
    "no such dtype": _set("params", 0, "dtype", "load"),
    "a gap": _set("files", 0, "segments", 0, [0, 1, 27]),
    "an overlap": _set("files", 0, "segments", [[0, 0, 27], [0, 0, 27], [1, 0, 3]]),
    "out of bounds": _set("files", 0, "segments", 0, [0, 0, 28]),
    "an unknown parameter": _set("files", 0, "segments", 0, [7, 0, 27]),
    "a parameter twice": _set("params", 1, "name", "weight"),
    "a parameter in no group": _set("groups", 0, "params", []),
    "too few checksums": _set("files", 0, "checksums", ""),
    "another chunk size": _set("chunk_nbytes", 1),
    "a huge state of a generator": _set("files", 0, "rng", "torch", 2**40),
    "an unknown generator": _set("files", 0, "rng", "../x", 1),
    "no files": _set("files", []),
    "a path as a state": _set("params", 0, "tensors", "../x", "float32"),
    "a number out of range": _set("params", 0, "scalars", "step", {"dtype": "int8", "value": 300}),
    "a list of lists of lists": _set("extra", eval("[" * 90 + "]" * 90)),
    "another format": _set("format", "zip"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_manifest_is_refused_or_harmless(tmp_path: Path, what: str) -> None:
    path = _save(0, 1, tmp_path, 1)
    rewrite_manifest(path, HOSTILE[what])
    harmless = what == "a list of lists of lists"
    optimizer = PlainOptimizer(SMALL, seed=2)
    before = state_hash(optimizer)
    for use in (checkpoint.inspect, checkpoint.verify, lambda path: checkpoint.load(path, optimizer=optimizer)):
        if harmless or (use is checkpoint.inspect and what == "a huge state of a generator"):
            use(path)
        else:
            with pytest.raises(CheckpointCorrupt) as caught:
                use(path)
            assert str(caught.value)
    assert harmless or state_hash(optimizer) == before


def _audited(rank: int, world_size: int, root: Path, name: str) -> list[str]:
    """What is opened, made, listed or deleted while hostile manifests are used; in a process of its own."""
    path = _save(0, 1, root, 1)
    optimizer = PlainOptimizer(SMALL, seed=2)
    original = (path / "manifest.json").read_bytes()
    # A manifest must not make us take memory for what it only claims.
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + (256 << 20)
    assert used < limit
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    touched: list[str] = []
    watching = False

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if watching and event in ("open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.mkdir"):
            touched.append(str(args[0]))

    sys.addaudithook(watch)
    for change in HOSTILE.values():
        rewrite_manifest(path, change)
        watching = True
        for use in (checkpoint.inspect, checkpoint.verify, lambda path: checkpoint.load(path, optimizer=optimizer)):
            with contextlib.suppress(CheckpointError):
                use(path)
        watching = False
        (path / "manifest.json").write_bytes(original)
    return touched


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"exp_avg/weight"', b'"exp_age/weight"'),
        (b'"dtype":"F32"', b'"dtype":"I32"'),
        (b'"shape":[27]', b'"shape":[28]'),
        (b'"data_offsets":[0,', b'"data_offsets":[4,'),
        (b'{"__metadata__"', b' "__metadata__"'),
    ],
)
def test_a_file_whose_header_contradicts_the_manifest_is_corrupt(tmp_path: Path, old: bytes, new: bytes) -> None:
    """With checksums that fit, as whoever rewrites both would make them."""
    path = _save(0, 1, tmp_path, 1)
    file = path / "rank-00000-of-00001.safetensors"
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new))
    rewrite_manifest(path, _set("files", 0, "checksums", f"{zlib.crc32(file.read_bytes()):08x}"))
    for use in (checkpoint.verify, lambda path: checkpoint.load(path, optimizer=PlainOptimizer(SMALL))):
        with pytest.raises(CheckpointCorrupt, match="its header does not describe"):
            use(path)


def test_no_manifest_makes_us_open_a_path_outside_the_checkpoint(tmp_path: Path) -> None:
    touched = set(run_ranks(1, _audited, tmp_path / "root", "")[0])
    inside = {"manifest.json", "rank-00000-of-00001.safetensors"}
    outside = {one for one in touched - inside if not one.isdigit() and not one.startswith(str(tmp_path / "root"))}
    assert touched & inside
    assert outside == set()


def test_a_manifest_larger_than_any_of_ours_is_not_read(tmp_path: Path) -> None:
    path = _save(0, 1, tmp_path, 1)
    with (path / "manifest.json").open("r+b") as file:
        file.truncate((64 << 20) + 1)  # sparse
    with pytest.raises(CheckpointCorrupt, match="are the most"):
        checkpoint.verify(path)


@pytest.mark.parametrize(
    "text", [b"", b"\n", b"{}", b"[" * 100_000, b'{"a":' * 5000, b"\xff\xfe", b'{"format": NaN}', b'{"a": 1, "a": 1}']
)
def test_a_manifest_that_is_no_object_of_ours_is_corrupt(tmp_path: Path, text: bytes) -> None:
    import hashlib

    path = _save(0, 1, tmp_path, 1)
    text += b"\n"
    (path / "manifest.json").write_bytes(text + hashlib.sha256(text).hexdigest().encode() + b"\n")
    for use in (checkpoint.inspect, checkpoint.verify):
        with pytest.raises(CheckpointCorrupt):
            use(path)


def test_a_later_version_of_the_format_is_told_from_damage_and_not_passed_over(alone: tuple[Path, Path, Path]) -> None:
    # T22
    root, _, newest = alone
    rewrite_manifest(newest, _set("version", 2))
    optimizer = PlainOptimizer(SMALL)
    for use in (checkpoint.verify, lambda path: checkpoint.load(path, optimizer=optimizer)):
        with pytest.raises(CheckpointMismatch, match="format version 2"):
            use(root)
    # What a later writer of this version may add is ignored.
    rewrite_manifest(newest, _set("version", 1))
    rewrite_manifest(newest, _set("added", {"later": True}))
    assert checkpoint.load(root, optimizer=optimizer).step == 2


def test_nothing_in_the_package_runs_code_from_a_file() -> None:
    # T22
    forbidden = {"pickle", "marshal", "shelve", "dill"}
    calls = {"eval", "exec", "compile", "__import__"}
    package = Path(checkpoint.__file__).parent
    sources = sorted(package.glob("*.py"))
    assert len(sources) > 10
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
                assert not forbidden & {name.split(".")[0] for name in names}, source
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in calls, source
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                assert node.attr not in ("load", "save"), source


def test_what_may_not_be_read_is_an_error_of_its_own() -> None:
    """Permission to read is no property of the data: `verify` must not call it corrupt."""
    with tempfile.TemporaryDirectory() as directory:  # pytest's own lies where other users cannot go
        path = _save(0, 1, Path(directory) / "root", 1)
        for part in (Path(directory), path.parent, path):
            part.chmod(0o755)
        (path / "manifest.json").chmod(0o644)
        (path / "rank-00000-of-00001.safetensors").chmod(0)
        assert run_ranks(1, _refused_reads, path, ["verify"]) == [["CheckpointError"]]
        path.parent.chmod(0)
        assert run_ranks(1, _refused_reads, path, ["verify", "inspect", "committed"]) == [["CheckpointError"] * 3]
        path.parent.chmod(0o700)


def _refused_reads(rank: int, world_size: int, path: Path, uses: list[str]) -> list[str]:
    if os.geteuid() == 0:
        os.setuid(65534)  # the superuser may read everything
    kinds = []
    for use in uses:
        with pytest.raises(CheckpointError, match="cannot be read: Permission denied") as caught:
            getattr(checkpoint, use)(path.parent if use == "committed" else path)
        kinds.append(type(caught.value).__name__)
    return kinds
