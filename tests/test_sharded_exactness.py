"""Sharded training is one process on the averaged gradient, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import (
    STEPS,
    AwkwardModel,
    Batch,
    assert_same,
    averaged_gradients,
    batch,
    branch_of,
    train_sharded,
    train_unsharded,
)
from ranks import run_ranks
from torch import Tensor, nn

from sharded_adopt import ADOPT, ShardedADOPT, ShardedOptimizer

WORLD_SIZES = [1, 2, 3, 4]
ONE_BUCKET, MANY_BUCKETS = 25.0, 100 / 2**20

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adopt": (ADOPT, {"lr": 0.05}),
    "adopt-l2-nesterov": (ADOPT, {"lr": 0.05, "weight_decay": 0.1, "nesterov": True, "betas": (0.8, 0.5)}),
    "adopt-decoupled": (ADOPT, {"lr": 0.05, "weight_decay": 0.1, "decouple": True, "clip_lambda": None}),
    "adopt-element": (ADOPT, {"lr": 0.05, "init": "element", "maximize": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.05, "amsgrad": True}),
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5}),
}


def grouped(model: nn.Module) -> list[dict[str, Any]]:
    """Three groups with their own values, none of them in the order of the buckets."""
    named = dict(model.named_parameters())
    first = ["right", "scale", "empty"]
    second = ["kernel", "pair"]
    rest = [name for name in named if name not in first + second]
    return [
        {"params": [(n, named[n]) for n in first], "lr": 0.02},
        {"params": [(n, named[n]) for n in second], "weight_decay": 0.3},
        {"params": [(n, named[n]) for n in rest]},
    ]


def train(
    rank: int, world_size: int, name: str, cap: float, groups: bool, overlap: bool, frees: bool
) -> tuple[list[Tensor], dict[str, Any]]:
    cls, arguments = OPTIMIZERS[name]
    model = AwkwardModel(seed=rank)  # only the first rank's values count
    optimizer = ShardedOptimizer(
        grouped(model) if groups else model.named_parameters(),
        cls,
        module=model,
        bucket_cap_mb=cap,
        overlap_grad_reduce=overlap,
        shard_gradients=frees,
        **arguments,
    )
    before = [p.stride() for p in model.parameters()]
    assert before == [p.stride() for p in AwkwardModel().parameters()], "strides are kept"
    train_sharded(model, optimizer, rank, range(STEPS))
    assert before == [p.stride() for p in model.parameters()]
    assert model.head is model.embedding
    return [p.detach().clone() for p in model.parameters()], optimizer.full_state_dict(rank0_only=False)


def assert_equals_one_process(
    world_size: int, name: str, cap: float, groups: bool = False, overlap: bool = True, frees: bool = False
) -> None:
    cls, arguments = OPTIMIZERS[name]
    params_of: Callable[[nn.Module], Any] = grouped if groups else lambda model: model.named_parameters()
    expected, expected_state = train_unsharded(lambda m: cls(params_of(m), **arguments), world_size)
    for params, state in run_ranks(world_size, train, name, cap, groups, overlap, frees):
        assert_same(params, expected)
        assert state["param_groups"] == expected_state["param_groups"]
        for index, entries in expected_state["state"].items():
            assert set(entries) == set(state["state"][index])
            for key, value in entries.items():
                assert torch.equal(torch.as_tensor(state["state"][index][key]), torch.as_tensor(value)), (index, key)


@pytest.mark.parametrize("cap", [ONE_BUCKET, MANY_BUCKETS], ids=["one-bucket", "many-buckets"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_world_size_equals_one_process_bit_for_bit(name: str, world_size: int, cap: float) -> None:
    # T2, T6, T11
    assert_equals_one_process(world_size, name, cap)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", ["adopt", "adamw"])
def test_groups_with_their_own_values_equal_one_process(name: str, world_size: int) -> None:
    assert_equals_one_process(world_size, name, MANY_BUCKETS, groups=True)


@pytest.mark.parametrize("frees", [False, True], ids=["kept", "freed"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_without_overlap_the_result_is_the_same(world_size: int, frees: bool) -> None:
    assert_equals_one_process(world_size, "adopt", MANY_BUCKETS, overlap=False, frees=frees)


@pytest.mark.parametrize("cap", [ONE_BUCKET, MANY_BUCKETS], ids=["one-bucket", "many-buckets"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", ["adopt", "adopt-l2-nesterov", "adamw"])
def test_freeing_gradients_changes_no_bit(name: str, world_size: int, cap: float) -> None:
    assert_equals_one_process(world_size, name, cap, groups=True, frees=True)


def one_and_the_same_batch(rank: int, world_size: int) -> list[Tensor]:
    model = AwkwardModel()
    optimizer = ShardedADOPT(model.named_parameters(), lr=0.05, weight_decay=0.1, decouple=True)
    train_sharded(model, optimizer, rank, range(STEPS), lambda step, _: batch(step, 0, branch_of(step, 0)))
    return [p.detach().clone() for p in model.parameters()]


def test_two_ranks_on_the_same_data_equal_one_rank_bit_for_bit() -> None:
    alone = run_ranks(1, one_and_the_same_batch)[0]
    for params in run_ranks(2, one_and_the_same_batch):
        assert_same(params, alone)


def in_double(rank: int, world_size: int) -> list[Tensor]:
    torch.set_default_dtype(torch.float64)
    model = AwkwardModel().double()
    optimizer = ShardedADOPT(model.parameters(), lr=0.05)
    for step in range(4):
        tokens, image, branch = batch(step, rank)
        optimizer.zero_grad()
        model(tokens, image.double(), branch).backward()
        optimizer.step()
    assert all(s["exp_avg"].dtype is torch.float64 for s in optimizer.state.values())
    return [p.detach().clone() for p in model.parameters()]


def test_fp64_parameters_have_fp64_state_and_agree_over_ranks() -> None:
    first, second = run_ranks(2, in_double)
    assert_same(first, second)
    assert first[0].dtype is torch.float64


def complex_parameters(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.randn(5, 3, dtype=torch.complex64, generator=generator))
    twin = nn.Parameter(param.detach().clone())
    optimizer = ShardedADOPT([param], lr=0.1)
    oracle = ADOPT([twin], lr=0.1)
    for _ in range(5):
        grads = [torch.randn(5, 3, dtype=torch.complex64, generator=generator) for _ in range(world_size)]
        param.grad = grads[rank].clone()
        twin.grad = sum(grads[1:], grads[0]) / world_size
        optimizer.step()
        optimizer.zero_grad()
        oracle.step()
    return param.detach().clone(), twin.detach().clone()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_complex_parameters_equal_one_process(world_size: int) -> None:
    # T13
    for ours, theirs in run_ranks(world_size, complex_parameters):
        assert torch.equal(ours, theirs)


def beside_ddp(rank: int, world_size: int) -> list[Tensor]:
    from torch.nn.parallel import DistributedDataParallel

    model = AwkwardModel()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = ShardedADOPT(model.parameters(), lr=0.05, reduce_gradients=False)
    for step in range(STEPS):
        optimizer.zero_grad()
        wrapped(*batch(step, rank, branch_of(step, rank))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_beside_ddp_gradients_are_taken_as_they_are() -> None:
    model = AwkwardModel()
    optimizer = ADOPT(model.parameters(), lr=0.05)
    for step in range(STEPS):
        means = averaged_gradients(model, [batch(step, rank, branch_of(step, rank)) for rank in range(2)])
        for p, mean in zip(model.parameters(), means, strict=True):
            p.grad = mean
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    for params in run_ranks(2, beside_ddp):
        # DDP divides before it adds, and so rounds differently.
        assert_same(params, [p.detach() for p in model.parameters()], rtol=1e-5, atol=1e-6)


def every_other_batch(step: int, rank: int) -> Batch | None:
    return None if (step + rank) % 2 else batch(step, rank)


def idle_rank(rank: int, world_size: int) -> list[Tensor]:
    model = AwkwardModel()
    optimizer = ShardedADOPT(model.parameters(), lr=0.05, bucket_cap_mb=MANY_BUCKETS)
    train_sharded(model, optimizer, rank, range(STEPS), every_other_batch)
    return [p.detach().clone() for p in model.parameters()]


def test_a_rank_without_a_batch_calls_step_and_counts_as_zero() -> None:
    # T4
    expected, _ = train_unsharded(lambda m: ADOPT(m.parameters(), lr=0.05), 3, batches_of=every_other_batch)
    for params in run_ranks(3, idle_rank):
        assert_same(params, expected)
