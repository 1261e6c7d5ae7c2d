"""The measurements behind docs/from-adamw.md: one command makes them, and the page says what they say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from sharded_adopt import ADOPT, ShardedADOPT, ShardedOptimizer

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "from_adamw.py"
RESULTS = ROOT / "benchmarks" / "results"
PAGE = (ROOT / "docs" / "from-adamw.md").read_text(encoding="utf-8")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_one_command_measures_draws_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the figures need the extra 'plots'")
    first = run("--quick", "--minutes", "0.02", "--out", str(tmp_path))
    assert first.returncode == 0, first.stderr
    stopped = json.loads((tmp_path / "from-adamw.json").read_text())["runs"]
    assert "are left: the same command goes on" in first.stdout
    second = run("--quick", "--out", str(tmp_path))
    assert second.returncode == 0, second.stderr
    runs = json.loads((tmp_path / "from-adamw.json").read_text())["runs"]
    assert 0 < len(stopped) < len(runs)
    assert all(runs[key] == found for key, found in stopped.items())  # not run again
    table = (tmp_path / "from-adamw.md").read_text()
    assert "| AdamW, β2 0.999 |" in table
    assert "| cold ADOPT |" in table
    for name in ("switch", "settings"):
        assert (tmp_path / f"from-adamw-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_published_table_is_that_of_the_published_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from from_adamw import SEEDS, STEPS, plan
    from from_adamw_report import tables

    results = json.loads((RESULTS / "from-adamw.json").read_text())
    assert set(results["runs"]) == {one.key for one in plan(SEEDS, STEPS)}
    assert tables(results, SEEDS, STEPS) == (RESULTS / "from-adamw.md").read_text()


def test_every_figure_of_the_page_is_in_the_published_table() -> None:
    published = (RESULTS / "from-adamw.md").read_text().splitlines()
    rows = [line for line in PAGE.splitlines() if line.startswith("|") and len(re.findall(r"\d\.\d", line)) > 2]
    assert len(rows) > 30
    for row in rows:
        assert row in published


def test_the_best_learning_rate_of_every_pair_lies_inside_its_grid() -> None:
    rows = [line for line in PAGE.splitlines() if re.match(r"\| \d+ steps, warm-up", line)]
    assert len(rows) == 10
    for row in rows:
        losses = [cell for cell in row.split("|")[2:-1] if cell.strip()]
        assert "**" in "".join(losses[1:-1]), row


def test_the_page_says_first_what_to_type() -> None:
    assert "`optimizer = ADOPT.from_adamw(optimizer)`" in PAGE.splitlines()[0]


def test_what_the_page_shows_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(3, 2)
    groups = [{"params": list(model.parameters()), "initial_lr": 1e-3}]
    adamw = torch.optim.AdamW(groups)
    model(torch.ones(3)).sum().backward()
    adamw.step()
    torch.save(adamw.state_dict(), "adamw.pt")
    other = nn.Linear(3, 2)
    names = {
        **{"ADOPT": ADOPT, "ShardedADOPT": ShardedADOPT, "torch": torch, "LambdaLR": LambdaLR},
        **{"adamw": adamw, "model": model, "steps_done": 1, "schedule": lambda step: 1 / (1 + step)},
        **{
            "adamw_scheduler": LambdaLR(adamw, lambda step: 1.0),
            "make_scheduler": lambda o: LambdaLR(o, lambda step: 1.0),
        },
        "sharded_adamw": ShardedOptimizer([{"params": other.parameters(), "initial_lr": 1e-3}], torch.optim.AdamW),
    }
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, names)
    assert names["optimizer"].param_groups[0]["lr"] == pytest.approx(5e-4)
