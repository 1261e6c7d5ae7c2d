"""Figures of a step over several ranks: those of one process on the averaged gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import AwkwardModel, assert_same, averaged_gradients, batch, branch_of
from ranks import run_ranks
from torch import nn
from torch.optim import AdamW

from sharded_adopt import ADOPT, GradScaler, ShardedADOPT, ShardedOptimizer

STEPS = 6
RULES: dict[str, dict[str, Any]] = {
    "default": {"lr": 0.02},
    "nesterov, decay": {"lr": 0.02, "nesterov": True, "weight_decay": 0.1, "clip_lambda": 0.1},
    "by element": {"lr": 0.02, "init": "element", "weight_decay": 0.1, "decouple": True},
}
# Sums are taken in another order by more ranks.
TOLERANCE = {"rel": 1e-5}


def floats(figures: dict[str, torch.Tensor]) -> dict[str, float]:
    assert all(value.shape == () and value.dtype is torch.float32 for value in figures.values())
    return {name: value.item() for name, value in figures.items()}


def one_process(world_size: int, rule: dict[str, Any]) -> list[dict[str, float]]:
    model = AwkwardModel()
    optimizer = ADOPT([p for p in model.parameters() if p.requires_grad], **rule)
    optimizer.stats()
    found = []
    for step in range(STEPS):
        means = averaged_gradients(model, [batch(step, rank, branch_of(step, rank)) for rank in range(world_size)])
        for param, mean in zip(model.parameters(), means, strict=True):
            param.grad = mean
        optimizer.step()
        found.append(floats(optimizer.stats()))
    return found


def sharded(rank: int, world_size: int, rule: dict[str, Any], engine: dict[str, Any]) -> list[dict[str, float]]:
    model = AwkwardModel()
    optimizer = ShardedADOPT([p for p in model.parameters() if p.requires_grad], **rule, **engine)
    assert all(value.isnan() for value in optimizer.stats().values())
    found = []
    for step in range(STEPS):
        optimizer.zero_grad()
        model(*batch(step, rank, branch_of(step, rank))).backward()
        optimizer.step()
        found.append(floats(optimizer.stats()))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("engine", [{}, {"bucket_cap_mb": 1e-4, "shard_gradients": True}], ids=["one bucket", "ZeRO-2"])
def test_the_figures_are_those_of_one_process(rule, engine, world_size) -> None:
    wanted = one_process(world_size, RULES[rule])
    assert wanted[0]["update_rms"] == 0.0
    assert 0.0 < wanted[-1]["clipped_share"] < 1.0
    for found in run_ranks(world_size, sharded, RULES[rule], engine):
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine == pytest.approx(theirs, **TOLERANCE)


def parameters_after(rank: int, world_size: int, record: bool) -> list[torch.Tensor]:
    model = AwkwardModel()
    optimizer = ShardedADOPT(model.named_parameters(), **RULES["nesterov, decay"], bucket_cap_mb=1e-4)
    if record:
        optimizer.stats()
    for step in range(STEPS):
        optimizer.zero_grad()
        model(*batch(step, rank, branch_of(step, rank))).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_recording_does_not_change_a_bit() -> None:
    assert_same(run_ranks(2, parameters_after, True)[1], run_ranks(2, parameters_after, False)[1])


def a_quiet_bucket(rank: int, world_size: int) -> list[float]:
    first, second = nn.Parameter(torch.ones(40)), nn.Parameter(torch.ones(40))
    optimizer = ShardedADOPT([first, second], lr=0.1, bucket_cap_mb=1e-4)
    optimizer.stats()
    norms = []
    for step in range(3):
        optimizer.zero_grad()
        ((first + second).sum() if step < 2 else first.sum()).backward()
        optimizer.step()
        norms.append(optimizer.stats()["grad_norm"].item())
    return norms


def test_a_bucket_without_gradients_does_not_count_with_its_last_ones() -> None:
    for norms in run_ranks(2, a_quiet_bucket):
        assert norms == pytest.approx([80**0.5, 80**0.5, 40**0.5])


def after_clipping(rank: int, world_size: int) -> list[float]:
    param = nn.Parameter(torch.ones(10))
    optimizer = ShardedADOPT([param], lr=0.1)
    optimizer.stats()
    (param.sum() * (1 + 2 * rank)).backward()
    norm = optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    return [norm.item(), optimizer.stats()["grad_norm"].item()]


def test_the_gradient_is_the_clipped_one_that_the_step_used() -> None:
    for found in run_ranks(2, after_clipping):
        assert found == pytest.approx([2 * 10**0.5, 1.0], rel=1e-5)


def scaled(rank: int, world_size: int) -> tuple[dict[str, float], dict[str, float]]:
    param = nn.Parameter(torch.ones(10))
    optimizer, scaler = ShardedADOPT([param], lr=0.1), GradScaler("cpu", init_scale=16.0)
    optimizer.stats()
    found = []
    for step in range(3):
        optimizer.zero_grad()
        factor = torch.inf if step == 2 and rank == 1 else 1.0
        scaler.scale(param.sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append(floats(optimizer.stats()))
    return found[1], found[2]


def test_a_step_that_the_scaler_skips_leaves_them_as_they_were() -> None:
    for before, after in run_ranks(2, scaled):
        assert before == after
        assert before["grad_norm"] == pytest.approx(10**0.5)


def added(rank: int, world_size: int) -> float:
    first, second = nn.Parameter(torch.ones(10)), nn.Parameter(torch.ones(10))
    optimizer = ShardedADOPT([first], lr=0.1)
    optimizer.stats()
    optimizer.add_param_group({"params": [second]})
    (first + second).sum().backward()
    optimizer.step()
    norm = optimizer.stats(False)["grad_norm"].item()
    assert all(value.isnan() for value in optimizer.stats().values())  # it was off
    return norm


def test_parameters_that_were_added_later_count() -> None:
    assert run_ranks(2, added) == pytest.approx([20**0.5] * 2)


def test_another_class_has_no_figures() -> None:
    optimizer = ShardedOptimizer([nn.Parameter(torch.ones(2))], AdamW)
    with pytest.raises(TypeError, match=r"runs AdamW.*clip_grad_norm_"):
        optimizer.stats()


def fsdp(rank: int, world_size: int) -> list[dict[str, float]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    mesh = init_device_mesh("cpu", (world_size,))
    fully_shard(model, mesh=mesh)
    # One that lies whole on every rank must count once.
    extra = nn.Parameter(DTensor.from_local(torch.linspace(1.0, 2.0, 4), mesh, [Replicate()]))
    return fsdp_figures(model, extra)


def fsdp_figures(model: nn.Module, extra: nn.Parameter) -> list[dict[str, float]]:
    optimizer = ADOPT([*model.parameters(), extra], lr=0.02, weight_decay=0.1)
    optimizer.stats()
    found = []
    for step in range(4):
        optimizer.zero_grad()
        inputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
        model(inputs).square().mean().backward()
        extra.grad = extra.detach() * (step + 1)
        optimizer.step()
        found.append(floats(optimizer.stats()))
    return found


def test_with_dtensors_the_figures_are_of_whole_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    wanted = fsdp_figures(model, nn.Parameter(torch.linspace(1.0, 2.0, 4)))
    for found in run_ranks(2, fsdp):
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine == pytest.approx(theirs, **TOLERANCE)
