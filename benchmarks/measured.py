"""What benchmarks have in common: what they ran on, their ranks, and ratios between times of the same round."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sharded_adopt.kernels import fused


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    found = {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    for package in ("torch-adopt", "pytorch_optimizer", "deepspeed"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    status = fused.status()
    found["kernel"] = f"C, {status.cpu}" if status.cpu else status.cpu_reason
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return found


def ratio(times: list[float], reference: list[float]) -> dict[str, float]:
    """Return the median, least and most of the ratios of times that were taken in the same rounds."""
    ratios = [mine / theirs for mine, theirs in zip(times, reference, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def on_ranks(world_size: int, run: Callable[..., None], *args: Any) -> dict[str, Any]:
    """Run `run(rank, world_size, directory, *args)` and return what rank 0 wrote into `found.json` of the directory.

    Ranks are forked, so that torch is imported once. Exits where one fails; its error is above then.
    """
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as directory:
        ranks = [fork.Process(target=run, args=(rank, world_size, directory, *args)) for rank in range(world_size)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        if any(rank.exitcode for rank in ranks):
            sys.exit(f"ranks ended with {[rank.exitcode for rank in ranks]}: see their errors above")
        found: dict[str, Any] = json.loads(Path(directory, "found.json").read_text())
        return found
