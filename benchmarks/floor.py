"""Compile and run `floor.c`, the least that an optimizer step has to do."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

_PIECE_NUMEL = 1 << 15  # what a thread takes at a time, as in the kernel


class _Row(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_void_p) for name in "pgmv"), ("numel", ctypes.c_int64))


def make_floor(lists: Sequence[Sequence[Tensor]], threads: int) -> Callable[[], None]:
    """Return a function that passes once over (params, grads, exp_avgs, exp_avg_sqs) on torch's own threads.

    `lists` are (params, grads, exp_avgs, exp_avg_sqs). A small tensor is one item of work, a large one is several.
    Needs a C compiler; all addresses are prepared here, none when it runs.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "floor.so"
        source = Path(__file__).with_name("floor.c")
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-O3", "-march=native", "-shared", "-fPIC", source, "-o", path], check=True)
        library = ctypes.CDLL(str(path))
    libtorch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    parallel_for = ctypes.cast(libtorch.torch_parallel_for, ctypes.c_void_p)
    rows = []
    for row in zip(*lists, strict=True):
        for start in range(0, row[0].numel(), _PIECE_NUMEL):
            addresses = (tensor.data_ptr() + start * tensor.itemsize for tensor in row)
            rows.append(_Row(*addresses, min(_PIECE_NUMEL, row[0].numel() - start)))
    table = (_Row * len(rows))(*rows)
    counts = ctypes.c_int64(len(rows)), ctypes.c_int64(threads), ctypes.c_int64(lists[0][0].itemsize == 2)

    def run() -> None:
        library.floor_pass(parallel_for, table, *counts, ctypes.c_uint32(0))

    return run
