"""Coming from AdamW with several ranks: what ADOPT.from_adamw gives in one process, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adopt_cases import same_bits
from oracle import (
    AwkwardModel,
    assert_same,
    averaged_gradients,
    batch,
    branch_of,
    train_sharded,
)
from ranks import RanksFailed, run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam, AdamW

from sharded_adopt import ADOPT, ShardedADOPT, ShardedOptimizer

BEFORE, AFTER = range(4), range(4, 8)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "amsgrad": {"amsgrad": True, "betas": (0.8, 0.95)},
    "maximize": {"maximize": True, "eps": 1e-3},
}


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [{"params": params[::2]}, {"params": params[1::2], "lr": 0.03, "weight_decay": 0.0}]


def adam_of(model: nn.Module, adam: type = AdamW, **options: Any) -> torch.optim.Optimizer:
    return adam(groups_of(model), lr=0.01, weight_decay=0.1, foreach=False, **options)


def step_unsharded(model: nn.Module, optimizer: torch.optim.Optimizer, world_size: int, steps: range) -> None:
    for step in steps:
        means = averaged_gradients(model, [batch(step, rank, branch_of(step, rank)) for rank in range(world_size)])
        for param, mean in zip(model.parameters(), means, strict=True):
            param.grad = mean if param.requires_grad else None
        optimizer.step()


def one_process(world_size: int, adam: type, options: dict[str, Any], overrides: dict[str, Any]) -> Any:
    model = AwkwardModel()
    optimizer = adam_of(model, adam, **options)
    step_unsharded(model, optimizer, world_size, BEFORE)
    ours = ADOPT.from_adamw(optimizer, **overrides)
    at_the_switch = {key: dict(state) for key, state in ours.state_dict()["state"].items()}
    at_the_switch = {i: {k: v.clone() for k, v in state.items()} for i, state in at_the_switch.items()}
    step_unsharded(model, ours, world_size, AFTER)
    return [p.detach().clone() for p in model.parameters()], ours.state_dict(), at_the_switch


# How the ranks come to the switch. Each trains by AdamW before and returns (model, sharded ADOPT).


def from_sharded(rank: int, world_size: int, adam: type, options: Any, overrides: Any) -> Any:
    model = AwkwardModel()
    old = ShardedOptimizer(
        groups_of(model), adam, lr=0.01, weight_decay=0.1, foreach=False, bucket_cap_mb=1e-4, **options
    )
    train_sharded(model, old, rank, BEFORE)
    return model, ShardedADOPT.from_adamw(old, **overrides)


def from_live(rank: int, world_size: int, adam: type, options: Any, overrides: Any) -> Any:
    model = AwkwardModel()
    old = adam_of(model, adam, **options)
    step_unsharded(model, old, world_size, BEFORE)
    return model, ShardedADOPT.from_adamw(old, module=model, bucket_cap_mb=1e-4, **overrides)


def from_state_dict(rank: int, world_size: int, adam: type, options: Any, overrides: Any) -> Any:
    model = AwkwardModel()
    old = adam_of(model, adam, **options)
    step_unsharded(model, old, world_size, BEFORE)
    return model, ShardedADOPT.from_adamw(old.state_dict(), groups_of(model), shard_gradients=True, **overrides)


def from_shards(rank: int, world_size: int, adam: type, options: Any, overrides: Any) -> Any:
    model = AwkwardModel()
    old = ShardedOptimizer(groups_of(model), adam, lr=0.01, weight_decay=0.1, foreach=False, **options)
    train_sharded(model, old, rank, BEFORE)
    state_dict = old.state_dict()
    again = AwkwardModel()
    again.load_state_dict(model.state_dict())
    return again, ShardedADOPT.from_adamw(state_dict, params=groups_of(again), **overrides)


def go_on(rank: int, world_size: int, come: Callable[..., Any], *args: Any) -> Any:
    model, ours = come(rank, world_size, *args)
    at_the_switch = ours.full_state_dict(rank0_only=False)["state"]
    train_sharded(model, ours, rank, AFTER)
    return [p.detach().clone() for p in model.parameters()], ours.full_state_dict(rank0_only=False), at_the_switch


def same_states(ours: dict[int, Any], theirs: dict[int, Any]) -> None:
    for index, state in theirs.items():
        assert set(ours[index]) == set(state)
        for key, value in state.items():
            assert same_bits(ours[index][key].reshape(value.shape), value), (index, key)
    for index in set(ours) - set(theirs):  # a parameter that has never had a gradient: not yet stepped
        assert not any(value.any() for value in ours[index].values())


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("come", [from_sharded, from_live, from_state_dict, from_shards])
def test_sharded_equals_one_process_to_the_bit(come, world_size) -> None:
    overrides = {"clip_lambda": 0.5, "nesterov": True}
    params, state_dict, at_the_switch = one_process(world_size, AdamW, {}, overrides)
    for mine, full, first in run_ranks(world_size, go_on, come, AdamW, {}, overrides):
        same_states(first, at_the_switch)
        assert_same(mine, params)
        same_states(full["state"], state_dict["state"])
        for group, theirs in zip(full["param_groups"], state_dict["param_groups"], strict=True):
            assert {k: v for k, v in group.items() if k != "params"} == {
                k: v for k, v in theirs.items() if k != "params"
            }


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("come", [from_sharded, from_live])
def test_every_kind_of_adam_is_continued_as_in_one_process(come, options) -> None:
    adam = Adam if options == "maximize" else AdamW
    params, state_dict, _ = one_process(2, adam, OPTIONS[options], {})
    for mine, full, _ in run_ranks(2, go_on, come, adam, OPTIONS[options], {}):
        assert_same(mine, params)
        same_states(full["state"], state_dict["state"])


def _engine_stays(rank: int, world_size: int) -> Any:
    model = AwkwardModel()
    old = ShardedOptimizer(model.named_parameters(), AdamW, lr=0.01)
    train_sharded(model, old, rank, BEFORE)
    where = [p.data_ptr() for p in model.parameters()]
    shards = {k: v["exp_avg"].data_ptr() for k, v in old.local_shards().items() if v["exp_avg"].numel()}
    group = old.collectives
    model(*batch(4, rank)).backward()  # a gradient that is under way is not lost
    new = ShardedADOPT.from_adamw(old)
    assert isinstance(new, ShardedADOPT)
    assert new.optimizer_class is ADOPT
    assert new.collectives is group
    assert [p.data_ptr() for p in model.parameters()] == where
    assert {k: v["exp_avg"].data_ptr() for k, v in new.local_shards().items() if v["exp_avg"].numel()} == shards
    before = model.embedding.detach().clone()
    new.step()
    new.zero_grad()
    assert not torch.equal(model.embedding, before)
    for use in (old.step, old.state_dict, old.synchronize_gradients, old.zero_grad):
        with pytest.raises(RuntimeError, match="handed its shards over"):
            use()
    train_sharded(model, new, rank, AFTER)
    return [p.detach().clone() for p in model.parameters()]


def test_a_sharded_adamw_hands_over_its_engine_where_it_stands() -> None:
    first, second = run_ranks(2, _engine_stays)
    assert_same(first, second)


def _under_ddp(rank: int, world_size: int) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
    wrapped = DistributedDataParallel(model)
    optimizer: torch.optim.Optimizer = AdamW(model.parameters(), lr=0.01)
    for step in range(6):
        if step == 3:
            optimizer = ShardedADOPT.from_adamw(optimizer, reduce_gradients=False)
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * step + rank))
        optimizer.zero_grad()
        wrapped(inputs).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_under_ddp_it_goes_on_beside_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
    optimizer: torch.optim.Optimizer = AdamW(model.parameters(), lr=0.01)
    for step in range(6):
        if step == 3:
            optimizer = ADOPT.from_adamw(optimizer)
        optimizer.zero_grad()
        for rank in range(2):
            inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * step + rank))
            (model(inputs).square().mean() / 2).backward()
        optimizer.step()
    for params in run_ranks(2, _under_ddp):
        assert_same(params, list(model.parameters()), rtol=1e-5, atol=1e-6)  # the norm of a batch is summed otherwise


def _beside_ddp(rank: int, world_size: int) -> None:
    model = nn.Linear(5, 7)
    wrapped = DistributedDataParallel(model)
    optimizer = ShardedADOPT.from_adamw(AdamW(model.parameters(), lr=0.01))
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(torch.ones(4, 5) * (1 + rank)).square().mean().backward()
        optimizer.step()


def test_ddp_that_was_left_around_the_model_is_named_in_the_error() -> None:
    with pytest.raises(RanksFailed, match=r"DistributedDataParallel is around the model.*train its \.module") as failed:
        run_ranks(2, _beside_ddp)
    assert str(failed.value).count("or make this optimizer with reduce_gradients=False") == 2


def _sixteen_bit(rank: int, world_size: int, how: str) -> Any:
    torch.manual_seed(0)
    model = nn.Linear(6, 5).to(torch.bfloat16)
    old = ShardedOptimizer(model.parameters(), AdamW, lr=1e-3)

    def train(optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            for param in model.parameters():
                param.grad = None
            inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank)).to(torch.bfloat16)
            model(inputs).float().square().mean().backward()
            optimizer.step()

    train(old, range(4))
    main = {name: shard["param"].clone() for name, shard in old.local_shards().items()}
    if how == "live":
        new = ShardedADOPT.from_adamw(old)
    else:
        state_dict = old.state_dict()
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        again = nn.Linear(6, 5).to(torch.bfloat16)
        again.load_state_dict(model.state_dict())
        model = again
        new = ShardedADOPT.from_adamw(state_dict, params=model.parameters())
    for name, shard in new.local_shards().items():
        assert shard["param"].dtype is torch.float32
        assert same_bits(shard["param"], main[name])  # the main values, not their rounding
    train(new, range(4, 8))
    return [p.detach().clone() for p in model.parameters()]


def test_main_values_of_16_bit_parameters_are_kept() -> None:
    assert_same(run_ranks(2, _sixteen_bit, "live")[0], run_ranks(2, _sixteen_bit, "shards")[0])


def _other_on_one_rank(model: nn.Module, rank: int) -> ShardedOptimizer:
    adamw = adam_of(model)
    step_unsharded(model, adamw, 1, range(1 + rank))
    return ShardedADOPT.from_adamw(adamw)


WRONG: dict[str, tuple[str, Callable[[nn.Module, int], Any]]] = {
    "state dict on one rank": (
        "'state' and 'param_groups'",
        lambda model, rank: ShardedADOPT.from_adamw({} if rank else adam_of(model).state_dict(), groups_of(model)),
    ),
    "another step on one rank": ("step", _other_on_one_rank),
    "another optimizer": (
        "SGD",
        lambda model, rank: ShardedADOPT.from_adamw(torch.optim.SGD(model.parameters(), lr=0.1)),
    ),
    "sharded SGD": (
        "SGD",
        lambda model, rank: ShardedADOPT.from_adamw(ShardedOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)),
    ),
    "engine argument": (
        "shard_gradients",
        lambda model, rank: ShardedADOPT.from_adamw(ShardedOptimizer(model.parameters(), AdamW), shard_gradients=True),
    ),
    "another lr on one rank": (
        "lr",
        lambda model, rank: ShardedADOPT.from_adamw(ShardedOptimizer(model.parameters(), AdamW), lr=0.1 * (rank + 1)),
    ),
}


def _refused(rank: int, world_size: int, wrong: str) -> str:
    with pytest.raises((ValueError, TypeError)) as caught:
        WRONG[wrong][1](AwkwardModel(), rank)
    return str(caught.value)


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_said_on_every_rank(wrong) -> None:
    for message in run_ranks(2, _refused, wrong, timeout=20.0):
        assert WRONG[wrong][0] in message


def test_an_optimizer_that_was_refused_can_still_be_used() -> None:
    model = AwkwardModel()
    old = ShardedOptimizer(model.named_parameters(), AdamW, lr=0.01)
    with pytest.raises(ValueError, match="betas"):
        ShardedADOPT.from_adamw(old, betas=(2.0, 0.9))
    train_sharded(model, old, 0, BEFORE)
    with pytest.raises(TypeError, match=r"ShardedOptimizer holds shards of AdamW.*call ShardedADOPT\.from_adamw"):
        ADOPT.from_adamw(old)


def _fsdp(rank: int, world_size: int) -> list[torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = _small_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    _through_the_switch(model)
    return [param.full_tensor().detach() for param in model.parameters()]  # type: ignore[attr-defined]


def _small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def _through_the_switch(model: nn.Module) -> None:
    optimizer: torch.optim.Optimizer = AdamW(model.parameters(), lr=0.01, foreach=False)
    for step in range(6):
        if step == 3:
            optimizer = ADOPT.from_adamw(optimizer, state_dtype=(torch.float32, torch.bfloat16))
        optimizer.zero_grad()
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        model(inputs).square().mean().backward()  # the same batch on each rank: the mean over ranks is exact
        optimizer.step()


def test_adamw_over_fsdp2_is_continued_on_its_dtensors() -> None:
    model = _small_model()
    _through_the_switch(model)
    for params in run_ranks(2, _fsdp):
        assert_same(params, list(model.parameters()))


@pytest.mark.parametrize("sharded_before", [False, True])
def test_a_zero_gradient_right_after_the_switch_is_a_step_and_no_dummy(sharded_before) -> None:
    param = nn.Parameter(torch.ones(3))
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.0}
    old = ShardedOptimizer([param], AdamW, **options) if sharded_before else AdamW([param], **options)
    param.sum().backward()
    old.step()
    new = ShardedADOPT.from_adamw(old)
    new.zero_grad()
    before = param.detach().clone()
    (0 * param.sum()).backward()
    new.step()
    assert new.full_state_dict()["state"][0]["step"] == 2
    torch.testing.assert_close(param.detach(), before - 0.1 * 0.9)  # momentum goes on
