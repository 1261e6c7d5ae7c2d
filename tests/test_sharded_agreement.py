"""An error on one rank is an error on all within the timeout; caught everywhere, training goes on where it was."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from oracle import STEPS, AwkwardModel, assert_same, batch, branch_of, train_unsharded
from ranks import run_ranks
from torch import Tensor, nn

from sharded_adopt import ADOPT, ShardedADOPT, ShardedOptimizer, checkpoint
from sharded_adopt.sharding.collectives import RankLost, RanksDisagree

MANY_BUCKETS = 100 / 2**20
TIMEOUT = 1.5
FAILS_AT = 3  # the step at which one rank fails
FAILING = 1  # the rank


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


class Trouble(Exception):
    """What the failing rank raises."""


class Fails(torch.autograd.Function):
    """An operation whose backward fails."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:
        raise Trouble


def fail(_: Tensor) -> None:
    raise Trouble


def one_step(
    model: AwkwardModel, optimizer: ShardedOptimizer, rank: int, step: int, where: str, directory: str
) -> None:
    """A training step and a checkpoint, of which one part fails if `where` names it."""
    handle = None
    if where == "hook":
        handle = model.kernel.register_hook(fail)
    elif where == "late hook":
        handle = model.embedding.register_post_accumulate_grad_hook(fail)
    try:
        optimizer.zero_grad()
        if where == "forward":
            raise Trouble
        loss = model(*batch(step, rank, branch_of(step, rank)))
        loss = loss + (Fails.apply(model.left).sum() if where == "backward" else 0)
        loss.backward()
        if where == "before step":
            raise Trouble
        optimizer.step()
        if where == "before save":
            raise Trouble
        checkpoint.save(directory, step=step, optimizer=optimizer, model=model, keep=checkpoint.Keep(last=1))
    finally:
        if handle is not None:
            handle.remove()


def fail_and_go_on(rank: int, world_size: int, where: str, frees: bool, directory: str) -> list[Tensor]:
    model = AwkwardModel()
    optimizer = ShardedADOPT(
        model.named_parameters(), lr=0.05, timeout=TIMEOUT, bucket_cap_mb=MANY_BUCKETS, shard_gradients=frees
    )
    step, caught = 0, None
    while step < STEPS:
        fails = rank == FAILING and step == FAILS_AT and caught is None
        begin = time.monotonic()
        try:
            one_step(model, optimizer, rank, step, where if fails else "", directory)
        except (Trouble, RankLost, checkpoint.CheckpointError) as error:
            assert caught is None, "once only"
            caught = error
            assert time.monotonic() - begin < TIMEOUT + 5
            optimizer.reset()
            step += where == "before save"  # the step itself was made
            continue
        step += 1
    assert isinstance(caught, Trouble if rank == FAILING else (RankLost, checkpoint.CheckpointError)), caught
    if rank != FAILING:
        assert f"rank {FAILING}" in str(caught) or world_size > 2, caught
        told = {"before save": "reach", "forward": "of bucket 0"}.get(where, "bucket")
        assert told in str(caught), caught
    return values(model)


@pytest.mark.parametrize("frees", [False, True], ids=["kept", "freed"])
@pytest.mark.parametrize(
    "where", ["forward", "backward", "hook", "late hook", "before step", "before save"], ids=lambda one: one
)
def test_after_an_exception_on_one_rank_reset_goes_on_exactly_where_it_was(
    where: str, frees: bool, tmp_path: Any
) -> None:
    # T31
    expected, _ = train_unsharded(lambda m: ADOPT(m.parameters(), lr=0.05), 2)
    for params in run_ranks(2, fail_and_go_on, where, frees, str(tmp_path)):
        assert_same(params, expected)


@pytest.mark.parametrize("where", ["forward", "hook"])
def test_the_ranks_that_wait_are_told_and_go_on_at_three_ranks_too(where: str, tmp_path: Any) -> None:
    # T31
    expected, _ = train_unsharded(lambda m: ADOPT(m.parameters(), lr=0.05), 3)
    for params in run_ranks(3, fail_and_go_on, where, False, str(tmp_path)):
        assert_same(params, expected)


class FailsOnce(ADOPT):
    """Raises in the middle of an update, on one rank, when told to."""

    armed = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if FailsOnce.armed and any(p.grad is not None and p.numel() for g in self.param_groups for p in g["params"]):
            FailsOnce.armed = False
            raise Trouble
        return super().step(closure)


