"""What travels between ranks arrives, in rank order, and an error on one rank is an error on all."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from ranks import RanksFailed, run_ranks

from sharded_adopt.sharding.collectives import Collectives, RanksDisagree


def reduce_and_gather(rank: int, world_size: int, dtype: torch.dtype) -> None:
    group = Collectives()
    generator = torch.Generator().manual_seed(0)
    everyone = torch.randn(world_size, world_size * 5, generator=generator, dtype=torch.float64).to(dtype)
    buffers = [everyone[rank].clone() * (k + 1) for k in range(3)]
    pending = [group.reduce_scatter_mean_(buffer, tag=k) for k, buffer in enumerate(buffers)]
    own = slice(rank * 5, rank * 5 + 5)
    for k, (one, buffer) in enumerate(zip(pending, buffers, strict=True)):
        one.wait()
        one.wait()  # idempotent
        # 16-bit numbers are added in fp32 and rounded once.
        parts = [(row * (k + 1)).to(torch.float32 if dtype.itemsize == 2 else dtype) for row in everyone]
        expected = parts[0]
        for part in parts[1:]:
            expected = expected + part
        assert torch.equal(buffer[own], (expected / world_size)[own].to(dtype))
        mine = everyone[rank] * (k + 1)
        mine[own] = buffer[own]
        assert torch.equal(buffer, mine), "the other slices must be left alone"
    buffer = torch.full((world_size * 5,), -1.0).to(dtype)
    buffer[own] = float(rank)
    group.all_gather_(buffer, tag=9).wait()
    assert torch.equal(buffer, torch.arange(world_size).repeat_interleave(5).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_slices_are_averaged_in_rank_order_and_gathered_in_place(world_size: int, dtype: torch.dtype) -> None:
    run_ranks(world_size, reduce_and_gather, dtype)


def plain_data(rank: int, world_size: int) -> None:
    group = Collectives()
    assert group.all_gather_bytes(b"x" * rank) == [b"x" * r for r in range(world_size)]
    assert group.all_gather_json({"rank": rank}) == [{"rank": r} for r in range(world_size)]
    assert group.broadcast_bytes(b"first" if rank == 0 else b"other") == b"first"
    tensor = torch.tensor([rank, 5 - rank], dtype=torch.uint8)
    group.max_(tensor)
    assert tensor.tolist() == [world_size - 1, 5]
    gathered = group.gather(torch.tensor([rank == 1, True]), everywhere=False)
    assert (gathered is None) == (rank != 0)
    if gathered is not None:
        assert [one.tolist() for one in gathered] == [[r == 1, True] for r in range(world_size)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_plain_data_reaches_every_rank(world_size: int) -> None:
    run_ranks(world_size, plain_data)


def test_a_lone_process_needs_no_process_group() -> None:
    group = Collectives()
    buffer = torch.arange(4.0)
    group.reduce_scatter_mean_(buffer, tag=0).wait()
    group.all_gather_(buffer, tag=0).wait()
    assert buffer.tolist() == [0, 1, 2, 3]
    assert group.all_gather_bytes(b"me") == [b"me"]


def fail_on_one(rank: int, world_size: int) -> str:
    group = Collectives()
    group.raise_together(None)
    error = {1: RanksDisagree("rank one's trouble")}.get(rank)
    try:
        group.raise_together(error)
    except RanksDisagree as caught:
        return str(caught)
    return "nothing"


def test_an_error_of_one_rank_is_raised_on_all_with_its_text() -> None:
    messages = run_ranks(3, fail_on_one)
    assert messages[1] == "rank one's trouble"
    assert messages[0] == messages[2] == "rank 1 failed: rank one's trouble"


def sub_group(rank: int, world_size: int) -> list[int]:
    # Everybody makes both groups, as torch asks; only the members make the engine's.
    odd = dist.new_group([1, 3])
    even = dist.new_group([0, 2])
    group = Collectives(odd if rank % 2 else even)
    buffer = torch.full((4,), float(rank))
    group.reduce_scatter_mean_(buffer, tag=0).wait()
    assert buffer[group.rank * 2] == (2.0 if rank % 2 else 1.0)
    return group.global_ranks


def test_a_group_of_some_ranks_works_beside_another() -> None:
    assert run_ranks(4, sub_group) == [[0, 2], [1, 3], [0, 2], [1, 3]]


def not_a_member(rank: int, world_size: int) -> str:
    group = dist.new_group([0])
    try:
        Collectives(group)
    except ValueError as caught:
        return str(caught)
    return "member"


def test_a_process_outside_the_group_is_told() -> None:
    assert run_ranks(2, not_a_member) == [
        "member",
        "this process (rank 1) is not a member of the process group it was given",
    ]


def one_rank_stays_away(rank: int, world_size: int) -> float:
    group = Collectives(timeout=1.5)
    if rank == 1:
        time.sleep(4)
        return 0.0
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?i)timed? ?out"):
        group.reduce_scatter_mean_(torch.zeros(1 << 20), tag=0).wait()
    return time.monotonic() - begin


def test_a_missing_rank_is_an_error_after_the_timeout() -> None:
    seconds = run_ranks(2, one_rank_stays_away, timeout=20)[0]
    assert 1.0 < seconds < 3.5


def test_a_failing_rank_shows_its_traceback() -> None:
    with pytest.raises(RanksFailed, match=r"rank 1 of 2 ---\n(?s:.*)ZeroDivisionError"):
        run_ranks(2, divide_by_rank)


def divide_by_rank(rank: int, world_size: int) -> float:
    return 1 / (1 - rank)
