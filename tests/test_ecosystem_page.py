"""The tables of what was tested in which host name their tests, and the versions that are pinned."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("ecosystem", "deepspeed")}
TABLES = [("ecosystem", "host"), ("deepspeed", "what"), ("deepspeed", "what happens")]
ROWS = [
    row
    for page, heading in TABLES
    for row in PAGES[page].partition(f"\n| {heading} |")[2].partition("\n\n")[0].splitlines()[2:]
]
LINK = re.compile(r"\[`(test_\w+)`\]\(([^)]+)\)")
PINS = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))


def collected_from(path: Path) -> set[str]:
    """The tests that pytest would collect from a file: its functions, and the methods of its classes."""
    found = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.name for node in found if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_every_row_names_tests_that_exist(row: str) -> None:
    named = LINK.findall(row)
    assert named, "a row without a test is a claim that nobody holds"
    assert len(named) == len(re.findall(r"`test_", row)), "every test is a link to its file"
    for name, link in named:
        assert name in collected_from((ROOT / "docs" / link).resolve())


def test_the_versions_are_the_pinned_ones() -> None:
    spoken = re.findall(r"\b([a-z]+) (\d+\.\d+(?:\.\d+)?)\b", "\n".join(PAGES.values()).lower())
    assert spoken
    for name, version in spoken:
        if name in PINS:
            assert version == PINS[name], f"{name} {version} is not what constraints.txt installs"
    hosts = {"transformers", "accelerate", "lightning", "torchtitan", "torch", "optax", "tensorboard", "deepspeed"}
    assert hosts <= {name for name, _ in spoken}
