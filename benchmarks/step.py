"""Measure one optimizer step against the memory floor and against other optimizers, interleaved in one run.

    python benchmarks/step.py                        # everything: table, benchmarks/results/step-*.{md,json,png}
    python benchmarks/step.py --work tiny --threads 2 --rounds 31

Every kind of work and number of threads has a process of its own. In it all peers share one set of parameters,
gradients and moments; a round runs each once, in an order that rotates from round to round. A ratio is taken between
two times of the same round, and the median over the rounds is what counts: on a machine that is not idle, times mean
little, and ratios with a wide range do not mean much more. Extra memory is the growth of the resident set's high-water
mark in one warm step, bytes a parameter.

The floor (floor.c) passes once over the same memory with next to no arithmetic: 28 bytes a parameter in fp32.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from floor import make_floor
from measured import machine, ratio
from report import chart, table
from torch import Tensor
from torch.nn import Parameter

from sharded_adopt import ADOPT

OURS = "sharded_adopt"


def gpt2_shapes() -> list[tuple[int, ...]]:
    """The 148 parameters of GPT-2 with 124 M elements: tied embeddings, biases and norms included."""
    width, layers = 768, 12
    block = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(50257, width), (1024, width), *(block * layers), (width,), (width,)]


def tiny_shapes() -> list[tuple[int, ...]]:
    """2,000 vectors of 1,000 to 4,096 elements."""
    lengths = torch.randint(1000, 4097, (2000,), generator=torch.Generator().manual_seed(0))
    return [(int(length),) for length in lengths]


WORKS: dict[str, tuple[str, Callable[[], list[tuple[int, ...]]], torch.dtype]] = {
    "gpt2": ("GPT-2 list, 124.4 M in 148 tensors", gpt2_shapes, torch.float32),
    "flat": ("one flat tensor, 67.1 M", lambda: [(1 << 26,)], torch.float32),
    "tiny": ("2,000 tensors of 1,000 to 4,096", tiny_shapes, torch.float32),
    "bf16": ("GPT-2 list, bf16 parameters, fp32 state", gpt2_shapes, torch.bfloat16),
}


def make_peers(params: list[Parameter], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor]) -> dict[str, Any]:
    """Every optimizer that is installed, stepped once and then given the shared moments."""
    peers: dict[str, Any] = {OURS: ADOPT(params, lr=1e-6, fused=True)}
    if params[0].dtype == torch.float32:
        peers["sharded_adopt foreach"] = ADOPT(params, lr=1e-6, foreach=True)
        peers["torch AdamW fused"] = torch.optim.AdamW(params, lr=1e-6, fused=True)
        peers.update(_other_adopts(params))
    for optimizer in peers.values():
        optimizer.step()
        for param, exp_avg, exp_avg_sq in zip(params, exp_avgs, exp_avg_sqs, strict=True):
            optimizer.state[param].update(exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    return peers


def _other_adopts(params: list[Parameter]) -> dict[str, Any]:
    """Other people's ADOPT, as far as it is installed."""
    found: dict[str, Any] = {}
    for name, module, options in (
        ("torch-adopt", "adopt", {"foreach": False}),
        ("torch-adopt foreach", "adopt", {"foreach": True}),
        ("pytorch_optimizer", "pytorch_optimizer", {}),
    ):
        try:
            found[name] = importlib.import_module(module).ADOPT(params, lr=1e-6, **options)
        except ImportError:
            print(f"{module} is not installed: {name} is left out", file=sys.stderr)
    return found


def measure(work: str, threads: int, rounds: int) -> dict[str, Any]:
    """Run all peers on one kind of work; return times, ratios and memory."""
    torch.set_num_threads(threads)
    _, shapes, dtype = WORKS[work]
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes()]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(dtype)
    exp_avgs = [torch.zeros_like(param, dtype=torch.float32) for param in params]
    exp_avg_sqs = [torch.ones_like(param, dtype=torch.float32) for param in params]
    grads = [param.grad for param in params if param.grad is not None]
    peers = make_peers(params, exp_avgs, exp_avg_sqs)
    run: dict[str, Callable[[], object]] = {"floor": make_floor([params, grads, exp_avgs, exp_avg_sqs], threads)}
    run.update({name: peer.step for name, peer in peers.items()})

    numel = sum(param.numel() for param in params)
    extra = {}
    for name, step in run.items():
        step()
        step()
        extra[name] = _high_water_growth(step) / numel
    times: dict[str, list[float]] = {name: [] for name in run}
    load_before = os.getloadavg()[0]
    order = list(run)
    for _ in range(rounds):
        order = [*order[1:], order[0]]
        for name in order:
            start = time.perf_counter()
            run[name]()
            times[name].append(time.perf_counter() - start)
    return {
        "work": work,
        "threads": threads,
        "numel": numel,
        "tensors": len(params),
        "rounds": rounds,
        "load": [load_before, os.getloadavg()[0]],
        "seconds": times,
        "of_floor": {name: ratio(values, times["floor"]) for name, values in times.items()},
        "of_adamw": ratio(times[OURS], times["torch AdamW fused"]) if "torch AdamW fused" in times else None,
        "extra_bytes_a_parameter": extra,
    }


def _high_water_growth(step: Callable[[], object]) -> int:
    """Bytes by which one call raises the resident set above what it is before; 0 where Linux does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from the present size
    before = _kib(status, "VmRSS")
    step()
    return max(0, _kib(status, "VmHWM") - before) * 1024


def _kib(status: Path, field: str) -> int:
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1])


def main() -> None:
    """Parse the command line, measure in child processes, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=21, help="at least 15 for figures that are to be quoted")
    parser.add_argument("--name", default="cpu", help="results go to step-NAME.{json,md,png}")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        warnings.simplefilter("ignore")  # of what other packages use that torch deprecates
        json.dump(measure(arguments.work[0], arguments.threads[0], arguments.rounds), sys.stdout)
        return
    results: dict[str, Any] = {"machine": machine(), "runs": []}
    for work in arguments.work:
        for threads in arguments.threads:
            child = [sys.executable, __file__, "--child", "--work", work, "--threads", str(threads)]
            done = subprocess.run(
                [*child, "--rounds", str(arguments.rounds)], check=True, stdout=subprocess.PIPE, text=True
            )
            results["runs"].append(json.loads(done.stdout))
            print(table({**results, "runs": results["runs"][-1:]}, WORKS, heading=False), flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / f"step-{arguments.name}"
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    stem.with_suffix(".md").write_text(table(results, WORKS, heading=True))
    chart(results, WORKS, stem.with_suffix(".png"))
    print(f"written: {stem}.json, .md, .png")


if __name__ == "__main__":
    main()
