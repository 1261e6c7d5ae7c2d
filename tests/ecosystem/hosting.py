"""A forked rank made to look to a host as if torchrun had started it."""

from __future__ import annotations

import os


def as_torchrun_rank(rank: int, world_size: int) -> None:
    """Set what torchrun sets, and let accelerate forget what it knew before the fork."""
    from accelerate.state import AcceleratorState, GradientState

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
