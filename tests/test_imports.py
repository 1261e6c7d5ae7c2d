"""Imports run downward only: the table of docs/architecture.md, held against the sources themselves."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import sharded_adopt

ROOT = Path(sharded_adopt.__file__).parent

# What a part of the package may import of the rest, at run time or for types. A part is a module or a folder; for each
# module the longest entry that fits counts, and within a folder its own modules are allowed where it names itself.
ALLOWED: dict[str, set[str]] = {
    "clipping": set(),
    "launch_env": set(),
    "sharding.layout": set(),
    "dtensor": set(),
    "kernels": {"kernels", "clipping"},
    "options": {"clipping"},
    "foreign": {"clipping"},
    "gathering": {"kernels", "dtensor"},
    "statistics": {"kernels", "clipping", "dtensor"},
    "loading": {"kernels", "options", "foreign"},
    "functional": {"kernels", "options", "clipping"},
    "from_adamw": {"kernels", "dtensor"},
    "adopt": {
        "kernels",
        "clipping",
        "options",
        "loading",
        "dtensor",
        "gathering",
        "from_adamw",
        "statistics",
        "functional",
    },
    "sharding": {"sharding"},
    "sharding.collectives": {"sharding.scratch"},
    "sharding.scratch": set(),
    "sharding.hyperparameters": set(),
    "sharding.watch": set(),
    "sharding.buckets": {"sharding.layout"},
    "sharding.groups": {"sharding.layout", "sharding.plan"},
    "sharding.flat_shard": {"sharding.layout"},
    "sharding.plan": {"sharding.layout"},
    "sharding.inner": {"sharding", "adopt", "foreign"},
    "sharding.handover": {"sharding", "from_adamw"},
    "sharding.optimizer": {"sharding", "adopt", "from_adamw", "statistics"},
    "checkpoint": {"checkpoint", "sharding.layout", "sharding.collectives"},
    # These stand on top.
    "commands": {"adopt", "checkpoint", "commands", "interop", "kernels", "sharding"},
    "cli": {"commands"},
    "run": {"interop"},
    "interop": {"adopt", "checkpoint", "clipping", "interop", "kernels", "launch_env", "sharding"},
    "": {"adopt", "checkpoint", "clipping", "launch_env", "sharding"},
}
# The face of the engine: nothing below it may know it.
FACE = "sharding.optimizer"
MAY_IMPORT_THE_FACE = ("", "commands", "interop")
# messages, the process group, and the adapters to DTensor and torch.distributed.checkpoint
TALK_TO_TORCH_DISTRIBUTED = ("sharding.collectives", "launch_env", "dtensor", "sharding.flat_shard", "interop")


def within(name: str, part: str) -> bool:
    """Say whether the module `name` is `part` or inside it; the package's own name is ""."""
    return name == part or (part != "" and name.startswith(part + "."))


def sources() -> dict[str, str]:
    """All modules by their dotted name inside the package; the package itself is ""."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


SOURCES = sources()


def imported(module: ast.AST) -> Iterator[str]:
    """Every absolute dotted name that is imported anywhere in a module, and every `torch.distributed` that is used."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # A relative import would be read wrongly below.
            assert node.level == 0, f"line {node.lineno}: import by absolute name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed"


