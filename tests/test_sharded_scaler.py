"""Loss scaling: every rank skips the same steps, and a skipped step leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from oracle import AwkwardModel, assert_same, averaged_gradients, batch
from ranks import run_ranks
from torch import Tensor

from sharded_adopt import ADOPT, GradScaler, ShardedADOPT

BAD_STEPS = {2: 0, 3: 1}  # step -> the rank that sees an inf


def scaled(rank: int, world_size: int, frees: bool, clips: bool) -> tuple[list[Tensor], list[float], list[float]]:
    model = AwkwardModel()
    optimizer = ShardedADOPT(model.named_parameters(), lr=0.05, bucket_cap_mb=100 / 2**20, shard_gradients=frees)
    scaler = GradScaler("cpu", init_scale=8.0, growth_interval=2)
    scales = []
    for step in range(7):
        optimizer.zero_grad()
        loss = model(*batch(step, rank))
        if BAD_STEPS.get(step) == rank:
            loss = loss * float("inf")
        before = {n: {k: t.clone() for k, t in s.items()} for n, s in optimizer.local_shards().items()}
        scaler.scale(loss).backward()
        if clips:
            scaler.unscale_(optimizer)
            optimizer.clip_grad_norm_(0.3)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        if BAD_STEPS.get(step, world_size) < world_size:
            for name, tensors in optimizer.local_shards().items():
                assert all(torch.equal(tensor, before[name][key]) for key, tensor in tensors.items())
    steps = [float(state["step"]) for state in optimizer.state.values()]
    return [p.detach().clone() for p in model.parameters()], scales, steps


@pytest.mark.parametrize("clips", [False, True], ids=["", "clipped"])
@pytest.mark.parametrize("frees", [False, True], ids=["kept", "freed"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_ranks_skip_the_same_steps_and_the_rest_equals_one_process(
    world_size: int, frees: bool, clips: bool
) -> None:
    # T30
    model = AwkwardModel()
    optimizer = ADOPT(model.named_parameters(), lr=0.05)
    for step in range(7):
        if BAD_STEPS.get(step, world_size) < world_size:
            continue
        means = averaged_gradients(model, [batch(step, rank) for rank in range(world_size)])
        for p, mean in zip(model.parameters(), means, strict=True):
            p.grad = mean
        if clips:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
    results = run_ranks(world_size, scaled, frees, clips)
    for params, scales, steps in results:
        # A power of two scales and unscales without rounding; three ranks and a clip factor do round.
        tolerance = 0.0 if world_size < 3 and not clips else 1e-5
        assert_same(params, [p.detach() for p in model.parameters()], rtol=tolerance, atol=tolerance / 10)
        assert scales == results[0][1]
        assert max(steps) == 7 - sum(rank < world_size for rank in BAD_STEPS.values())
    assert min(results[0][1]) < 8.0 or world_size == 1
    assert len(set(results[0][1])) > 2, "the scale went up and down"


def scaled_bf16(rank: int, world_size: int, frees: bool, scales: bool) -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).bfloat16()
    optimizer = ShardedADOPT(
        model.named_parameters(), lr=1e-3, bucket_cap_mb=50 / 2**20, shard_gradients=frees, main_params="fp32"
    )
    scaler = GradScaler("cpu", init_scale=8.0, growth_interval=2, enabled=scales)
    for step in range(6):
        if step in BAD_STEPS and not scales:
            continue
        optimizer.zero_grad()
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank)).bfloat16()
        loss = model(x).float().square().mean()
        before = {n: {k: t.clone() for k, t in s.items()} for n, s in optimizer.local_shards().items()}
        scaler.scale(loss * float("inf") if BAD_STEPS.get(step) == rank else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if step in BAD_STEPS:
            for name, tensors in optimizer.local_shards().items():
                assert all(torch.equal(tensor, before[name][key]) for key, tensor in tensors.items()), name
    assert all(shard["param"].dtype is torch.float32 for shard in optimizer.local_shards().values())
    return {name: dict(tensors) for name, tensors in optimizer.local_shards().items()}


@pytest.mark.parametrize("frees", [False, True], ids=["kept", "freed"])
def test_a_skipped_step_leaves_main_values_and_the_rest_equals_unscaled_training(frees: bool) -> None:
    # A power of two neither rounds a bf16 gradient nor its mean.
    for scaled, plain in zip(
        run_ranks(2, scaled_bf16, frees, True), run_ranks(2, scaled_bf16, frees, False), strict=True
    ):
        for name, tensors in plain.items():
            assert all(torch.equal(scaled[name][key], tensor) for key, tensor in tensors.items()), name


def padding_after_nan(rank: int, world_size: int) -> None:
    model = AwkwardModel()
    optimizer = ShardedADOPT(model.named_parameters(), lr=0.05)
    (model(*batch(0, rank)) * float("nan")).backward()
    optimizer.clip_grad_norm_(1.0)
    optimizer.skip_step()
    for step in range(2):
        optimizer.zero_grad()
        model(*batch(step, rank)).backward()
        optimizer.synchronize_gradients()
        for buffer in optimizer._parameters.buffers:
            used = torch.zeros(buffer.bucket.padded_numel, dtype=torch.bool)
            for placement in buffer.bucket.placements:
                used[placement.start : placement.start + placement.numel] = True
            assert not used.all()
            assert buffer.grads is not None
            assert not buffer.grads[~used].any()
            assert not buffer.params[~used].any()
        optimizer.step()


def test_padding_stays_zero_also_after_a_gradient_of_nan() -> None:
    # T38
    run_ranks(2, padding_after_nan)


def disabled(rank: int, world_size: int) -> float:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = ShardedADOPT([param], lr=0.1)
    scaler = GradScaler("cpu", enabled=False)
    scaler.scale((param * 2).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    with pytest.raises(RuntimeError, match="closure"):
        GradScaler("cpu").step(optimizer, closure=lambda: None)
    return float(optimizer.state[param]["step"])


def test_a_disabled_scaler_only_steps_and_a_closure_is_refused() -> None:
    assert run_ranks(2, disabled) == [1.0, 1.0]


def plain_optimizer_over_a_group(rank: int, world_size: int) -> tuple[float, float]:
    import torch.distributed as dist

    param = torch.nn.Parameter(torch.ones(3))
    optimizer = ADOPT([param], lr=0.1)
    scaler = GradScaler("cpu", process_group=dist.group.WORLD, init_scale=8.0)
    scaler.scale((param * (float("inf") if rank == 1 else 2.0)).sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale(), float(optimizer.state[param]["step"]) if optimizer.state else 0.0


def test_over_a_process_group_a_plain_optimizer_agrees_too() -> None:
    assert run_ranks(2, plain_optimizer_over_a_group) == [(4.0, 0.0), (4.0, 0.0)]


def stepped_twice(rank: int, world_size: int) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = ShardedADOPT([param], lr=0.1)
    scaler = GradScaler("cpu")
    scaler.scale(param.sum()).backward()
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="since the last update"):
        scaler.step(optimizer)


def test_two_steps_without_an_update_are_refused() -> None:
    run_ranks(2, stepped_twice)
