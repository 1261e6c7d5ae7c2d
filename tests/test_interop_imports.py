"""What importing the doors to other frameworks does, and does not, where the framework is missing or not wanted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def python(script: str, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `script` in a Python of its own, where `directory` is the first place to import from."""
    (directory / "script.py").write_text(script)
    command = [sys.executable, str(directory / "script.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=directory)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A directory with a package `host` that prints when it is executed."""
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "__init__.py").write_text("print('host runs')\n")
    (tmp_path / "host" / "part.py").write_text("print('part runs')\n")
    return tmp_path


def test_the_call_is_made_when_somebody_has_imported_the_package(package: Path) -> None:
    ran = python(
        """
import importlib.util
from sharded_adopt.interop.after_import import after_import
def then(): print('then')
after_import('host', then)
after_import('host', then)
print('asked', importlib.util.find_spec('host') is not None)
import host.part, inspect
print(inspect.getsource(host).strip())
import host
after_import('host', then)
""",
        package,
    )
    lines = ["asked True", "host runs", "then", "part runs", "print('host runs')", "then"]
    assert (ran.stdout.splitlines(), ran.stderr) == (lines, "")


def test_what_the_call_raises_the_import_raises(package: Path) -> None:
    ran = python(
        """
from sharded_adopt.interop.after_import import after_import
def then(): raise RuntimeError('two of that name')
after_import('host', then)
import host
""",
        package,
    )
    assert ran.returncode == 1
    assert "RuntimeError: two of that name" in ran.stderr


def test_a_package_that_is_not_there_is_missing_as_before(tmp_path: Path) -> None:
    ran = python(
        """
from sharded_adopt.interop.after_import import after_import
after_import('no_such_host', print)
import no_such_host
""",
        tmp_path,
    )
    assert "ModuleNotFoundError: No module named 'no_such_host'" in ran.stderr


def test_without_deepspeed_the_error_says_what_to_install(tmp_path: Path) -> None:
    ran = python("import sys; sys.modules['deepspeed'] = None; import sharded_adopt.interop.deepspeed", tmp_path)
    assert ran.returncode == 1
    assert "needs DeepSpeed, which is not installed; pip install 'sharded-adopt[deepspeed]'" in ran.stderr


def test_registering_imports_neither_deepspeed_nor_torch(tmp_path: Path) -> None:
    """A script sets DS_ACCELERATOR and CUDA_VISIBLE_DEVICES before it imports them; the runner must not be earlier."""
    (tmp_path / "deepspeed.py").write_text("raise SystemExit('imported')")
    ran = python(
        "import sys, sharded_adopt.interop.deepspeed\nprint({'torch', 'deepspeed'} & set(sys.modules))", tmp_path
    )
    assert (ran.stdout, ran.stderr) == ("set()\n", "")
