"""Under ShardedADOPT the fused kernel sees cut parameters, and the bits stay those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from torch.nn import Parameter

from sharded_adopt import ADOPT, ShardedADOPT
from sharded_adopt.kernels import native

pytestmark = pytest.mark.skipif(native.load().library is None, reason=f"no fused CPU kernel: {native.load().reason}")

SHAPES = [(7,), (33, 5), (), (129,), (3, 3, 3)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "decouple": True, "nesterov": True},
    {"init": "element", "state_dtype": (torch.float32, torch.bfloat16)},
]


def _params() -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def _grads(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1 + step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def _train(params: list[Parameter], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    for step in range(5):
        optimizer.zero_grad()
        # all ranks have the same gradients: the mean over a power of two of them is exactly what one process has
        sum((p * g).sum() for p, g in zip(params, _grads(step), strict=True)).backward()  # type: ignore[union-attr]
        optimizer.step()
    return [param.detach().clone() for param in params]


def _sharded(rank: int, world_size: int, options: dict[str, Any]) -> list[Tensor]:
    params = _params()
    return _train(params, ShardedADOPT(params, lr=0.05, fused=True, bucket_cap_mb=0.0005, **options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_number_of_ranks_gives_the_bits_of_one_process(world_size: int, options: dict[str, Any]) -> None:
    params = _params()
    expected = _train(params, ADOPT(params, lr=0.05, fused=True, **options))
    for result in run_ranks(world_size, _sharded, options):
        for got, wanted in zip(result, expected, strict=True):
            assert torch.equal(got, wanted)
