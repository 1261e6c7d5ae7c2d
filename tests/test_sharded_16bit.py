"""16-bit parameters: fp32 main values with their owner, equal to one process with main values."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn

from sharded_adopt import ADOPT, ShardedADOPT, checkpoint

STEPS = 8


class Mixed(nn.Module):
    """Three dtypes in one model, an odd size in each."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn(7, 5, generator=generator).to(dtype))
        self.norm = nn.Parameter(torch.ones(5))
        self.second = nn.Parameter(torch.randn(5, 3, generator=generator).to(dtype))
        self.scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(x.to(self.first.dtype) @ self.first).float() * self.norm
        return (hidden.to(self.second.dtype) @ self.second).double().mul(self.scale).square().mean()


def data(step: int, rank: int) -> Tensor:
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(100 * step + rank))


def with_main_values(dtype: torch.dtype, world_size: int) -> tuple[list[Tensor], list[Tensor]]:
    """One process: 16-bit gradients averaged in fp32 and rounded once, fp32 main values stepped, parameters rounded."""
    model = Mixed(dtype)
    params = list(model.parameters())
    mains = [p.detach().float().clone() if p.itemsize == 2 else p.detach().clone() for p in params]
    optimizer = ADOPT(mains, lr=1e-3)
    for step in range(STEPS):
        grads: list[list[Tensor]] = []
        for rank in range(world_size):
            model.zero_grad()
            model(data(step, rank)).backward()
            grads.append([p.grad for p in params if p.grad is not None])
        for i, (main, p) in enumerate(zip(mains, params, strict=True)):
            total = grads[0][i].to(main.dtype)
            for row in grads[1:]:
                total = total + row[i]
            main.grad = (total / world_size).to(p.dtype).to(main.dtype)
        optimizer.step()
        for p, main in zip(params, mains, strict=True):
            p.data.copy_(main)
    return [p.detach().clone() for p in params], mains


def make(rank: int, dtype: torch.dtype, **arguments: Any) -> tuple[Mixed, ShardedADOPT]:
    model = Mixed(dtype, seed=rank)
    return model, ShardedADOPT(model.named_parameters(), lr=1e-3, bucket_cap_mb=100 / 2**20, **arguments)


def train(model: Mixed, optimizer: ShardedADOPT, rank: int, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(data(step, rank)).backward()
        optimizer.step()


def sharded(rank: int, world_size: int, dtype: torch.dtype, frees: bool) -> tuple[list[Tensor], list[Tensor]]:
    model, optimizer = make(rank, dtype, shard_gradients=frees)
    train(model, optimizer, rank, range(STEPS))
    for state, p in zip(optimizer.state.values(), model.parameters(), strict=True):
        assert state["exp_avg"].dtype is (torch.float32 if p.itemsize < 8 else torch.float64)
        assert ("main_param" in state) == (p.itemsize == 2)
    plan = optimizer.memory_plan()
    assert plan.main_parameters == sum(4 * b.shard_numel for b in optimizer.layout.buckets if b.key.dtype in str(dtype))
    return [p.detach().clone() for p in model.parameters()], [
        s["param"].clone() for s in optimizer.local_shards().values()
    ]


@pytest.mark.parametrize("frees", [False, True], ids=["kept", "freed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sixteen_bit_parameters_equal_one_process_with_main_values(
    world_size: int, dtype: torch.dtype, frees: bool
) -> None:
    # T15
    expected, mains = with_main_values(dtype, world_size)
    results = run_ranks(world_size, sharded, dtype, frees)
    for params, _ in results:
        assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))
    for index, main in enumerate(mains):
        pieces = torch.cat([segments[index] for _, segments in results])
        assert torch.equal(pieces, main.reshape(-1))


def in_place(rank: int, world_size: int) -> list[Tensor]:
    model, optimizer = make(rank, torch.bfloat16, main_params="none")
    train(model, optimizer, rank, range(STEPS))
    assert "main_param" not in optimizer.state[model.first]
    return [p.detach().clone() for p in model.parameters()]


def test_without_main_values_parameters_are_stepped_in_place() -> None:
    first, second = run_ranks(2, in_place)
    expected, _ = with_main_values(torch.bfloat16, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], expected[0])


