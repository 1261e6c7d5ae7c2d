"""Measure the CPU time that the update kernels take on each rank as the ranks become more.

    python benchmarks/scaling.py                    # table, benchmarks/results/scaling-cpu.{json,md,png}

Each of W ranks holds GPT-2 (124 M fp32 parameters) in a ShardedADOPT with gradients already averaged, and steps the
shards of all its buckets: what `optimizer.step()` does between its messages. The CPU time of the thread is taken, not
the clock of the wall; the ranks take turns, so that none waits for another's memory traffic and all find cold caches.
A round runs every world size; of each rank the median counts. Needs 14 GB of memory. "Kernels" is the time within the
compiled pass over memory, "step" has the Python around it too, which every rank runs for all its 148 segments.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measured import machine
from report import scaling_chart, scaling_table
from step import gpt2_shapes
from torch.nn import Parameter

from sharded_adopt import ShardedADOPT
from sharded_adopt.kernels import fused

WORLD_SIZES = (1, 2, 4, 8)


class Shards(ShardedADOPT):
    """A sharded optimizer whose kernels can be run without its messages."""

    def fill(self) -> None:
        """Put numbers where the averaged gradients of this rank's shards are."""
        generator = torch.Generator().manual_seed(self.collectives.rank)
        for place, segment in zip(self._state.places, self._parameters.segments, strict=True):
            segment.grad = self._gradients.segment_grad(place)
            segment.grad.copy_(torch.randn(segment.shape, generator=generator))

    def update(self) -> None:
        """Step every bucket of this rank."""
        for bucket in range(len(self.layout.buckets)):
            self._inner.step(bucket)


def serve(rank: int, world_size: int, directory: str, orders: Connection) -> None:
    """One rank: for each order, run the kernels once and answer with the seconds of CPU time."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world_size)
    params = [Parameter(torch.ones(shape)) for shape in gpt2_shapes()]
    optimizer = Shards(params, lr=1e-6, shard_gradients=True)
    optimizer.fill()
    optimizer.update()  # the first one only initialises v
    orders.send(sum(segment.numel for segment in optimizer.layout.segments(rank)))
    in_kernels = 0.0
    run = fused._Plan.run

    def timed(self: Any, *arguments: Any) -> list[int]:
        nonlocal in_kernels
        start = time.thread_time()
        left = run(self, *arguments)
        in_kernels += time.thread_time() - start
        return left

    fused._Plan.run = timed  # type: ignore[method-assign, assignment]
    while orders.recv():
        in_kernels, start = 0.0, time.thread_time()
        optimizer.update()
        orders.send((in_kernels, time.thread_time() - start))
    dist.destroy_process_group()


def measure(world_sizes: list[int], rounds: int) -> dict[str, Any]:
    """Start the ranks of every world size, and let one after the other run its kernels, round by round."""
    fork = multiprocessing.get_context("fork")  # torch is imported once
    seconds: dict[int, list[list[tuple[float, float]]]] = {}
    numel: dict[int, list[int]] = {}
    with tempfile.TemporaryDirectory() as root:
        jobs: dict[int, list[tuple[Any, Connection]]] = {}
        for world_size in world_sizes:
            directory = Path(root, str(world_size))
            directory.mkdir()
            jobs[world_size] = []
            for rank in range(world_size):
                ours, theirs = fork.Pipe()
                process = fork.Process(target=serve, args=(rank, world_size, str(directory), theirs), daemon=True)
                process.start()
                theirs.close()
                jobs[world_size].append((process, ours))
            numel[world_size] = [orders.recv() for _, orders in jobs[world_size]]
            seconds[world_size] = []
        order = list(world_sizes)
        load_before = os.getloadavg()[0]
        for round_ in range(rounds):
            order = [*order[1:], order[0]]
            for world_size in order:
                taken = []
                for _, orders in jobs[world_size]:
                    orders.send(True)
                    taken.append(orders.recv())
                seconds[world_size].append(taken)
            print(f"\rround {round_ + 1}/{rounds}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        for ranks in jobs.values():
            for _, orders in ranks:
                orders.send(False)
            for process, _ in ranks:
                process.join()
    runs = []
    for world_size in world_sizes:
        run: dict[str, Any] = {"world_size": world_size, "numel": numel[world_size], "seconds": seconds[world_size]}
        for part, name in enumerate(("kernels", "step")):
            alone = statistics.median(taken[0][part] for taken in seconds[world_sizes[0]])
            of_ranks = [
                statistics.median(taken[rank][part] for taken in seconds[world_size]) for rank in range(world_size)
            ]
            run[name] = {
                "milliseconds": max(of_ranks) * 1e3,
                "of_even": [one * world_size / alone for one in of_ranks],
            }
        runs.append(run)
    return {"machine": machine(), "rounds": rounds, "load": [load_before, os.getloadavg()[0]], "runs": runs}


def main() -> None:
    """Parse the command line, measure, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21, help="at least 15 for figures that are to be quoted")
    parser.add_argument("--name", default="cpu", help="results go to scaling-NAME.{json,md,png}")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    results = measure(list(WORLD_SIZES), arguments.rounds)
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / f"scaling-{arguments.name}"
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    text = scaling_table(results)
    stem.with_suffix(".md").write_text(text)
    scaling_chart(results, stem.with_suffix(".png"))
    print(text)
    print(f"written: {stem}.json, .md, .png")


if __name__ == "__main__":
    main()
