"""ADOPT with accelerate: prepared, accumulated, clipped, saved and loaded."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hosting import (
    MAX_NORM,
    MICRO,
    OPTIONS,
    STEPS,
    as_torchrun_rank,
    assert_same_bits,
    expected,
    loss_of,
    make_net,
    micro_batch,
    values,
)
from ranks import RanksFailed, run_ranks
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("accelerate", reason="accelerate is not installed: make ecosystem")

from accelerate import Accelerator

from sharded_adopt import ADOPT, ShardedADOPT
from sharded_adopt.interop.accelerate import prepare, save_state


def make(cls: type, **options: Any) -> tuple[Accelerator, Any, Any]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO)
    model = make_net()
    return accelerator, *prepare(accelerator, model, cls(model.parameters(), **OPTIONS, **options))


def train(accelerator: Accelerator, model: Any, optimizer: Any, rank: int, steps: range) -> None:
    """The loop of accelerate's own documentation."""
    for step in steps:
        for micro in range(MICRO):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, micro_batch(step, micro, rank)))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
                optimizer.zero_grad()


def trained(rank: int, world_size: int, cls: type, options: dict[str, Any], directory: Path) -> list[Tensor]:
    as_torchrun_rank(rank, world_size)
    accelerator, model, optimizer = make(cls, **options)
    train(accelerator, model, optimizer, rank, range(3))
    save_state(accelerator, directory)
    train(accelerator, model, optimizer, rank, range(3, STEPS))
    return values(model)


def resumed(rank: int, world_size: int, cls: type, options: dict[str, Any], directory: Path) -> list[Tensor]:
    as_torchrun_rank(rank, world_size)
    accelerator, model, optimizer = make(cls, **options)
    accelerator.load_state(str(directory))
    train(accelerator, model, optimizer, rank, range(3, STEPS))
    return values(model)


BESIDE_DDP = {"reduce_gradients": False}
ways = pytest.mark.parametrize(
    ("world_size", "cls", "options"),
    [(1, ADOPT, {}), (2, ADOPT, {}), (1, ShardedADOPT, BESIDE_DDP), (2, ShardedADOPT, BESIDE_DDP)],
    ids=["ADOPT-1", "ADOPT-2", "ShardedADOPT-1", "ShardedADOPT-2"],
)


@ways
def test_prepared_accumulated_clipped_and_resumed_equals_a_plain_loop_to_the_bit(
    world_size: int, cls: type, options: dict[str, Any], tmp_path: Path
) -> None:
    for params in run_ranks(world_size, trained, cls, options, tmp_path):
        assert_same_bits(params, expected(world_size))
    for params in run_ranks(world_size, resumed, cls, options, tmp_path):
        assert_same_bits(params, expected(world_size))


def test_state_saved_by_two_sharded_ranks_loads_in_one_unsharded_process(tmp_path: Path) -> None:
    run_ranks(2, trained, ShardedADOPT, BESIDE_DDP, tmp_path)
    by_sharded = run_ranks(1, resumed, ADOPT, {}, tmp_path)[0]
    run_ranks(2, trained, ADOPT, {}, tmp_path / "unsharded")
    assert_same_bits(by_sharded, run_ranks(1, resumed, ADOPT, {}, tmp_path / "unsharded")[0])


def in_bf16(rank: int, world_size: int, directory: Path, resume: bool) -> list[Tensor]:
    as_torchrun_rank(rank, world_size)
    accelerator = Accelerator(cpu=True)
    model = make_net().bfloat16()
    model, optimizer = prepare(accelerator, model, ShardedADOPT(model.parameters(), lr=1e-3, **BESIDE_DDP))
    if resume:
        accelerator.load_state(str(directory))
    for step in range(3 if resume else 0, STEPS):
        accelerator.backward(loss_of(model, micro_batch(step, 0, rank).bfloat16()))
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            save_state(accelerator, directory)
    return values(model)


def test_the_fp32_values_of_bf16_parameters_are_saved_too(tmp_path: Path) -> None:
    """Resumed equals uninterrupted, bit for bit; from the bf16 weights alone it would not."""
    uninterrupted = run_ranks(2, in_bf16, tmp_path, False)
    for resumed_params, params in zip(run_ranks(2, in_bf16, tmp_path, True), uninterrupted, strict=True):
        assert_same_bits(resumed_params, params)
    whole = torch.load(tmp_path / "optimizer.bin", weights_only=True)
    for state in whole["state"].values():
        del state["main_param"]
    torch.save(whole, tmp_path / "optimizer.bin")
    from_rounded = run_ranks(2, in_bf16, tmp_path, True)[0]
    assert not all(torch.equal(a, b) for a, b in zip(from_rounded, uninterrupted[0], strict=True))