def written_from_outside(rank: int, world_size: int) -> None:
    model, optimizer = make(rank, torch.bfloat16)
    train(model, optimizer, rank, range(3))
    other = Mixed(torch.bfloat16, seed=77)
    with torch.no_grad():
        other.second.copy_(model.second)
    model.load_state_dict(other.state_dict())
    kept = optimizer.local_shards()["second"]["param"].clone()
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, rank, range(3, 4))
    shards = optimizer.local_shards()
    place = optimizer.layout.segments(rank)[0]
    loaded = other.first.detach().reshape(-1)[place.start : place.stop]
    assert torch.equal(shards["first"]["param"], loaded.float()), "taken over from the model"
    assert torch.equal(shards["second"]["param"], kept), "not written, so not rounded either"
    assert torch.equal(model.first, other.first)


def test_main_values_follow_what_was_loaded_into_the_model() -> None:
    run_ranks(2, written_from_outside)


def resumed(rank: int, world_size: int, how: str, directory: str) -> None:
    model, optimizer = make(rank, torch.bfloat16)
    train(model, optimizer, rank, range(4))
    again, other = make(rank + 5, torch.bfloat16)
    if how == "checkpoint":
        checkpoint.save(directory, step=4, optimizer=optimizer, model=model)
        train(model, optimizer, rank, range(4, STEPS))
        checkpoint.load(directory, optimizer=other, model=again)
    else:
        whole = optimizer.full_state_dict(rank0_only=False, main_values=True)
        buffer = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict() if how == "state dict" else whole], buffer)
        buffer.seek(0)
        weights, state = torch.load(buffer, weights_only=True)
        train(model, optimizer, rank, range(4, STEPS))
        again.load_state_dict(weights)
        other.load_state_dict(state)
    train(again, other, rank, range(4, STEPS))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, tensors in optimizer.local_shards().items():
        assert all(torch.equal(tensor, other.local_shards()[name][key]) for key, tensor in tensors.items())


@pytest.mark.parametrize("how", ["checkpoint", "state dict", "full state dict"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_main_values_survive_a_resume_bit_for_bit(world_size: int, how: str, tmp_path: Path) -> None:
    run_ranks(world_size, resumed, how, str(tmp_path))


def full_state(rank: int, world_size: int) -> list[dict[str, Any]]:
    model, optimizer = make(rank, torch.bfloat16)
    train(model, optimizer, rank, range(4))
    return [optimizer.full_state_dict(main_values=main_values) for main_values in (False, True)]


def test_an_unsharded_optimizer_passes_main_values_over() -> None:
    without, with_main = run_ranks(2, full_state)[0]
    assert [set(state) for state in with_main["state"].values()] == [
        {"step", "exp_avg", "exp_avg_sq", "main_param"},
        {"step", "exp_avg", "exp_avg_sq"},
        {"step", "exp_avg", "exp_avg_sq", "main_param"},
        {"step", "exp_avg", "exp_avg_sq"},
    ]
    stepped = []
    for state in (without, with_main):
        model = Mixed(torch.bfloat16)
        optimizer = ADOPT(model.parameters())
        optimizer.load_state_dict(state)
        model(data(4, 0)).backward()
        optimizer.step()
        stepped.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*stepped, strict=True))


def save_here(rank: int, world_size: int, directory: str) -> list[Tensor]:
    model, optimizer = make(rank, torch.bfloat16)
    train(model, optimizer, rank, range(4))
    checkpoint.save(directory, step=4, optimizer=optimizer, model=model)
    return [shards["param"].clone() for shards in optimizer.local_shards().values()]


def load_there(rank: int, world_size: int, directory: str) -> list[Tensor]:
    model, optimizer = make(rank + 3, torch.bfloat16)
    checkpoint.load(directory, optimizer=optimizer, model=model)
    for tensor, name in zip(model.parameters(), optimizer.local_shards(), strict=True):
        assert optimizer.param_for(name) is tensor
    return [shards["param"].clone() for shards in optimizer.local_shards().values()]


