"""The work of the update kernels is divided evenly, whatever the sizes of the parameters."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from test_memory_plan import Model

from sharded_adopt import ADOPT, ShardedADOPT


def count_elements(rank: int, world_size: int) -> tuple[int, int]:
    """Elements that the kernels of this rank update in a step, and those of the model."""
    model = Model()
    optimizer = ShardedADOPT(model.named_parameters(), lr=1e-3, bucket_cap_mb=0.5)
    updated = 0
    step = ADOPT.step

    def counting(self: ADOPT) -> None:
        nonlocal updated
        updated += sum(p.numel() for group in self.param_groups for p in group["params"] if p.grad is not None)
        step(self)

    model(torch.tensor([rank])).backward()
    ADOPT.step = counting  # type: ignore[method-assign, assignment]
    optimizer.step()
    ADOPT.step = step  # type: ignore[method-assign]
    return updated, sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_kernels_of_a_rank_update_one_in_w_elements(world_size: int) -> None:
    # Elements and not time: a machine that is shared has none to compare. Time is in benchmarks/scaling.py.
    found = run_ranks(world_size, count_elements)
    (numel,) = {numel for _, numel in found}
    assert sum(updated for updated, _ in found) == numel
    assert max(updated for updated, _ in found) <= 1.005 * numel / world_size