class RunTime(ast.NodeTransformer):
    """Cuts from a module what only a type checker reads: a type of torch.distributed is no message."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg(node.arg)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        return self.generic_visit(ast.Expr(node.value)) if node.value else None

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)


def of_ours(source: str) -> set[str]:
    """The modules of the package that a source imports; "" where it imports a name from the package itself."""
    package = "sharded_adopt"
    names = {name for name in imported(ast.parse(source)) if within(name, package)} - {f"{package}.__version__"}
    ours = {name.removeprefix(package).lstrip(".") for name in names}
    return {max((module for module in SOURCES if within(name, module) or module == ""), key=len) for name in ours}


def violations(name: str, source: str) -> list[str]:
    """What the module `name` imports against the table."""
    entries = [part for part in ALLOWED if within(name, part)]
    if not entries:
        return [f"{name} is not in the table: give it a place"]
    allowed = ALLOWED[max(entries, key=len)]
    wrong = [
        f"{name} imports {module or 'the package itself'}"
        for module in sorted(of_ours(source) - {name})
        if not any(within(module, part) for part in allowed)
        or (module == FACE and not any(within(name, part) for part in MAY_IMPORT_THE_FACE))
    ]
    distributed = any(within(module, "torch.distributed") for module in imported(RunTime().visit(ast.parse(source))))
    if distributed and not any(within(name, part) for part in TALK_TO_TORCH_DISTRIBUTED):
        wrong.append(f"{name} uses torch.distributed")
    return wrong


PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
ROOMS = PAGE.read_text(encoding="utf-8").split("## The rooms")[1].split("```")[1]
# A row of the page: file, what it holds, and after two spaces what it imports, which may go on in the next line.
ROOM = re.compile(
    r"^(?P<indent> +)(?P<file>\w+)\.py  +\S+(?: \S+)*  +(?P<imports>\S.*(?:\n {60,}\S.*)*)$", re.MULTILINE
)
EVERYTHING_BEFORE = "all of the above"


def shown(page: str) -> dict[str, set[str]]:
    """What the page says that each module of the engine, and each that is in no folder, imports."""
    above, rest = page.split("\n  sharding/\n")
    engine, below = rest.split("\n  checkpoint/")
    return {
        prefix + row["file"]: set(re.split(r",\s*", row["imports"])) - {"nothing"}
        for indent, prefix, part in ((2, "", above), (4, "sharding.", engine), (2, "", below))
        for row in ROOM.finditer(part)
        if len(row["indent"]) == indent
    }


def as_shown(name: str) -> set[str]:
    """What `name` really imports, in the words of the page: siblings by their name, of other folders the folder."""
    folder = name.rpartition(".")[0]
    names = of_ours(SOURCES[name]) - {name}
    return {one.removeprefix(f"{folder}.") if within(one, folder) else one.partition(".")[0] for one in names}


@pytest.mark.parametrize(
    "name", sorted(name for name in SOURCES if name.startswith("sharding.") or (ROOT / f"{name}.py").is_file())
)
def test_the_page_says_what_a_module_imports(name: str) -> None:
    said = shown(ROOMS)[name]
    if said == {EVERYTHING_BEFORE}:
        before = ROOMS[: ROOMS.index(f" {name.rpartition('.')[2]}.py ")]
        said = as_shown(name) & set(re.findall(r"^ +(\w+)(?:\.py|/)", before, re.MULTILINE))
    assert said == as_shown(name)


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_module_imports_only_what_stands_below_it(name: str) -> None:
    assert violations(name, SOURCES[name]) == []


def test_imports_have_no_cycle() -> None:
    graph = {name: of_ours(source) - {name} for name, source in SOURCES.items() if name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("clipping", "from sharded_adopt.kernels import reference", "clipping imports kernels.reference"),
        ("kernels.new", "from sharded_adopt.adopt import ADOPT", "kernels.new imports adopt"),
        ("checkpoint.new", "from sharded_adopt import ADOPT", "checkpoint.new imports the package itself"),
        ("checkpoint.new", "import sharded_adopt.sharding.optimizer", "checkpoint.new imports sharding.optimizer"),
        ("sharding.reducer", f"from sharded_adopt.{FACE} import ShardedADOPT", f"sharding.reducer imports {FACE}"),
        ("sharding.new", "import torch\ntorch.distributed.barrier()", "sharding.new uses torch.distributed"),
        ("sharding.new", "def f():\n  from torch import distributed", "sharding.new uses torch.distributed"),
        ("sharding.new", "x: int = torch.distributed.get_rank()", "sharding.new uses torch.distributed"),
        ("newcomer", "", "newcomer is not in the table: give it a place"),
    ],
)
def test_the_check_finds_what_it_is_for(name: str, source: str, found: str) -> None:
    assert violations(name, source) == [found]
