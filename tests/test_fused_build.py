"""The package installs and runs with and without a C compiler, and says which kernel runs."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sharded_adopt import ADOPT, cli, kernels
from sharded_adopt.kernels import fused, native

ROOT = Path(__file__).parent.parent


def _build(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "sharded_adopt", source / "sharded_adopt", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=source,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_one_file_serves_every_python(tmp_path: Path, compiler: str) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler} here")
    done = _build(tmp_path, CC=compiler, LDSHARED=f"{compiler} -shared")
    assert done.returncode == 0, done.stderr
    (library,) = (tmp_path / "sharded_adopt").rglob("_adopt*.so")
    assert library.name == "_adopt.abi3.so"


def test_without_a_compiler_the_build_succeeds_without_the_library(tmp_path: Path) -> None:
    done = _build(tmp_path, CC="/nonexistent/cc", LDSHARED="/nonexistent/cc -shared")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("_adopt*.so"))
    code = (
        "import logging, torch; logging.basicConfig(format='%(message)s'); from sharded_adopt import ADOPT\n"
        "p = torch.nn.Parameter(torch.ones(3)); o = ADOPT([p], lr=0.1)\n"
        "for _ in range(3): p.grad = torch.ones(3); o.step()\n"
        "print(p.tolist())\n"
        "try: ADOPT([p], fused=True)\n"
        "except ValueError as error: print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    moved, refusal = ran.stdout.splitlines()
    assert json.loads(moved) == pytest.approx([1 - 0.1 * 0.1 - 0.1 * 0.19] * 3)
    assert refusal.startswith("fused=True: the fused kernel for cpu is missing: it was not built")
    said = [line for line in ran.stderr.splitlines() if "foreach kernel instead of the fused one" in line]
    assert len(said) == 1, "said once, not at every step"


def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.load().library is None:
        pytest.skip("no library was built")
    monkeypatch.setattr(native, "_INTERFACE", -1)
    found = native.load.__wrapped__()
    assert found.library is None
    assert "install the package again" in found.reason


def test_a_missing_kernel_is_named_once_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fused, "_HAS_CPU", False)
    monkeypatch.setattr(fused, "_HAS_CUDA", False)
    kernels._say_once.cache_clear()
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = ADOPT([param])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            param.grad = torch.ones(3)
            optimizer.step()
    kernels._say_once.cache_clear()
    assert sum("foreach kernel instead" in record.message for record in caplog.records) == 1


def test_doctor_shows_which_kernel_runs_and_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["cpu"] == native.load().isa
    assert shown["torch"] == torch.__version__
    assert cli.main(["doctor"]) == 0
    assert "ADOPT on CPU runs" in capsys.readouterr().out
    monkeypatch.setattr(native, "load", lambda: native.Native(None, None, "no compiler was there"))
    assert cli.main(["doctor"]) == 0
    assert "foreach: no compiler was there" in capsys.readouterr().out