def test_main_values_load_at_another_world_size(tmp_path: Path) -> None:
    saved = run_ranks(3, save_here, str(tmp_path))
    loaded = run_ranks(2, load_there, str(tmp_path))
    for index in range(4):
        assert torch.equal(torch.cat([row[index] for row in saved]), torch.cat([row[index] for row in loaded]))


def narrow_oracle(world_size: int, reduce_dtype: torch.dtype | None, gather_dtype: torch.dtype | None) -> list[Tensor]:
    """One process in fp32: gradients rounded before averaging, main values stepped, parameters rounded after."""
    model = Mixed(torch.float32)
    params = list(model.parameters())
    mains = [p.detach().clone() for p in params]
    optimizer = ADOPT(mains, lr=1e-3)
    for step in range(STEPS):
        grads: list[list[Tensor]] = []
        for rank in range(world_size):
            model.zero_grad()
            model(data(step, rank)).backward()
            grads.append([p.grad for p in params if p.grad is not None])
        for i, main in enumerate(mains):
            wire = reduce_dtype or main.dtype
            rows = [row[i].to(wire).to(torch.float32 if wire.itemsize == 2 else wire) for row in grads]
            total = rows[0]
            for row in rows[1:]:
                total = total + row
            main.grad = (total / world_size).to(main.dtype)
        optimizer.step()
        for p, main in zip(params, mains, strict=True):
            p.data.copy_(main if gather_dtype is None else main.to(gather_dtype))
    return [p.detach().clone() for p in params]


def narrow(
    rank: int, world_size: int, reduce_dtype: torch.dtype | None, gather_dtype: torch.dtype | None, frees: bool
) -> tuple[list[Tensor], tuple[int, int]]:
    sent = 0
    isend = dist.isend

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal sent
        sent += tensor.numel() * tensor.element_size()
        return isend(tensor, *args, **kwargs)

    model, optimizer = make(
        rank, torch.float32, reduce_dtype=reduce_dtype, gather_dtype=gather_dtype, shard_gradients=frees
    )
    dist.isend = counting
    train(model, optimizer, rank, range(STEPS))
    return [p.detach().clone() for p in model.parameters()], (sent, STEPS * optimizer.memory_plan().sent)


@pytest.mark.parametrize("frees", [False, True], ids=["kept", "freed"])
@pytest.mark.parametrize(
    ("reduce_dtype", "gather_dtype"),
    [(torch.bfloat16, None), (None, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float64, None)],
    ids=str,
)
@pytest.mark.parametrize("world_size", [2, 3])
def test_what_travels_narrow_equals_one_process_that_rounds(
    world_size: int, reduce_dtype: torch.dtype | None, gather_dtype: torch.dtype | None, frees: bool
) -> None:
    expected = narrow_oracle(world_size, reduce_dtype, gather_dtype)
    for params, (sent, planned) in run_ranks(world_size, narrow, reduce_dtype, gather_dtype, frees):
        # On the first step ADOPT moves nothing, and parameters are fetched all the same: then they are rounded.
        assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))
        assert sent == planned


def test_dtypes_of_the_wire_are_checked() -> None:
    params = list(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match=r"reduce_dtype must be a floating-point torch\.dtype or None, got 'bf16'"):
        ShardedADOPT(params, reduce_dtype="bf16")
    with pytest.raises(ValueError, match=r"gather_dtype must be .* got torch.int8"):
        ShardedADOPT(params, gather_dtype=torch.int8)
    with pytest.raises(ValueError, match="must not be 'none'"):
        ShardedADOPT(params, gather_dtype=torch.bfloat16, main_params="none")


def unscaled_fp16(rank: int, world_size: int) -> None:
    from sharded_adopt import GradScaler

    model, optimizer = make(rank, torch.float16)
    scaler = GradScaler("cpu")
    scaler.scale(model(data(0, rank))).backward()
    with pytest.raises(ValueError, match=r"torch\.autocast"):
        scaler.step(optimizer)


def test_fp16_gradients_are_not_unscaled_to_nothing() -> None:
    run_ranks(2, unscaled_fp16)


def test_main_params_takes_three_values() -> None:
    with pytest.raises(ValueError, match="'auto', 'fp32' or 'none', got 'bf16'"):
        ShardedADOPT(nn.Linear(2, 2).parameters(), main_params="bf16")
