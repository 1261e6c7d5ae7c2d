"""What the README shows is run: its commands, its code, what they print, and what it says is not built."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from job import Job

import sharded_adopt

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = "".join(text for language, text in BLOCKS if language == "python")
CONSOLE = [text for language, text in BLOCKS if language == "console"]


def shape(line: str) -> str:
    """The line without its numbers, hashes and spaces: what must be alike in two runs."""
    return re.sub(r"[0-9a-f]{16}|[\d,.]+|\s+", "#", re.sub(r"\s+", " ", line.strip()))


def assert_shown_is_printed(shown: str, printed: str) -> None:
    """Every line that the README shows was printed, in its order, but for the numbers and for what `...` leaves out."""
    lines = iter([shape(line) for line in printed.splitlines()])
    for line in shown.splitlines():
        if line.strip() != "...":
            assert shape(line) in lines, f"not printed, or not in this order: {line!r}\n{printed}"


def run(command: list[str], directory: Path) -> str:
    ran = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(params=[1, 2], ids=["alone", "torchrun"])
def output_of_code(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """What the README's Python prints, all blocks as one script, and its last loss; rank by rank."""
    script = tmp_path / "readme.py"
    to_a_file_a_rank = "import os, sys\nsys.stdout = open(f'printed-{os.environ.get(\"RANK\", 0)}', 'w')\n"
    at_the_end = "print('loss', loss.item())\ntorch.distributed.destroy_process_group()\n"
    script.write_text(to_a_file_a_rank + PYTHON + at_the_end)
    if request.param == 1:
        run([sys.executable, str(script)], tmp_path)
    else:
        with (
            (tmp_path / "output").open("w") as file,
            Job(request.param, script, output=file, directory=tmp_path) as job,
        ):
            code = job.wait(240)
        assert code == 0, (tmp_path / "output").read_text()
    return "".join((tmp_path / f"printed-{rank}").read_text() for rank in range(request.param))


def test_the_training_loop_learns_and_the_checkpoint_comes_back(output_of_code: str) -> None:
    promised = re.findall(r"print\(.*\)  # (.*)", PYTHON)
    assert promised
    for line in promised:
        assert line in output_of_code.splitlines()
    losses = [float(word) for word in re.findall(r"^loss (\S+)$", output_of_code, re.MULTILINE)]
    assert losses
    assert max(losses) < 0.01, "the loop started near 0.3"


def test_the_commands_run_and_print_what_is_shown(tmp_path: Path) -> None:
    """In order, in a directory of their own; fewer steps, and no port that another job may have."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    seen = set()
    for block in CONSOLE:
        for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
            words = shlex.split(command, comments=True)
            seen.add(words[0])
            if words[0] == "make":  # they would run this test again; .ci/run runs them
                run(["make", "-n", *words[1:]], ROOT)
                continue
            if words[0] == "torchrun":
                words = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:]]
                words[words.index("--steps") + 1] = "3"
            elif words[0] == "sharded-adopt":
                words[0] = str(Path(sys.executable).with_name("sharded-adopt"))
            printed = run(words, tmp_path)
            assert_shown_is_printed(shown, printed)
            if "torch.distributed.run" in words:
                for language, text in BLOCKS:
                    if language == "text":
                        assert_shown_is_printed(text, printed)
    assert seen == {"make", "torchrun", "sharded-adopt"}


def test_the_torch_to_install_is_the_one_that_is_pinned() -> None:
    assert re.findall(r"torch==(\S+)", README) == re.findall(r"^torch==(\S+)", read("constraints.txt"), re.MULTILINE)
    assert re.findall(r"torch==(\S+)", read("Makefile")) == re.findall(r"torch==(\S+)", README)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_every_link_to_a_file_leads_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_every_public_name_is_in_the_table() -> None:
    table = README.partition("## What is where")[2]
    named = set(re.findall(r"`(\w+)`", table.partition("\n\n`")[0]))
    assert set(sharded_adopt.__all__) <= named
    for name in named & set(sharded_adopt.__all__):
        assert getattr(sharded_adopt, name) is not None
    for name in ("save", "load", "committed", "latest", "inspect", "verify", "prune"):
        assert name in named
        assert callable(getattr(sharded_adopt.checkpoint, name))


def sharded(**options: Any) -> Any:
    return sharded_adopt.ShardedADOPT([torch.zeros(3, requires_grad=True)], **options)


UNBUILT: dict[str, Callable[[], Any]] = {
    "meshes": lambda: sharded(mesh=object()),
    "`overlap_param_gather`": lambda: sharded(overlap_param_gather=True),
    "`AsyncSaver`": lambda: sharded_adopt.checkpoint.AsyncSaver(),
    "`checkpoint.reshard`": lambda: sharded_adopt.checkpoint.reshard("a", "b", 2),
    "`checkpoint.export`": lambda: sharded_adopt.checkpoint.export("a", "b", "torch"),
}


@pytest.mark.parametrize("name", UNBUILT)
def test_what_is_said_not_to_be_built_says_so_itself(name: str) -> None:
    """Whoever builds one of these takes it off the README's list of limits, and from here."""
    assert name in README.partition("## Limits")[2].partition("\n## ")[0]
    with pytest.raises(NotImplementedError, match=r"not (built|implemented) yet"):
        UNBUILT[name]()
