"""Buckets are reduced while backward runs, and whatever the hooks do the result is that of one process, bit for bit.

Gradients here are small integers times the number of ranks, so that their sums and means are exact in any order: any
difference is a gradient lost, doubled or mixed, never a rounding.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracle import assert_same
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sharded_adopt import ADOPT, ShardedADOPT

SIZES = [(3,), (5, 2), (1,), (7,), (4, 3), (2,), (), (6,), (3, 3)]
STEPS = 4
TWO_OR_THREE_PARAMS = 60 / 2**20  # the bucket size in MiB


@dataclass(frozen=True)
class Backward:
    """One backward: parameters by number, in pieces, each of which may run under activation checkpointing."""

    pieces: tuple[tuple[int, ...], ...]
    checkpointed: str = ""  # "", "reentrant" or "non-reentrant"
    syncs: bool = True


ALL = tuple(range(len(SIZES)))
Program = Callable[[int, int, int], list[Backward]]


def other_order_on_every_rank(step: int, rank: int, world_size: int) -> list[Backward]:
    order = list(ALL)
    random.Random(10 * step + rank).shuffle(order)
    return [Backward((tuple(order),))]


def some_lack_gradients(step: int, rank: int, world_size: int) -> list[Backward]:
    return [Backward((tuple(i for i in ALL if (i + rank + step) % 3),))]


def one_rank_is_idle(step: int, rank: int, world_size: int) -> list[Backward]:
    return [] if step % world_size == rank else [Backward((ALL,))]


def late_hooks(step: int, rank: int, world_size: int) -> list[Backward]:
    """Everything is full and on its way when one rank adds to some of it."""
    return [Backward((ALL,)), *([Backward(((0, 4, 8),))] if rank == step % world_size else [])]


def several_backwards(step: int, rank: int, world_size: int) -> list[Backward]:
    return [Backward((ALL,)), Backward((ALL[::-1],)), Backward((ALL[3:],))]


def another_number_of_backwards_by_rank(step: int, rank: int, world_size: int) -> list[Backward]:
    return [Backward((ALL[number:],)) for number in range(rank + 1)]


def accumulation(step: int, rank: int, world_size: int) -> list[Backward]:
    return [Backward((ALL[:6],), syncs=False), Backward((ALL[rank:],), syncs=False), Backward((ALL[2:],))]


def checkpointed(kind: str) -> Program:
    """Parameters in one piece, in two, and outside of all: with reentrant checkpointing their hooks fire each time."""

    def program(step: int, rank: int, world_size: int) -> list[Backward]:
        first, second = (0, 2, 4, 6, 8), (1, 2, 3, 4, 5) if rank else (7, 8)
        return [Backward((first, second, ALL[step:]), kind), *([Backward((first,), kind)] if step == 2 else [])]

    return program


PROGRAMS: dict[str, Program] = {
    "other order on every rank": other_order_on_every_rank,
    "some lack gradients": some_lack_gradients,
    "one rank is idle": one_rank_is_idle,
    "late hooks": late_hooks,
    "several backwards": several_backwards,
    "another number of backwards by rank": another_number_of_backwards_by_rank,
    "accumulation": accumulation,
    "reentrant checkpointing": checkpointed("reentrant"),
    "non-reentrant checkpointing": checkpointed("non-reentrant"),
}


def make_params() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=generator)) for size in SIZES]


def coefficients(*seed: int) -> Iterator[Tensor]:
    """What the gradient of one use of each parameter is: integers. The last number of the seed is the world size."""
    generator = torch.Generator().manual_seed(hash(seed) % 2**31)
    for size in SIZES:
        yield torch.randint(-9, 10, size, generator=generator).float() * seed[-1]


def loss_of(params: list[nn.Parameter], backward: Backward, *seed: int) -> Tensor:
    total = torch.zeros(())
    for number, piece in enumerate(backward.pieces):
        factors = list(coefficients(number, *seed))

        def run(x: Tensor, piece: tuple[int, ...] = piece, factors: list[Tensor] = factors) -> Tensor:
            result = x * 0.0
            for index in piece:
                result = result + (params[index] * factors[index]).sum()
            return result

        x = torch.ones((), requires_grad=True)
        is_last = number == len(backward.pieces) - 1
        if backward.checkpointed and not is_last:
            total = total + checkpoint(run, x, use_reentrant=backward.checkpointed == "reentrant")
        else:
            total = total + run(x)
    return total


def one_process(program: Program, world_size: int) -> list[Tensor]:
    params = make_params()
    optimizer = ADOPT(params, lr=0.05)
    for step in range(STEPS):
        grads: list[Tensor | None] = [None] * len(params)
        for rank in range(world_size):
            for number, backward in enumerate(program(step, rank, world_size)):
                for place, piece in enumerate(backward.pieces):
                    factors = list(coefficients(place, step, rank, number, world_size))
                    for index in piece:
                        before = grads[index]
                        grads[index] = factors[index] if before is None else before + factors[index]
        for p, grad in zip(params, grads, strict=True):
            p.grad = None if grad is None else grad / world_size
        optimizer.step()
    return [p.detach().clone() for p in params]


def several_ranks(
    rank: int, world_size: int, program: Program, frees: bool
) -> tuple[list[Tensor], list[tuple[list[int], list[int]]]]:
    """The parameters, and for each step the buckets that travelled within backward and altogether."""
    params = make_params()
    optimizer = ShardedADOPT(params, lr=0.05, bucket_cap_mb=TWO_OR_THREE_PARAMS, shard_gradients=frees)
    assert len(optimizer.layout.buckets) > 3
    started = watch_reductions(optimizer)
    seen = []
    for step in range(STEPS):
        optimizer.zero_grad()
        started.clear()
        for number, backward in enumerate(program(step, rank, world_size)):
            if backward.syncs:
                loss_of(params, backward, step, rank, number, world_size).backward()
            else:
                with optimizer.no_sync():
                    loss_of(params, backward, step, rank, number, world_size).backward()
        in_backward = list(started)
        optimizer.step()
        assert len(started) >= len(in_backward)
        seen.append((in_backward, list(started)))
    return [p.detach().clone() for p in params], seen


def watch_reductions(optimizer: ShardedADOPT) -> list[int]:
    """Which buckets have started to travel, in order."""
    started: list[int] = []
    launch = optimizer.collectives.reduce_scatter_mean_

    def noting(buffer: Tensor, tag: int, *rest: Any, **more: Any) -> Any:
        started.append(tag // 2)
        return launch(buffer, tag, *rest, **more)

    optimizer.collectives.reduce_scatter_mean_ = noting  # type: ignore[method-assign]
    return started


@pytest.mark.parametrize("frees", [False, True], ids=["kept", "freed"])
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", PROGRAMS)
def test_whatever_the_hooks_do_the_result_is_that_of_one_process(name: str, world_size: int, frees: bool) -> None:
    # T4, T25, T26
    expected = one_process(PROGRAMS[name], world_size)
    for params, _ in run_ranks(world_size, several_ranks, PROGRAMS[name], frees):
        assert_same(params, expected)


@pytest.mark.parametrize("frees", [False, True], ids=["kept", "freed"])
def test_every_bucket_starts_once_within_backward_in_the_order_of_its_index(frees: bool) -> None:
    for _, seen in run_ranks(2, several_ranks, other_order_on_every_rank, frees):
        for in_backward, altogether in seen:
            assert in_backward == list(range(len(in_backward)))
            assert len(in_backward) > 3
            assert altogether == in_backward, "each once"


def fires_twice(rank: int, world_size: int) -> int:
    (param,) = params = [nn.Parameter(torch.ones(3))]
    optimizer = ShardedADOPT(params, lr=0.05)
    fired = 0

    def count(_: Tensor) -> None:
        nonlocal fired
        fired += 1

    param.register_post_accumulate_grad_hook(count)
    x = torch.ones((), requires_grad=True)
    sum(checkpoint(lambda x: (param * x).sum(), x, use_reentrant=True) for _ in range(2)).backward()
    optimizer.synchronize_gradients()
    assert param.grad is not None
    return fired


def test_reentrant_checkpointing_fires_a_hook_once_for_each_piece() -> None:
    """What the programs above rely on: else they would not test what they say."""
    # T26
    assert run_ranks(2, fires_twice) == [2, 2]
