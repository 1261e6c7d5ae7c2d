"""A sharded optimizer beside what else a training script holds: other optimizers, compiled models."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn

from sharded_adopt import ADOPT, ShardedADOPT


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))


def data(step: int, rank: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank))


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    params = list(model.parameters())
    return [p for p in params if p.ndim == 2], [p for p in params if p.ndim < 2]


def with_muon(rank: int, world_size: int) -> list[Tensor]:
    model = small_model()
    matrices, others = split(model)
    muon = torch.optim.Muon(matrices, lr=0.02)
    adopt = ShardedADOPT(others, lr=0.05)
    for step in range(5):
        model.zero_grad()
        model(data(step, rank)).square().mean().backward()
        for p in matrices:  # Muon's own means: whole matrices, averaged on every rank
            assert p.grad is not None
            dist.all_reduce(p.grad)
            p.grad /= world_size
        muon.step()
        adopt.step()
    return [p.detach().clone() for p in model.parameters()]


def test_muon_steps_the_matrices_and_sharded_adopt_the_rest() -> None:
    model = small_model()
    matrices, others = split(model)
    muon, adopt = torch.optim.Muon(matrices, lr=0.02), ADOPT(others, lr=0.05)
    for step in range(5):
        grads = []
        for rank in range(2):
            model.zero_grad()
            model(data(step, rank)).square().mean().backward()
            grads.append([p.grad for p in model.parameters() if p.grad is not None])
        for p, first, second in zip(model.parameters(), *grads, strict=True):
            p.grad = (first + second) / 2
        muon.step()
        adopt.step()
    for params in run_ranks(2, with_muon):
        assert all(torch.equal(a, b) for a, b in zip(params, model.parameters(), strict=True))


def two_sharded(rank: int, world_size: int) -> list[Tensor]:
    model = small_model()
    matrices, others = split(model)
    optimizers = [ShardedADOPT(matrices, lr=0.05), ShardedADOPT(others, lr=0.01, shard_gradients=True)]
    for step in range(5):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(data(step, rank)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_two_sharded_optimizers_share_a_model_without_mixing_messages() -> None:
    model = small_model()
    matrices, others = split(model)
    optimizer = ADOPT([{"params": matrices, "lr": 0.05}, {"params": others, "lr": 0.01}])
    for step in range(5):
        grads = []
        for rank in range(2):
            model.zero_grad()
            model(data(step, rank)).square().mean().backward()
            grads.append([p.grad for p in model.parameters() if p.grad is not None])
        for p, first, second in zip(model.parameters(), *grads, strict=True):
            p.grad = (first + second) / 2
        optimizer.step()
    for params in run_ranks(2, two_sharded):
        assert all(torch.equal(a, b) for a, b in zip(params, model.parameters(), strict=True))


def compiled(rank: int, world_size: int, compiles: bool, frees: bool) -> list[Tensor]:
    model = small_model()
    optimizer = ShardedADOPT(model.parameters(), lr=0.05, bucket_cap_mb=100 / 2**20, shard_gradients=frees)
    # aot_eager: everything of the compiler but the C++ that it would need a toolchain for.
    forward = torch.compile(model, backend="aot_eager") if compiles else model
    for step in range(4):
        optimizer.zero_grad()
        forward(data(step, rank)).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("frees", [False, True], ids=["kept", "freed"])
def test_a_compiled_model_trains_as_the_model(frees: bool) -> None:
    for ours, plain in zip(
        run_ranks(2, compiled, True, frees, timeout=120), run_ranks(2, compiled, False, frees), strict=True
    ):
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def checkpointed(rank: int, world_size: int, kind: str, frees: bool) -> list[Tensor]:
    from torch.utils.checkpoint import checkpoint

    model = small_model()
    optimizer = ShardedADOPT(model.parameters(), lr=0.05, bucket_cap_mb=100 / 2**20, shard_gradients=frees)
    for step in range(4):
        optimizer.zero_grad()
        x = data(step, rank).requires_grad_()
        for layer in model:  # every layer by itself, so that its parameters' hooks fire in a backward of their own
            x = checkpoint(layer, x, use_reentrant=kind == "reentrant") if kind else layer(x)
        x.square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("frees", [False, True], ids=["kept", "freed"])
@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_activation_checkpointing_changes_no_bit(kind: str, frees: bool) -> None:
    expected = run_ranks(2, checkpointed, "", frees)
    for ours, plain in zip(run_ranks(2, checkpointed, kind, frees), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