def halfway(rank: int, world_size: int) -> list[Tensor]:
    model = AwkwardModel()
    optimizer = ShardedOptimizer(
        model.named_parameters(), FailsOnce, lr=0.05, timeout=TIMEOUT, bucket_cap_mb=MANY_BUCKETS
    )
    for step in range(FAILS_AT):
        one = batch(step, rank, branch_of(step, rank))
        optimizer.zero_grad()
        model(*one).backward()
        optimizer.step()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = optimizer.full_state_dict(rank0_only=False)
    FailsOnce.armed = rank == FAILING
    model(*batch(FAILS_AT, rank)).backward()
    with pytest.raises(Trouble if rank == FAILING else RankLost):
        optimizer.step()
    with pytest.raises(RuntimeError, match="Load a checkpoint into model and optimizer"):
        optimizer.reset()
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    for step in range(FAILS_AT, STEPS):
        optimizer.zero_grad()
        model(*batch(step, rank, branch_of(step, rank))).backward()
        optimizer.step()
    return values(model)


def test_a_step_left_halfway_is_not_passed_over_by_reset() -> None:
    # T31
    expected, _ = train_unsharded(lambda m: ADOPT(m.parameters(), lr=0.05), 2)
    for params in run_ranks(2, halfway):
        assert_same(params, expected)


def bad_timeout(rank: int, world_size: int) -> tuple[str, float]:
    begin = time.monotonic()
    with pytest.raises(ValueError, match="timeout must be a number of seconds") as caught:
        ShardedADOPT([nn.Parameter(torch.ones(3))], timeout=-1 if rank == 1 else None)
    return str(caught.value), time.monotonic() - begin


def test_a_timeout_that_is_wrong_on_one_rank_is_an_error_on_all_at_once() -> None:
    for rank, (message, seconds) in enumerate(run_ranks(3, bad_timeout)):
        assert message.startswith("timeout" if rank == 1 else "rank 1 failed: timeout")
        assert seconds < 10


def elsewhere(rank: int, world_size: int, methods: tuple[str, str]) -> str:
    model = AwkwardModel()
    optimizer = ShardedADOPT(model.named_parameters(), lr=0.05, timeout=TIMEOUT)
    calls = {
        "step": lambda: optimizer.step(),
        "synchronize_gradients": lambda: optimizer.synchronize_gradients(),
        "clip_grad_norm_": lambda: optimizer.clip_grad_norm_(1.0),
        "full_state_dict": lambda: optimizer.full_state_dict(),
        "load_state_dict": lambda: optimizer.load_state_dict(optimizer.state_dict()),
        "add_param_group": lambda: optimizer.add_param_group({"params": [("new", nn.Parameter(torch.ones(3)))]}),
    }
    model(*batch(0, rank)).backward()
    optimizer.step()
    before = values(model)
    begin = time.monotonic()
    with pytest.raises((RankLost, RanksDisagree)) as caught:
        calls[methods[rank]]()
    assert time.monotonic() - begin < TIMEOUT + 5
    assert_same(values(model), before)
    assert len(optimizer.param_groups) == 1
    optimizer.reset()
    optimizer.zero_grad()
    model(*batch(1, rank)).backward()
    optimizer.step()
    return str(caught.value)


@pytest.mark.parametrize(
    ("methods", "at_once"),
    [
        (("clip_grad_norm_", "step"), True),
        (("synchronize_gradients", "step"), True),
        (("full_state_dict", "add_param_group"), True),
        (("load_state_dict", "full_state_dict"), True),
        (("add_param_group", "step"), False),
        (("step", "full_state_dict"), False),
    ],
    ids=lambda one: " against ".join(one) if isinstance(one, tuple) else "",
)
def test_ranks_that_call_different_methods_are_told_so(methods: tuple[str, str], at_once: bool) -> None:
    # T18 (a group added on some ranks only)
    for rank, message in enumerate(run_ranks(2, elsewhere, methods)):
        if at_once:
            assert f"rank 0 is in {methods[0]} and rank 1 in {methods[1]}" in message
        else:
            assert f"rank {rank} is in {methods[rank]} and waits for the word of rank {1 - rank}" in message
