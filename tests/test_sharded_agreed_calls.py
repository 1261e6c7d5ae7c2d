"""What ranks pass to one call is compared, exactly; and an optimizer that begins anew begins as it did."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

from sharded_adopt import GradScaler, ShardedADOPT, ShardedOptimizer
from sharded_adopt.sharding.collectives import RankLost


def weights(*sizes: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.arange(1.0, size + 1)) for size in sizes]


class WithBuffer(nn.Module):
    def __init__(self, *names: str, size: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        for name in names:
            self.register_buffer(name, torch.zeros(size))


def with_another_rate(optimizer: ShardedOptimizer, rank: int) -> None:
    optimizer.param_groups[0]["lr"].fill_(1e-3 * (1 + 1e-4 * rank))  # equal in the four digits of its repr
    optimizer.step()


def with_another_scale(optimizer: ShardedOptimizer, rank: int) -> None:
    scaler = GradScaler("cpu", init_scale=2.0 ** (1 + rank))
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)


def over(module: nn.Module) -> None:
    ShardedADOPT(module.parameters(), module=module)


CALLS: dict[str, Callable[[Any, int], object]] = {
    "tensor lr": with_another_rate,
    "max_norm": lambda optimizer, rank: optimizer.clip_grad_norm_(0.01 * (1 + rank)),
    "norm_type": lambda optimizer, rank: optimizer.clip_grad_norm_(0.01, norm_type=1.0 + rank),
    "wrong on one": lambda optimizer, rank: optimizer.clip_grad_norm_(-1.0 if rank else 1.0),
    "no number on one": lambda optimizer, rank: optimizer.clip_grad_norm_("x" if rank else 1.0),
    "scale": with_another_scale,
    "buffer shape": lambda _, rank: over(WithBuffer("mean", size=3 + rank)),
    "buffer on one": lambda _, rank: over(WithBuffer(*["mean"][: 1 - rank])),
}


def called_differently(rank: int, world_size: int, what: str) -> str:
    params = weights(5, 3)
    optimizer = ShardedADOPT(params, lr=torch.tensor(1e-3), timeout=20.0)
    sum(p.square().sum() for p in params).backward()  # type: ignore[union-attr]
    begin = time.monotonic()
    with pytest.raises((ValueError, TypeError)) as caught:
        CALLS[what](optimizer, rank)
    assert time.monotonic() - begin < 10
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("tensor lr", "parameter group 0: lr torch.float32 0.001"),
        ("max_norm", "the call of clip_grad_norm_ is not the same on all ranks. max_norm: 0.01 on rank 0, 0.02"),
        ("norm_type", "norm_type: 1.0 on rank 0, 2.0 on rank 1"),
        ("wrong on one", "max_norm must be at least 0, got -1.0"),
        ("no number on one", "max_norm and norm_type must be numbers"),
        ("scale", "the call of unscale_gradients_ is not the same"),
        ("buffer shape", "buffer mean: [[3], 'torch.float32'] on rank 0, [[4], 'torch.float32'] on rank 1"),
        ("buffer on one", "buffer mean"),
    ],
)
def test_what_differs_by_rank_in_a_call_is_named_on_every_rank(what: str, told: str) -> None:
    # T17
    for message in run_ranks(2, called_differently, what):
        assert told in message


def test_an_expanded_buffer_is_named() -> None:
    module = WithBuffer()
    module.register_buffer("ones", torch.ones(1).expand(3))
    with pytest.raises(ValueError, match="buffer 'ones' of the module is expanded"):
        ShardedADOPT(module.parameters(), module=module)


@pytest.mark.parametrize("norm_type", [0.0, -1.0, float("-inf"), float("nan")])
def test_orders_of_norms_that_pieces_cannot_tell_are_refused(norm_type: float) -> None:
    with pytest.raises(ValueError, match="norm_type must be above 0"):
        ShardedADOPT(weights(3)).clip_grad_norm_(1.0, norm_type)


class Tag:
    """An option with an address in its words."""


def tagged(rank: int, world_size: int) -> None:
    ShardedADOPT([{"params": weights(3), "tag": Tag()}])


def test_objects_without_words_of_their_own_do_not_differ_by_their_address() -> None:
    run_ranks(2, tagged)


BEGUN = {
    "NAdam": (torch.optim.NAdam, {}),
    "ASGD": (torch.optim.ASGD, {}),
    "Rprop": (torch.optim.Rprop, {}),
    "Adagrad": (torch.optim.Adagrad, {"initial_accumulator_value": 0.5}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
    "AdamW": (torch.optim.AdamW, {"amsgrad": True}),
}


def begun_anew(rank: int, world_size: int, name: str) -> None:
    optimizer_class, options = BEGUN[name]
    values: list[list[torch.Tensor]] = []
    params = weights(5, 3)
    optimizer = ShardedOptimizer(params, optimizer_class, lr=0.1, **options)
    empty = {"state": {}, "param_groups": optimizer.state_dict()["param_groups"]}
    for _ in range(2):
        for param, fresh in zip(params, weights(5, 3), strict=True):
            param.data.copy_(fresh)
        for step in range(3):
            sum((p * (step + 1)).square().sum() for p in params).backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
        values.append([p.detach().clone() for p in params])
        optimizer.load_state_dict(empty)
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))


@pytest.mark.parametrize("name", BEGUN)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_state_dict_from_before_the_first_step_brings_back_the_beginning(world_size: int, name: str) -> None:
    # T21: state that does not begin at zero was zeroed
    run_ranks(world_size, begun_anew, name)


def train_with_zeroed(optimizer: torch.optim.Optimizer, used: torch.Tensor, rare: torch.Tensor) -> list[float]:
    for step in range(3):
        (used + (rare if step == 0 else 0)).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    optimizer.zero_grad()
    (used * 1).sum().backward()
    optimizer.step()
    return [used.item(), rare.item()]


def zeroed(rank: int, world_size: int, frees: bool) -> list[float]:
    params = weights(1, 1)
    optimizer = ShardedOptimizer(params, torch.optim.SGD, lr=0.1, momentum=0.9, shard_gradients=frees)
    return train_with_zeroed(optimizer, *params)


@pytest.mark.parametrize("frees", [False, True], ids=["kept", "freed"])
def test_gradients_made_zero_stay_gradients_as_in_torch(frees: bool) -> None:
    # T23
    params = weights(1, 1)
    expected = train_with_zeroed(torch.optim.SGD(params, lr=0.1, momentum=0.9), *params)
    assert run_ranks(2, zeroed, frees) == [expected] * 2


def test_a_second_optimizer_that_would_lose_gradients_to_the_first_is_refused() -> None:
    params = weights(5, 3)
    first = ShardedADOPT(params, shard_gradients=True)
    scheduler = torch.optim.lr_scheduler.ConstantLR(first)
    for frees in (False, True):
        with pytest.raises(ValueError, match=r"another sharded optimizer is alive that holds \['param.0', 'param.1'\]"):
            ShardedADOPT(params, shard_gradients=frees)
    del first, scheduler
    ShardedADOPT(params, shard_gradients=True)


def alone_in_reset(rank: int, world_size: int) -> float:
    optimizer = ShardedADOPT(weights(3), timeout=1.0)
    begin = time.monotonic()
    if rank == 0:
        time.sleep(16)
        return 0.0
    with pytest.raises(RankLost, match="rank 1 is in reset and waits for the word of rank 0"):
        optimizer.reset()
    return time.monotonic() - begin


def test_a_reset_that_another_rank_does_not_come_to_ends() -> None:
    assert 5 < run_ranks(2, alone_in_reset)[1] < 16
