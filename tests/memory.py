"""What is really in memory: the tensors of this process, and what the CPU allocator was asked for."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn


def storages() -> dict[int, int]:
    """Bytes of every tensor's memory in this process, by its address; a memory that several share counts once."""
    gc.collect()
    found: dict[int, int] = {}
    for one in gc.get_objects():
        # By type alone: asking strange objects for anything more may warn.
        if type(one) in (Tensor, nn.Parameter) and one.layout is torch.strided:
            storage = one.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found


def allocated(run: Callable[[], object]) -> tuple[int, int]:
    """Run and return by how many bytes the CPU allocator's memory has grown at the end, and at most."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    kineto = profiler.profiler
    assert kineto is not None
    assert kineto.kineto_results is not None
    events = [(e.start_ns(), e.nbytes()) for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for _, nbytes in sorted(events, key=lambda event: event[0]):
        now += nbytes
        peak = max(peak, now)
    return now, peak
