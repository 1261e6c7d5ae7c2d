"""Scalars of a training run in TensorBoard's files, read back as TensorBoard does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

pytest.importorskip("tensorboard", reason="tensorboard is not installed: make ecosystem")

from sharded_adopt import ShardedADOPT


def logged(rank: int, world_size: int, directory: Path) -> list[dict[str, float]]:
    from torch.utils.tensorboard import SummaryWriter

    torch.manual_seed(rank)
    model = nn.Linear(4, 1)
    optimizer = ShardedADOPT(model.parameters(), lr=0.1)
    optimizer.stats()  # from now on they are recorded
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    rows = []
    with SummaryWriter(str(directory / f"rank{rank}")) as writer:
        for step in range(4):
            optimizer.zero_grad()
            loss = model(torch.randn(3, 4)).square().mean()
            loss.backward()
            scalars = {
                "loss": loss.detach(),
                "lr": torch.tensor(optimizer.param_groups[0]["lr"]),
            }
            optimizer.step()
            scalars.update(optimizer.stats())
            scheduler.step()
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)
            rows.append({name: value.item() for name, value in scalars.items()})
    return rows


def test_loss_rate_and_stats_are_in_the_event_file(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for rank, rows in enumerate(run_ranks(2, logged, tmp_path)):
        events: Any = EventAccumulator(str(tmp_path / f"rank{rank}"))
        events.Reload()
        for name in ("loss", "lr", "update_rms", "clipped_share", "grad_norm"):
            assert [(event.step, event.value) for event in events.Scalars(name)] == list(
                enumerate(row[name] for row in rows)
            )
