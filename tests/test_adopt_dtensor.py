"""ADOPT on DTensor parameters: FSDP2 over two ranks against one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adopt_cases import same_bits
from ranks import run_ranks
from torch import nn

from sharded_adopt import ADOPT

STEPS = 5


def make_model() -> nn.Sequential:
    """Odd sizes: 7 and 3 rows do not halve, and of the single row of the last layer rank 1 owns nothing."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1))


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 5, generator=generator) for _ in range(STEPS)]


def shard(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for batch in batches():
        optimizer.zero_grad()
        model(batch).square().mean().backward()  # the same batch on each rank: the mean over ranks is exact
        optimizer.step()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def full_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[torch.Tensor, ...]]:
    names = ("exp_avg", "exp_avg_sq", "step")
    return [
        tuple(whole(t).detach().clone() for t in (p, *(optimizer.state[p][n] for n in names)))
        for p in model.parameters()
    ]


def on_two_ranks(rank: int, world_size: int, options: dict[str, Any]) -> list[tuple[torch.Tensor, ...]]:
    model = shard(make_model())
    optimizer = ADOPT(model.parameters(), lr=0.1, **options)
    train(model, optimizer)
    return full_state(model, optimizer)


@pytest.mark.parametrize("foreach", [True, False, None])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1, "decouple": True, "nesterov": True},
        {"state_dtype": torch.bfloat16},
        {"capturable": True, "init": "element"},
    ],
    ids=["plain", "decay nesterov", "bf16 state", "capturable element"],
)
def test_fsdp2_on_two_ranks_equals_one_process_to_the_bit(foreach, options):
    """With bf16 state too: the rounding bits are those of the element's place in the whole parameter."""
    model = make_model()
    optimizer = ADOPT(model.parameters(), lr=0.1, foreach=foreach, **options)
    train(model, optimizer)
    expected = full_state(model, optimizer)
    for got in run_ranks(2, on_two_ranks, {"foreach": foreach, **options}):
        for mine, theirs in zip(got, expected, strict=True):
            assert all(same_bits(a, b) for a, b in zip(mine, theirs, strict=True))


def verdict_of(rank: int, world_size: int, capturable: bool, zero_ranks: tuple[int, ...]) -> list[float]:
    model = shard(make_model())
    optimizer = ADOPT(model.parameters(), capturable=capturable)
    model(batches()[0]).sum().backward()
    for p in model.parameters():
        if rank in zero_ranks:
            p.grad.to_local().zero_()
    optimizer.step()
    return [optimizer.state[p]["step"].item() for p in model.parameters()]


@pytest.mark.parametrize("capturable", [False, True])
def test_dummy_verdict_is_one_for_the_mesh(capturable):
    """Rank 1's shards are all zero, rank 0's are not: that is a real step on both."""
    for zero_ranks, step in (((), 1.0), ((0,), 1.0), ((1,), 1.0), ((0, 1), 0.0)):
        assert run_ranks(2, verdict_of, capturable, zero_ranks) == [[step] * 6] * 2


def with_scaler(rank: int, world_size: int, overflow_on: int | None) -> tuple[list[Any], float]:
    model = shard(make_model())
    optimizer = ADOPT(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step, batch in enumerate(batches()):
        optimizer.zero_grad()
        scaler.scale(model(batch).square().mean()).backward()
        if step == 2 and rank == overflow_on:
            next(model.parameters()).grad.to_local().fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
    return full_state(model, optimizer), scaler.get_scale()


def test_an_overflow_in_one_ranks_shard_skips_the_step_on_both():
    plain = [state for state, _ in run_ranks(2, with_scaler, None)]
    results = run_ranks(2, with_scaler, 1)
    assert [scale for _, scale in results] == [2.0**7] * 2
    for state, _ in results:
        assert [step.item() for *_, step in state] == [STEPS - 1.0] * 6
        assert all(v.isfinite().all() for _, _, v, _ in state)
    assert [step.item() for *_, step in plain[0]] == [float(STEPS)] * 6


def through_dcp(rank: int, world_size: int, options: dict[str, Any]) -> tuple[list[Any], list[Any], list[float]]:
    from torch.distributed.checkpoint import state_dict as dcp

    model = shard(make_model())
    optimizer = ADOPT(model.parameters(), lr=0.1, **options)
    full = dcp.StateDictOptions(full_state_dict=True)
    fresh = dcp.get_optimizer_state_dict(model, optimizer, options=full)
    first_steps = [optimizer.state[p]["step"].item() for p in model.parameters()]
    train(model, optimizer)
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer, options=full))
    model.zero_grad()  # DCP allocates the state of an optimizer only while there are no gradients
    other = ADOPT(model.parameters(), lr=9.0)
    dcp.set_optimizer_state_dict(model, other, saved, options=full)
    assert other.param_groups[0]["lr"] == 0.1
    assert rank != 0 or len(fresh["state"]) == 6
    return full_state(model, optimizer), full_state(model, other), first_steps


@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.bfloat16, "clip_lambda": 0.5}])
def test_dcp_reads_and_writes_the_state_of_sharded_parameters(options):
    """Asking a fresh optimizer for its state makes DCP take a dummy step; it must not become the first one."""
    model = make_model()
    optimizer = ADOPT(model.parameters(), lr=0.1, **options)
    train(model, optimizer)
    expected = full_state(model, optimizer)
    for trained, loaded, first_steps in run_ranks(2, through_dcp, options):
        assert first_steps == [0.0] * 6
        for got in (trained, loaded):
            for mine, theirs in zip(got, expected, strict=True):
                assert all(same_bits(a, b) for a, b in zip(mine, theirs, strict=True))


def placed_otherwise(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    from sharded_adopt.dtensor import local_grad

    mesh = init_device_mesh("cpu", (world_size,))
    p = distribute_tensor(torch.zeros(4, 3), mesh, [Shard(0)])
    partial = DTensor.from_local(torch.full((4, 3), float(rank + 1)), mesh, [Partial()])
    replicated = DTensor.from_local(torch.arange(12.0).view(4, 3), mesh, [Replicate()])
    return local_grad(p, partial), local_grad(p, replicated)


def test_gradient_placed_otherwise_than_its_parameter_is_redistributed():
    for rank, (summed, rows) in enumerate(run_ranks(2, placed_otherwise)):
        assert summed.equal(torch.full((2, 3), 3.0))
        assert rows.equal(torch.arange(12.0).view(4, 3)[2 * rank : 2 * rank + 2])


def starts(rank: int, world_size: int) -> list[int]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from sharded_adopt.dtensor import element_start

    mesh = init_device_mesh("cpu", (world_size,))
    made = [distribute_tensor(torch.zeros(shape), mesh, [Shard(0)]) for shape in ((7, 5), (4,), (1, 3), (2, 2, 2))]
    return [element_start(t) for t in (*made, distribute_tensor(torch.zeros(7, 5), mesh, [Replicate()]), torch.ones(3))]


def test_element_start_is_the_row_major_index_of_the_local_shard():
    assert run_ranks(2, starts) == [[0, 0, 0, 0, 0, 0], [20, 2, 3, 4, 0, 0]]
