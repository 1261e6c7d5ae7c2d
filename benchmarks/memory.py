"""Measure what a rank holds at most while it trains: ours, DDP, torch's ZeRO and FSDP2, on one, two and four ranks.

    python benchmarks/memory.py                     # table, benchmarks/results/memory-cpu.{json,md,png}

The model of train_step.py: a GPT of 42.0 M fp32 parameters, one sequence of 64 tokens a rank. Each variant and world
size has processes of its own, twice. In the first, peaks are taken from all that torch's allocator is asked for and
gives back; in the second, for ours, from the high-water mark of the resident set, with freed memory given back to the
system at once and files that are mapped (the code of libraries) left out. Of both, what forward and backward take by
themselves in the same process is subtracted, with gradients dropped as they come; the largest gradient, which they need
too, is added again.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from allocator import allocated
from measured import machine, on_ranks
from report import memory_chart, memory_table
from torch import Tensor
from train_step import CONTEXT, GPT, VARIANTS, VOCABULARY, Variant

from sharded_adopt import ShardedADOPT

NAMES = ("ours-zero2", "ours-zero1", "zero-adopt", "ddp-adopt", "fsdp2-adopt")
WORLD_SIZES = (1, 2, 4)
MIB = 2**20


def measure(rank: int, world_size: int, directory: str, name: str, of_system: bool) -> None:
    """One rank of one variant; rank 0 writes the figures to a file. `of_system`: of the resident set."""
    # Freed memory goes back at once: what is resident is what is in use.
    mallopt = ctypes.CDLL(None).mallopt
    for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        mallopt(parameter, 1 << 16)
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    warnings.simplefilter("ignore")  # of what other packages use that torch deprecates
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world_size)
    tokens = torch.randint(VOCABULARY, (1, CONTEXT + 1), generator=torch.Generator().manual_seed(rank))
    found = (_by_system if of_system else _by_allocator)(VARIANTS[name][1], tokens)
    dist.barrier()
    if rank == 0:
        Path(directory, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _by_allocator(make: Callable[[], Variant], tokens: Tensor) -> dict[str, int]:
    models: list[GPT] = []
    model, _ = allocated(lambda: models.append(GPT()))
    sizes = [param.nbytes for param in models[0].parameters()]
    alone = _alone(models.pop(), tokens)
    alone()
    activations = allocated(alone)[1] - max(sizes)
    variants: list[Variant] = []
    grown, peak = allocated(lambda: variants.append(make()))
    for _ in range(3):
        after, highest = allocated(_step(variants[0], tokens))
        peak = max(peak, grown + highest)
        grown += after
    return {
        "numel": sum(sizes) // 4,
        "largest_gradient": max(sizes),
        "largest_bucket": max(25 * MIB, max(sizes)),
        "model": model,
        "activations": activations,
        "above": peak - model - activations,
        "between_steps": grown - model,
    }


def _by_system(make: Callable[[], Variant], tokens: Tensor) -> dict[str, int]:
    # Everything is imported, and every pool of threads is there, before anything is measured.
    small = torch.nn.Parameter(torch.ones(1))
    first = ShardedADOPT([small], shard_gradients=True)
    small.sum().backward()
    first.step()
    model = GPT()
    largest = max(param.nbytes for param in model.parameters())
    alone = _alone(model, tokens)
    alone()
    without = _high_water(alone)
    del model, alone
    step = _step(make(), tokens)
    step()
    return {"resident_above": max(_high_water(step) for _ in range(3)) - without + largest}


def _step(variant: Variant, tokens: Tensor) -> Callable[[], None]:
    def step() -> None:
        variant.backward(tokens)
        variant.step()

    return step


def _alone(model: GPT, tokens: Tensor) -> Callable[[], None]:
    """Forward and backward of the model, each gradient dropped as it comes."""

    def drop(param: Tensor) -> None:
        param.grad = None

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(drop)

    def step() -> None:
        model(tokens).backward()

    return step


def _high_water(step: Callable[[], object]) -> int:
    """The resident set's high-water mark in one call, in bytes, without files that are mapped."""
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from the present size
    step()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(sign * int(status[field].split()[0]) * 1024 for field, sign in (("VmHWM", 1), ("RssFile", -1)))


def run_all(names: list[str], world_sizes: list[int]) -> list[dict[str, Any]]:
    """Measure every variant on every number of ranks, one after the other."""
    runs = []
    for world_size in world_sizes:
        for name in names:
            run: dict[str, Any] = {"name": name, "world_size": world_size}
            for of_system in (False, True) if name.startswith("ours") else (False,):
                run |= on_ranks(world_size, measure, name, of_system)
            print(f"{world_size} ranks, {name}: {run['above'] / MIB:.1f} MiB above the model", file=sys.stderr)
            runs.append(run)
    return runs


def bar(run: dict[str, Any]) -> float:
    """What ZeRO-2 may take above model and activations: 12/W bytes a parameter, three buckets, the largest gradient."""
    limit: float = 12 * run["numel"] / run["world_size"] + 3 * run["largest_bucket"] + run["largest_gradient"]
    return limit


def main() -> None:
    """Parse the command line, measure, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(NAMES))
    parser.add_argument("--world-size", nargs="+", type=int, default=list(WORLD_SIZES))
    parser.add_argument("--name", default="cpu", help="results go to memory-NAME.{json,md,png}")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    results = {"machine": machine(), "runs": run_all(arguments.only, arguments.world_size)}
    labels = {name: label for name, (label, _) in VARIANTS.items()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / f"memory-{arguments.name}"
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    text = memory_table(results, labels, bar)
    stem.with_suffix(".md").write_text(text)
    memory_chart(results, labels, bar, stem.with_suffix(".png"))
    print(text)
    print(f"written: {stem}.json, .md, .png")


if __name__ == "__main__":
    main()
