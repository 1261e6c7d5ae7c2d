"""A sharded optimizer is a torch optimizer: schedulers, hooks, closures, groups, autograd's checks."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from oracle import AwkwardModel, assert_same, averaged_gradients, batch
from ranks import run_ranks
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sharded_adopt import ADOPT, ShardedADOPT, ShardedOptimizer


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def with_scheduler(rank: int, world_size: int) -> tuple[list[Tensor], list[float]]:
    model = AwkwardModel()
    optimizer = ShardedADOPT(model.named_parameters(), lr=0.05)
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=6)
    seen = []
    for step in range(5):
        optimizer.zero_grad()
        model(*batch(step, rank)).backward()
        optimizer.step()
        scheduler.step()
        seen.append(optimizer.param_groups[0]["lr"])
    return values(model), seen


def test_a_scheduler_moves_lr_and_betas_on_every_rank() -> None:
    # T16
    model = AwkwardModel()
    optimizer = ADOPT(model.named_parameters(), lr=0.05)
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=6)
    seen = []
    for step in range(5):
        for p, mean in zip(
            model.parameters(), averaged_gradients(model, [batch(step, r) for r in range(2)]), strict=True
        ):
            p.grad = mean
        optimizer.step()
        scheduler.step()
        seen.append(optimizer.param_groups[0]["lr"])
    for ours, lrs in run_ranks(2, with_scheduler):
        assert lrs == seen
        assert_same(ours, values(model))


def edit(optimizer: torch.optim.Optimizer, step: int) -> None:
    group = optimizer.param_groups[0]
    if step == 1:
        group["lr"] = 0.2
    elif step == 2:
        group["betas"] = (0.5, 0.5)
    elif step == 3:
        group["clip_lambda"] = None
        group["weight_decay"] = 0.1
    elif step == 4:
        group["lr"] = 0.0
    elif step == 5:
        group["lr"] = torch.tensor(0.03)


def with_edits(rank: int, world_size: int) -> list[Tensor]:
    model = AwkwardModel()
    optimizer = ShardedADOPT(model.named_parameters(), lr=0.05)
    for step in range(7):
        edit(optimizer, step)
        optimizer.zero_grad()
        model(*batch(step, rank)).backward()
        optimizer.step()
    return values(model)


def test_an_edited_hyperparameter_counts_from_the_next_step() -> None:
    # T16
    model = AwkwardModel()
    optimizer = ADOPT(model.named_parameters(), lr=0.05)
    for step in range(7):
        edit(optimizer, step)
        means = averaged_gradients(model, [batch(step, r) for r in range(2)])
        for p, mean in zip(model.parameters(), means, strict=True):
            p.grad = mean
        optimizer.step()
    for ours in run_ranks(2, with_edits):
        assert_same(ours, values(model))


@pytest.mark.parametrize("cls", [ADOPT, torch.optim.AdamW])
def test_hooks_fire_once_a_step(cls: type[torch.optim.Optimizer]) -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = ShardedOptimizer([param], cls, lr=0.1)
    calls: list[str] = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre")),
        optimizer.register_step_post_hook(lambda *_: calls.append("post")),
        register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
        optimizer.register_state_dict_pre_hook(lambda *_: calls.append("save")),
        optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded")),
    ]
    try:
        param.grad = torch.ones(3)
        optimizer.step()
        assert sorted(calls) == ["global post", "global pre", "post", "pre"]
        calls.clear()
        optimizer.load_state_dict(optimizer.state_dict())
        assert calls == ["save", "loaded"]
    finally:
        for handle in handles:
            handle.remove()


def test_a_closure_is_called_with_gradients_and_its_loss_returned() -> None:
    # T36
    model = nn.Linear(3, 1)
    optimizer = ShardedADOPT(model.parameters(), lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(3)).sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    second = optimizer.step(closure)
    third = optimizer.step(closure)
    assert first.item() == second.item() > third.item()


def added_group(rank: int, world_size: int) -> tuple[list[Tensor], list[float]]:
    model, extra = AwkwardModel(), nn.Parameter(torch.full((7,), 0.5))
    optimizer = ShardedADOPT(model.named_parameters(), lr=0.05)
    for step in range(6):
        if step == 2:
            before = {k: v.clone() for k, v in optimizer.local_shards()["left"].items()}
            optimizer.add_param_group({"params": [("extra", extra)], "lr": 0.2})
            assert all(torch.equal(v, before[k]) for k, v in optimizer.local_shards()["left"].items())
        optimizer.zero_grad()
        loss = model(*batch(step, rank))
        if step >= 2:
            loss = loss + (extra * (1 + rank) * (step - 3.5)).square().sum()
        loss.backward()
        optimizer.step()
    steps = [float(state["step"]) for state in optimizer.state.values()]
    return [*values(model), extra.detach().clone()], steps


def test_a_group_added_while_training_starts_at_step_0_and_leaves_the_rest() -> None:
    # T18
    model, extra = AwkwardModel(), nn.Parameter(torch.full((7,), 0.5))
    optimizer = ADOPT(model.named_parameters(), lr=0.05)
    for step in range(6):
        if step == 2:
            optimizer.add_param_group({"params": [("extra", extra)], "lr": 0.2})
        for p, mean in zip(
            model.parameters(), averaged_gradients(model, [batch(step, r) for r in range(2)]), strict=True
        ):
            p.grad = mean
        if step >= 2:
            grads = []
            for rank in range(2):
                extra.grad = None
                (extra * (1 + rank) * (step - 3.5)).square().sum().backward()
                grads.append(extra.grad)
            extra.grad = (grads[0] + grads[1]) / 2
        optimizer.step()
    expected = [float(state["step"]) for state in optimizer.state.values()]
    for ours, steps in run_ranks(2, added_group):
        assert_same(ours, [*values(model), extra.detach()])
        assert max(steps) == max(expected)
        assert steps[-1] == 4


def stale_graph(rank: int, world_size: int, dtype: torch.dtype, arguments: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)).to(dtype)
    given = arguments.get("reduce_gradients") is False and world_size > 1
    forward = nn.parallel.DistributedDataParallel(model) if given else model
    optimizer = ShardedADOPT(model.parameters(), lr=0.1, **arguments)
    x = torch.ones(3, dtype=dtype)
    loss = model(x).sum()
    for _ in range(2):
        optimizer.zero_grad()
        forward(x).sum().backward()
        optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


WAYS_TO_WRITE_PARAMETERS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "kept": (torch.float32, {}),
    "freed": (torch.float32, {"shard_gradients": True}),
    "given": (torch.float32, {"reduce_gradients": False}),
    "main values": (torch.bfloat16, {}),
    "no main values": (torch.bfloat16, {"main_params": "none"}),
    "gathered narrow": (torch.float32, {"gather_dtype": torch.bfloat16}),
    "without overlap": (torch.float32, {"overlap_grad_reduce": False}),
}


@pytest.mark.parametrize("way", WAYS_TO_WRITE_PARAMETERS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_backward_through_a_graph_from_before_the_step_raises_as_in_torch(world_size: int, way: str) -> None:
    # T28
    run_ranks(world_size, stale_graph, *WAYS_TO_WRITE_PARAMETERS[way])


def test_a_model_outlives_its_optimizer() -> None:
    model = nn.Linear(3, 2)
    optimizer = ShardedADOPT(model.parameters(), lr=0.1)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    model.zero_grad()
    model(torch.ones(3)).sum().backward()
    second = ShardedADOPT(model.parameters(), lr=0.1)
    second.step()
    assert float(second.state[model.weight]["step"]) == 1


def stock_scaler(rank: int, world_size: int) -> None:
    model = nn.Linear(3, 2)
    optimizer = ShardedADOPT(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(torch.ones(3)).sum()).backward()
    with pytest.raises(RuntimeError, match="reduce_gradients=False"):
        scaler.step(optimizer)
    beside = ShardedADOPT(nn.Linear(3, 2).parameters(), lr=0.1, reduce_gradients=False)
    for p in beside.param_groups[0]["params"]:
        p.grad = torch.full_like(p, 8.0)
    scaler.step(beside)
    assert all(float(state["step"]) == 1 for state in beside.state.values())
    assert all(state["exp_avg_sq"].to_local().eq(1.0).all() for state in beside.state.values()), "unscaled"


def test_the_stock_scaler_raises_natively_and_works_beside_ddp() -> None:
    run_ranks(2, stock_scaler)


def broadcast(rank: int, world_size: int) -> tuple[list[Tensor], Tensor]:
    model = AwkwardModel(seed=rank)
    model.counter.fill_(float(rank + 1))
    model.register_buffer("mask", torch.tensor([rank == 0, True]))
    model.register_buffer("count", torch.tensor(rank))
    model.register_buffer("table", torch.full((3, 2), float(rank)).t())
    ShardedADOPT(model.named_parameters(), module=model)
    assert model.mask.tolist() == [True, True]
    assert model.count.item() == 0
    assert model.table.eq(0).all()
    return values(model), model.counter.clone()


def test_the_first_ranks_parameters_and_buffers_are_everybodys() -> None:
    for params, counter in run_ranks(3, broadcast):
        assert_same(params, values(AwkwardModel(seed=0)))
        assert counter.tolist() == [1.0, 1.0]


def test_names_come_from_the_user_then_the_module_then_the_position() -> None:
    model = nn.Linear(2, 1)

    def names(optimizer: ShardedOptimizer) -> list[str]:
        return [spec.name for spec in optimizer.layout.params]

    assert names(ShardedADOPT([("a", model.weight), ("b", model.bias)])) == ["a", "b"]
    assert names(ShardedADOPT(model.parameters(), module=model)) == ["weight", "bias"]
    assert names(ShardedADOPT(model.parameters())) == ["param.0", "param.1"]


def test_compiled_and_checkpointed_models_train_the_same() -> None:
    from torch.utils.checkpoint import checkpoint

    def run(kind: str) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        optimizer = ShardedADOPT(model.parameters(), lr=0.1, bucket_cap_mb=10 / 2**20)
        for step in range(4):
            optimizer.zero_grad()
            x = torch.full((2, 4), 0.1 * (step + 1), requires_grad=True)
            if kind == "plain":
                y = model(x)
            else:
                y = checkpoint(model, x, use_reentrant=kind == "reentrant")
            y.square().sum().backward()
            optimizer.step()
        return values(model)

    for kind in ("reentrant", "non-reentrant"):
        assert_same(run(kind), run("plain"))
