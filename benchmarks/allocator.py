"""What torch's CPU allocator was asked for."""

from __future__ import annotations

from collections.abc import Callable

import torch


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
