"""The command: what it prints, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointing import PlainOptimizer, Spec, rewrite_manifest
from ranks import run_ranks
from torch import nn

from sharded_adopt import ShardedADOPT, checkpoint, cli

SMALL = (Spec("layer.weight", (9, 3)), Spec("layer.bias[x]", (3,), group=1))


def _save(rank: int, world_size: int, root: Path, step: int) -> Path:
    optimizer = PlainOptimizer(SMALL, seed=step)
    extra = {"epoch": step, "best": float("inf")}
    return checkpoint.save(root, step=step, optimizer=optimizer, model=nn.BatchNorm1d(2), extra=extra).path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for step in (10, 20):
        run_ranks(2, _save, tmp_path / "root", step)
    return tmp_path / "root"


def _flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def _run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def _json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, Any]:
    code, out, err = _run(capsys, *arguments, "--json")
    assert err == ""
    return code, json.loads(out, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))


def test_ls_shows_every_checkpoint_and_names_the_damaged(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    older, newest = checkpoint.committed(root)
    code, out, _ = _run(capsys, "ckpt", "ls", root)
    assert code == 0
    assert older.name in out
    assert newest.name in out
    assert checkpoint.verify(newest)[:12] in out
    (older / "manifest.json").unlink()
    code, rows = _json(capsys, "ckpt", "ls", root)
    assert code == 0
    assert [row["path"] for row in rows] == [str(older), str(newest)]
    assert rows[0]["error"] == "manifest.json is missing"
    assert rows[1] == {
        "path": str(newest),
        "error": None,
        "counter": 2,
        "step": 20,
        "world_size": 2,
        "nbytes": sum(file.stat().st_size for file in newest.iterdir()),
        "created": rows[1]["created"],
        "digest": checkpoint.verify(newest),
        "elements": 30,
    }
    assert "manifest.json is missing" in _run(capsys, "ckpt", "ls", root)[1]


def test_inspect_shows_the_newest_or_the_one_given(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    older, newest = checkpoint.committed(root)
    code, out, _ = _run(capsys, "ckpt", "inspect", root)
    assert code == 0
    for shown in (newest.name, "layer.weight", "layer.bias[x]", "running_mean", "exp_avg float32", "step 20.0"):
        assert shown in out
    code, found = _json(capsys, "ckpt", "inspect", older)
    assert code == 0
    assert (found["step"], found["path"]) == (10, str(older))
    assert found["extra"] == {"epoch": 10, "best": {"$float": "inf"}}


def test_verify_reads_all_and_exits_1_for_damage(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    older, newest = checkpoint.committed(root)
    code, rows = _json(capsys, "ckpt", "verify", root)
    assert code == 0
    assert rows == [{"path": str(p), "good": True, "digest": checkpoint.verify(p)} for p in (older, newest)]
    assert "good" in _run(capsys, "ckpt", "verify", root)[1]
    _flip(older / "rank-00001-of-00002.safetensors")
    code, rows = _json(capsys, "ckpt", "verify", root)
    assert code == 1
    assert [row["good"] for row in rows] == [False, True]
    assert "rank-00001-of-00002.safetensors: chunk 0" in rows[0]["message"]
    code, out, _ = _run(capsys, "ckpt", "verify", root)
    assert code == 1
    assert "corrupt" in out
    assert _run(capsys, "ckpt", "verify", newest)[0] == 0


def test_inspect_of_a_damaged_manifest_exits_1(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    _flip(checkpoint.committed(root)[-1] / "manifest.json", 5)
    code, out, err = _run(capsys, "ckpt", "inspect", root)
    assert (code, out) == (1, "")
    assert "CheckpointCorrupt: manifest.json is damaged" in err
    code, error = _json(capsys, "ckpt", "inspect", root)
    assert code == 1
    assert error["error"] == "CheckpointCorrupt"


def test_what_does_not_fit_exits_4(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    older, newest = checkpoint.committed(root)
    digest = checkpoint.verify(newest)
    assert _run(capsys, "ckpt", "verify", root, "--expect", digest.upper())[0] == 0
    code, error = _json(capsys, "ckpt", "verify", root, "--expect", checkpoint.verify(older))
    assert code == 4
    assert digest in error["message"]

    def of_the_future(manifest: Any) -> Any:
        return {**manifest, "version": 99}

    rewrite_manifest(newest, of_the_future)
    assert _run(capsys, "ckpt", "inspect", newest)[0] == 4


@pytest.mark.parametrize("action", ["ls", "inspect", "verify", "prune"])
def test_nothing_found_exits_3(capsys: pytest.CaptureFixture[str], tmp_path: Path, action: str) -> None:
    last = ["--last", "1"] if action == "prune" else []
    for path in (tmp_path, tmp_path / "missing"):
        code, out, err = _run(capsys, "ckpt", action, path, *last)
        assert (code, out) == (3, "")
        assert "there is no checkpoint in" in err


def test_prune_deletes_what_is_not_asked_for(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    older, newest = checkpoint.committed(root)
    code, removed = _json(capsys, "ckpt", "prune", root, "--last", "1")
    assert (code, removed) == (0, [str(older)])
    assert checkpoint.committed(root) == [newest]
    assert _run(capsys, "ckpt", "prune", root, "--last", "1", "--every", "10")[1] == "0 deleted\n"


def test_a_failing_disk_exits_5(
    capsys: pytest.CaptureFixture[str], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    def broken(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    for action in ("inspect", "verify"):
        code, error = _json(capsys, "ckpt", action, root)
        assert code == 5
        assert "Input/output error" in error["message"]
    (root.parent / "file").write_text("")
    assert _run(capsys, "ckpt", "ls", root.parent / "file")[0] == 5


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["ckpt"],
        ["ckpt", "ls"],
        ["ckpt", "burn", "x"],
        ["ckpt", "ls", "x", "--yaml"],
        ["ckpt", "prune", "x"],
        ["ckpt", "prune", "x", "--last", "0"],
        ["ckpt", "prune", "x", "--last", "two"],
    ],
)
def test_wrong_usage_exits_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: sharded-adopt" in capsys.readouterr().err


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def test_the_process_exits_with_the_codes_that_are_promised(
    root: Path, tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    damaged = checkpoint.committed(root)[0]
    _flip(damaged / "rank-00000-of-00002.safetensors")
    cases: list[tuple[int, list[str | Path]]] = [
        (0, ["ckpt", "verify", checkpoint.committed(root)[1]]),
        (1, ["ckpt", "verify", damaged, "--json"]),
        (2, ["ckpt", "verify"]),
        (3, ["ckpt", "ls", tmp_path / "missing"]),
        (0, ["--help"]),
        (0, ["--version"]),
    ]
    for code, arguments in cases:
        command = [sys.executable, "-m", "sharded_adopt.cli", *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, (arguments, out, err)
        assert "Traceback" not in err


def test_help_does_not_wait_for_torch() -> None:
    program = (
        "import sys; from sharded_adopt import cli\n"
        "for command in ([], ['plan'], ['ckpt', 'ls'], ['doctor']):\n"
        "    try: cli.main([*command, '--help'])\n"
        "    except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL, timeout=60)


def test_what_users_wrote_is_not_read_as_markup(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    root = tmp_path / "[/odd]"
    optimizer = ShardedADOPT([("[bold]", torch.nn.Parameter(torch.ones(3)))])
    checkpoint.save(root, step=1, optimizer=optimizer, extra={"bad": "[/foo]", "none": [None, None]})
    code, out, _ = _run(capsys, "ckpt", "inspect", root)
    assert code == 0
    assert '{"bad": "[/foo]", "none": [null, null]}' in out
    assert "[bold]" in out
    assert _run(capsys, "ckpt", "ls", root)[0] == 0
    assert _run(capsys, "ckpt", "verify", root)[0] == 0
