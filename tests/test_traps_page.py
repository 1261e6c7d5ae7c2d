"""docs/traps.md names a test for each of its rows, and each of these tests names its row."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = (HERE.parent / "docs" / "traps.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (T\d+) \| (.*)$", PAGE, re.MULTILINE)


def sources() -> dict[str, str]:
    """The source of every test function of this directory, by its name."""
    found = {}
    for path in HERE.glob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[node.name] = "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])
    return found


def test_the_page_has_every_row_once() -> None:
    assert [row for row, _ in ROWS] == [f"T{number}" for number in range(1, 41)]


def test_every_row_names_tests_that_exist_and_name_the_row() -> None:
    tests = sources()
    for row, text in ROWS:
        named = re.findall(r"`(test_\w+)`", text)
        assert named, f"{row} names no test"
        for name in named:
            assert name in tests, f"{row} names {name}, which does not exist"
            comments = re.findall(r"#.*", tests[name])
            assert any(re.search(rf"\b{row}\b", comment) for comment in comments), f"{name} does not say # {row}"


def test_every_test_that_names_a_row_is_on_the_page() -> None:
    named = {(row, name) for row, text in ROWS for name in re.findall(r"`(test_\w+)`", text)}
    rows = {row for row, _ in ROWS}
    for name, source in sources().items():
        for comment in re.findall(r"#.*", source):
            for row in re.findall(r"\bT\d+\b", comment):
                assert row not in rows or (row, name) in named or name.endswith("_page"), f"{name} says {row}"
