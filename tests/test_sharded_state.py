"""The state in its three forms, through state dicts, torch.save and torch.distributed.checkpoint."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from oracle import STEPS, AwkwardModel, assert_same, batch, branch_of, train_sharded, train_unsharded
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from sharded_adopt import ADOPT, ShardedADOPT, ShardedOptimizer
from sharded_adopt.sharding.flat_shard import FlatShard

MANY_BUCKETS = 100 / 2**20


def make(seed: int = 0, **arguments: Any) -> tuple[AwkwardModel, ShardedADOPT]:
    model = AwkwardModel(seed)
    return model, ShardedADOPT(model.named_parameters(), lr=0.05, bucket_cap_mb=MANY_BUCKETS, **arguments)


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def everything(optimizer: ShardedOptimizer) -> bytes:
    """The bytes of this rank's parameters and state, to see that nothing has changed."""
    shards = optimizer.local_shards()
    return b"".join(t.detach().contiguous().view(-1).numpy().tobytes() for s in shards.values() for t in s.values())


def eager(rank: int, world_size: int, cls: type[torch.optim.Optimizer]) -> None:
    model = AwkwardModel()
    optimizer = ShardedOptimizer(model.named_parameters(), cls, lr=0.05)
    keys = {"step", "exp_avg", "exp_avg_sq"}
    for segment, p in zip(optimizer.layout.segments(rank), model.parameters(), strict=True):
        state = optimizer.state[p]
        assert set(state) == keys, "every parameter has its keys before the first step, empty segments included"
        assert state["exp_avg"].shape == p.shape
        assert state["exp_avg"].to_local().shape == (segment.numel,)
        assert state["exp_avg"].start == segment.start
        assert float(state["step"]) == 0
    plan = optimizer.memory_plan()
    held = sum(s.to_local().numel() * 4 for st in optimizer.state.values() for k, s in st.items() if k != "step")
    even = sum(b.shard_numel for b in optimizer.layout.buckets) * 8
    assert plan.state == even + 4 * len(list(model.parameters()))  # and a step count each
    assert even - 8 * 3 * len(list(model.parameters())) <= held <= even  # gaps of alignment: at most 3 elements each
    assert plan.parameters == sum(b.padded_numel for b in optimizer.layout.buckets) * 4