def saved_model(rank: int, world_size: int, directory: Path) -> tuple[list[Tensor], dict[str, Tensor]]:
    as_torchrun_rank(rank, world_size)
    accelerator, model, optimizer = make(ShardedADOPT, **BESIDE_DDP)
    train(accelerator, model, optimizer, rank, range(2))
    accelerator.save_model(model, directory)
    accelerator.wait_for_everyone()
    state = accelerator.unwrap_model(model).state_dict()
    next(iter(state.values())).zero_()
    assert values(model)[0].eq(0).all(), "a state dict is a view of the parameters"
    return values(model), load_file(directory / "model.safetensors")


def test_accelerate_saves_every_weight_of_a_flat_buffer(tmp_path: Path) -> None:
    """accelerate took the views of one storage for tied weights, and `save_model` wrote one of four."""
    for params, saved in run_ranks(2, saved_model, tmp_path):
        assert sorted(saved) == ["0.bias", "0.weight", "2.bias", "2.weight"]
        assert_same_bits(params[1:], [saved[name] for name in ("0.bias", "2.weight", "2.bias")])


def without_the_helper(rank: int, world_size: int, directory: Path) -> None:
    as_torchrun_rank(rank, world_size)
    accelerator, model, optimizer = make(ShardedADOPT, **BESIDE_DDP)
    train(accelerator, model, optimizer, rank, range(2))
    accelerator.save_state(str(directory))
    accelerator.wait_for_everyone()
    accelerator.load_state(str(directory))


def test_state_saved_by_accelerate_alone_is_refused_on_every_rank(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match=r"checkpoint\.load") as failed:
        run_ranks(2, without_the_helper, tmp_path)
    assert str(failed.value).count("--- rank") == 2


def natively(rank: int, world_size: int, max_norm: float | None) -> list[Tensor]:
    as_torchrun_rank(rank, world_size)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO)
    model = make_net()
    optimizer = prepare(accelerator, ShardedADOPT(model.parameters(), **OPTIONS))
    for step in range(STEPS):
        for micro in range(MICRO):
            with accelerator.accumulate(), contextlib.ExitStack() as stack:
                if not accelerator.sync_gradients:
                    stack.enter_context(optimizer.optimizer.no_sync())
                accelerator.backward(loss_of(model, micro_batch(step, micro, rank)))
                if max_norm is not None and accelerator.sync_gradients:
                    with pytest.raises(RuntimeError, match=r"clip with optimizer\.optimizer\.clip_grad_norm_"):
                        accelerator.clip_grad_norm_(model.parameters(), max_norm)
                    optimizer.optimizer.clip_grad_norm_(max_norm)
                optimizer.step()
                optimizer.zero_grad()
    return values(model)


def test_without_ddp_the_optimizer_averages_by_itself() -> None:
    """Only the optimizer is prepared."""
    for params in run_ranks(2, natively, None):
        assert_same_bits(params, expected(2, clips=False))


def test_accelerates_clipping_is_refused_where_the_optimizer_averages_and_its_own_clips() -> None:
    """Named tolerance: our norm is taken in double, rank by rank. Every rank clipped by the norm of its own shard."""
    for params in run_ranks(2, natively, MAX_NORM):
        for ours, theirs in zip(params, expected(2), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def averages_twice(rank: int, world_size: int) -> None:
    as_torchrun_rank(rank, world_size)
    make(ShardedADOPT)


def test_prepare_refuses_a_sharded_optimizer_that_averages_beside_ddp() -> None:
    with pytest.raises(RanksFailed, match="construct the sharded optimizer with reduce_gradients=False"):
        run_ranks(2, averages_twice)


def another_optimizer(rank: int, world_size: int) -> None:
    import torch

    as_torchrun_rank(rank, world_size)
    model = make_net()
    prepare(Accelerator(cpu=True), model, torch.optim.AdamW(model.parameters()))


def test_prepare_refuses_another_optimizer() -> None:
    with pytest.raises(RanksFailed, match=r"but torch\.optim\.adamw\.AdamW is what runs"):
        run_ranks(1, another_optimizer)


def beside_muon(rank: int, world_size: int) -> None:
    as_torchrun_rank(rank, world_size)
    model = make_net()
    matrices, vectors = ([p for p in model.parameters() if (p.ndim == 2) is is_matrix] for is_matrix in (True, False))
    prepare(Accelerator(cpu=True), model, torch.optim.Muon(matrices), ADOPT(vectors))


def test_prepare_takes_another_optimizer_beside_ours() -> None:
    run_ranks(1, beside_muon)
