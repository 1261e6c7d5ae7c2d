"""Measure what docs/from-adamw.md says to those who come from AdamW, write its tables and draw its figures.

    python benchmarks/from_adamw.py               # what the results do not hold yet; nothing to run: the report anew
    python benchmarks/from_adamw.py --fresh       # everything, about 20 minutes of one core
    python benchmarks/from_adamw.py --minutes 3   # stop after the run that is under way then; called again it goes on

Each run is an entry of benchmarks/results/from-adamw.json, written when the run ends. It takes one thread, and depends
on nothing but its description, the text that this Python carries and the arithmetic of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from from_adamw_report import draw_settings, draw_switch, tables
from from_adamw_run import Run, Switch, Text, switch, train

STEPS = 500
SEEDS = (0, 1, 2)


def plan(seeds: Sequence[int], steps: int) -> list[Run | Switch]:
    """Every run of the report, each once. `OURS` and `THEIRS`: near the best learning rates at `STEPS` steps."""
    ours, theirs, short, long = 0.001, 0.002, steps // 4, 4 * steps

    def grid(optimizer: str, beta2: float, lrs: Sequence[float], **axes: Sequence[Any]) -> list[Run]:
        rows: list[dict[str, Any]] = [{}]
        for name, values in {"steps": (steps,), "seed": seeds, "lr": lrs, **axes}.items():
            rows = [{**row, name: value} for row in rows for value in values]
        return [Run(optimizer, beta2=beta2, **row) for row in rows]

    lrs = (ours / 2, ours, theirs, 2 * theirs, 4 * theirs)
    runs: list[Run | Switch] = [
        Switch(theirs, beta2, seed, at=4 * steps // 5, after=2 * steps // 5)
        for beta2 in (0.999, 0.95)
        for seed in seeds
    ]
    for optimizer, beta2 in (("adamw", 0.95), ("adamw", 0.999), ("adopt", 0.999), ("adopt", 0.9999)):
        runs += grid(optimizer, beta2, lrs)
    # horizon
    runs += grid("adopt", 0.9999, lrs[1:], steps=[short]) + grid("adamw", 0.999, lrs[1:], steps=[short])
    runs += grid("adopt", 0.9999, lrs[:3], steps=[long]) + grid("adamw", 0.999, lrs[1:4], steps=[long])
    runs += grid("adopt", 0.9999, lrs[1:4], steps=[long], warmup=[150])
    runs += grid("adamw", 0.999, lrs[2:], steps=[long], warmup=[150])
    for beta2 in (0.9, 0.99, 0.999, 0.9999):
        runs += grid("adopt", beta2, [ours], steps=[short, steps, *([long] if beta2 > 0.9 else [])])
    # clip
    runs += grid("adopt", 0.9999, [ours, 4 * ours], clip=[None, 0.0, 0.25, 0.5])
    # warm-up
    runs += grid("adopt", 0.9999, lrs[1:4], warmup=[150]) + grid("adamw", 0.999, lrs[1:], warmup=[150])
    runs += grid("adopt", 0.9999, [theirs], warmup=[1, 60]) + grid("adamw", 0.999, [theirs], warmup=[1, 60])
    # decay
    runs += grid("adopt", 0.9999, [ours], weight_decay=[0.0, 0.3])
    runs += grid("adopt", 0.9999, [ours], weight_decay=[0.01, 0.1], decouple=[False])
    runs += grid("adamw", 0.999, [theirs], weight_decay=[0.0, 0.3])
    return list({run.key: run for run in runs}.values())


def about(text: Text) -> dict[str, Any]:
    """What the figures were taken on."""
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "corpus": text.source,
        "corpus sha256": text.sha256[:16],
    }


def as_json(results: dict[str, Any]) -> str:
    """The results with one line a run."""
    runs = ",\n".join(f"{json.dumps(key)}: {json.dumps(run)}" for key, run in results["runs"].items())
    return f'{{"about": {json.dumps(results["about"])},\n"runs": {{\n{runs}\n}}}}\n'


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, run what is missing, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget the results that are there")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after that")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it works")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    if options.quick and options.out == parser.get_default("out"):
        parser.error("--quick measures nothing: give it an --out of its own")
    torch.set_num_threads(1)
    text = Text()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "from-adamw.json"
    results: dict[str, Any] = {"about": about(text), "runs": {}}
    if path.exists() and not options.fresh:
        results = json.loads(path.read_text())
        if results["about"]["corpus sha256"] != about(text)["corpus sha256"]:
            parser.error(f"{path} was measured on another text, that of another Python; begin anew with --fresh")

    seeds, steps = ((0,), 10) if options.quick else (SEEDS, STEPS)
    planned = plan(seeds, steps)
    results["runs"] = {run.key: results["runs"][run.key] for run in planned if run.key in results["runs"]}
    missing = [run for run in planned if run.key not in results["runs"]]
    began = time.monotonic()
    for number, run in enumerate(missing, start=1):
        if time.monotonic() - began > 60 * options.minutes:
            print(f"{len(missing) - number + 1} runs are left: the same command goes on")
            break
        results["runs"][run.key] = switch(run, text) if isinstance(run, Switch) else train(run, text)
        new = path.with_suffix(".new")
        new.write_text(as_json(results))
        os.replace(new, path)
        print(f"run {number} of {len(missing)}, {time.monotonic() - began:.0f} s: {run.key}", flush=True)
    path.with_suffix(".md").write_text(tables(results, seeds, steps))
    draw_switch(results, seeds, steps, path.with_name("from-adamw-switch.png"))
    draw_settings(results, seeds, steps, path.with_name("from-adamw-settings.png"))
    print(f"written: {path.with_suffix('')}.md, -switch.png, -settings.png")


if __name__ == "__main__":
    main()