@pytest.mark.parametrize("cls", [ADOPT, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("world_size", [1, 3])
def test_state_is_there_from_the_start_and_as_large_as_planned(
    world_size: int, cls: type[torch.optim.Optimizer]
) -> None:
    # T14
    run_ranks(world_size, eager, cls)


def save_and_go_on(rank: int, world_size: int, how: str) -> None:
    model, optimizer = make()
    train_sharded(model, optimizer, rank, range(3))
    kept = values(model)
    if how == "sharded":
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
    elif how == "full":
        saved = optimizer.full_state_dict(rank0_only=False)
    else:
        saved = copy.deepcopy(optimizer.state_dict())
    train_sharded(model, optimizer, rank, range(3, STEPS))
    again, resumed = make(seed=7)
    for p, value in zip(again.parameters(), kept, strict=True):
        p.data.copy_(value)
    before = dict(saved["state"][0])
    resumed.load_state_dict(saved)
    assert saved["state"][0] == before or how == "full", "the caller's dictionary is not changed"
    train_sharded(again, resumed, rank, range(3, STEPS))
    assert_same(values(again), values(model))


@pytest.mark.parametrize("how", ["sharded", "full", "deepcopy"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_loaded_state_goes_on_bit_for_bit(world_size: int, how: str) -> None:
    # T21
    run_ranks(world_size, save_and_go_on, how)


def full_on_first_rank(rank: int, world_size: int) -> dict[str, Any]:
    model, optimizer = make()
    train_sharded(model, optimizer, rank, range(STEPS))
    return optimizer.full_state_dict()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_full_state_dict_loads_into_the_unsharded_optimizer(world_size: int) -> None:
    first, *others = run_ranks(world_size, full_on_first_rank)
    assert all(other == {} for other in others)
    _, expected = train_unsharded(lambda m: ADOPT(m.named_parameters(), lr=0.05), world_size)
    plain = ADOPT(AwkwardModel().named_parameters(), lr=0.9)
    plain.load_state_dict(first)
    state = plain.state_dict()
    assert state["param_groups"] == expected["param_groups"]
    for index, entries in expected["state"].items():
        for key, value in entries.items():
            assert torch.equal(state["state"][index][key], value)


def from_unsharded(rank: int, world_size: int, state: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
    model, optimizer = make(seed=5)
    for p, value in zip(model.parameters(), params, strict=True):
        p.data.copy_(value)
    optimizer.load_state_dict(state)
    train_sharded(model, optimizer, rank, range(3, STEPS), lambda step, _: batch(step, 0, branch_of(step, 0)))
    return values(model)


@pytest.mark.parametrize("world_size", [2, 3])
def test_an_unsharded_state_dict_goes_on_sharded(world_size: int) -> None:
    def one(step: int, _: int) -> Any:
        return batch(step, 0, branch_of(step, 0))

    params, state = train_unsharded(lambda m: ADOPT(m.parameters(), lr=0.05), 1, steps=3, batches_of=one)
    expected, _ = train_unsharded(lambda m: ADOPT(m.parameters(), lr=0.05), 1, batches_of=one)
    for ours in run_ranks(world_size, from_unsharded, state, params):
        # Three ranks that see the same batch sum three equal gradients and divide by three.
        tolerance = 0.0 if world_size == 2 else 1e-5
        assert_same(ours, expected, rtol=tolerance, atol=tolerance / 10)


def refused(rank: int, world_size: int, what: str) -> str:
    model, optimizer = make()
    train_sharded(model, optimizer, rank, range(3))
    good = optimizer.full_state_dict(rank0_only=False)
    before, groups = everything(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    bad = copy.deepcopy(good)
    if what == "shape":
        bad["state"][0]["exp_avg"] = torch.zeros(3, 3)
        del bad["state"][1]["exp_avg_sq"]
        bad["state"][2]["momentum"] = torch.zeros(5, 7)
    elif what == "groups":
        bad["param_groups"] = [bad["param_groups"][0], bad["param_groups"][0]]
    elif what == "empty-on-one":
        bad = bad if rank == 0 else {"state": {}, "param_groups": []}
    elif what == "other-on-one":
        bad["param_groups"][0]["lr"] = 0.1 + rank
    elif what == "callable":
        bad["param_groups"][0]["clip_lambda"] = {"custom": "somewhere.bound"}
    elif what == "shard-of-another-rank":
        local = torch.zeros(optimizer.layout.segments(rank)[0].numel + 1)
        bad["state"][0]["exp_avg"] = FlatShard(local, 0, (11, 7))
    with pytest.raises(ValueError, match=r"\w") as caught:
        optimizer.load_state_dict(bad)
    assert everything(optimizer) == before
    assert optimizer.state_dict()["param_groups"] == groups
    optimizer.load_state_dict(good)
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        (
            "shape",
            ["'embedding' has shape (3, 3), expected (11, 7)", "'mix' has no 'exp_avg_sq'", "unknown entry 'momentum'"],
        ),
        ("groups", ["parameter groups of [9, 9] parameters, expected [9]"]),
        ("empty-on-one", ["parameter groups of [] parameters, expected [9]"]),
        ("callable", ["somewhere.bound", "same callable"]),
        ("other-on-one", ["lr: '0.1' on rank 0, '1.1' on rank 1"]),
        ("shard-of-another-rank", ["holds elements 0:", "sharded_adopt.checkpoint.load"]),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(what: str, told: list[str]) -> None:
    for message in run_ranks(2, refused, what):
        assert all(part in message for part in told), message


def through_dcp(rank: int, world_size: int, directory: str, action: str, flatten: bool) -> list[Tensor] | None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = make(seed=0 if action == "save" else 9)
    if action == "save":
        train_sharded(model, optimizer, rank, range(3), lambda step, _: batch(step, 0))
        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
        dcp.save(state, checkpoint_id=directory)
    else:
        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
        dcp.load(state, checkpoint_id=directory)
        model.load_state_dict(state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    train_sharded(model, optimizer, rank, range(3, STEPS), lambda step, _: batch(step, 0))
    return values(model)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(("saved_at", "loaded_at"), [(1, 2), (2, 1), (2, 4), (4, 2), (3, 3)])
def test_torch_distributed_checkpoint_saves_and_loads_at_any_world_size(
    tmp_path: Path, saved_at: int, loaded_at: int, flatten: bool
) -> None:
    first = run_ranks(saved_at, through_dcp, str(tmp_path), "save", flatten)[0]
    for ours in run_ranks(loaded_at, through_dcp, str(tmp_path), "load", flatten):
        exact = {saved_at, loaded_at} <= {1, 2, 4}
        assert_same(ours, first or [], rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)


def state_dict_before_training(rank: int, world_size: int, call: bool) -> list[Tensor]:
    model, optimizer = make()
    if call:
        optimizer.state_dict()
        get_optimizer_state_dict(model, optimizer)
        optimizer.full_state_dict()
    train_sharded(model, optimizer, rank, range(STEPS))
    return values(model)


def test_reading_the_state_before_the_first_step_is_inert() -> None:
    # T20
    for with_call, without in zip(
        run_ranks(2, state_dict_before_training, True), run_ranks(2, state_dict_before_training, False), strict=True
    ):
        assert_same(with_call, without)


@pytest.mark.parametrize("dim_order", [(0, 1, 2, 3), (0, 2, 3, 1)])
def test_a_flat_shard_knows_its_place_in_the_whole(dim_order: tuple[int, ...]) -> None:
    shape = (4, 3, 2, 2)
    whole = torch.arange(48.0).reshape([shape[d] for d in dim_order])
    logical = whole.permute(sorted(range(4), key=lambda i: dim_order[i]))
    for start, stop in [(0, 48), (0, 0), (5, 41), (7, 8)]:
        shard = FlatShard(whole.reshape(-1)[start:stop], start, shape, dim_order)
        assert (shard.shape, shard.dtype, shard.start) == (torch.Size(shape), torch.float32, start)
        seen = 0
        for chunk, item in zip(shard.__create_chunk_list__(), shard.__create_write_items__("x", shard), strict=True):
            piece = shard.__get_tensor_shard__(item.index)
            block = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
            assert torch.equal(piece, logical[block])
            seen += piece.numel()
        assert seen == stop - start
        moved = copy.deepcopy(shard).to(torch.float64)
        assert isinstance(moved, FlatShard)
        assert moved.dtype is torch.float64
        assert torch.equal(moved.to_local(), shard.to_local().double())
    with pytest.raises(NotImplementedError, match="to_local"):
        _ = FlatShard(torch.zeros(3), 0, (5,)) + 1
    with pytest.raises(ValueError, match="within the 5 elements"):
        FlatShard(torch.zeros(3), 3, (5,))


def test_a_sharded_optimizer_refuses_to_be_copied_or_pickled() -> None:
    # T37
    _, optimizer = make()
    with pytest.raises(TypeError, match="copy its full_state_dict"):
        copy.deepcopy(optimizer)
    with pytest.raises(TypeError, match="save its state_dict"):
        torch.save(optimizer, io.BytesIO())
