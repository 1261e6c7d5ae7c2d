"""What the tests in hosts share: a rank as torchrun starts one, and the oracle of hosts that accumulate and clip."""

from __future__ import annotations

import os
import socket

import torch
from torch import Tensor, nn

from sharded_adopt import ADOPT

STEPS = 6
MICRO = 2  # backwards in a step
MAX_NORM = 0.5
OPTIONS = {"lr": 0.05, "betas": (0.9, 0.99), "weight_decay": 0.1, "decouple": True}


def as_torchrun_rank(rank: int, world_size: int) -> None:
    """Set what torchrun sets in a forked rank, and let accelerate forget what it knew before the fork."""
    from accelerate.state import AcceleratorState, GradientState

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    os.environ.update(TORCHELASTIC_RUN_ID="forked", GROUP_RANK="0")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def free_port() -> int:
    """A port for a launcher that cannot choose one by itself."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))


def micro_batch(step: int, micro: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
    return torch.randn(3, 4, generator=generator)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = (model(x) - x.sum(1, keepdim=True)).square().mean()
    return loss


def expected(world_size: int, clips: bool = True) -> list[Tensor]:
    """One process on the averaged gradient: what every host must train to, bit for bit."""
    model = make_net()
    optimizer = ADOPT(model.parameters(), **OPTIONS)
    for step in range(STEPS):
        per_rank = []
        for rank in range(world_size):
            model.zero_grad()
            for micro in range(MICRO):
                (loss_of(model, micro_batch(step, micro, rank)) / MICRO).backward()
            per_rank.append([p.grad for p in model.parameters()])
        for p, *grads in zip(model.parameters(), *per_rank, strict=True):
            p.grad = torch.stack(grads).sum(0) / world_size
        if clips:
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
    return values(model)


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_same_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
