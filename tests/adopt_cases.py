"""Lists of tensors and option sets that the tests of the rule share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from sharded_adopt import PowerClip

DEFAULTS: dict[str, Any] = {
    "beta1": 0.9,
    "beta2": 0.9999,
    "lr": 1e-2,
    "clip_lambda": PowerClip(0.25),
    "weight_decay": 0.0,
    "decouple": False,
    "eps": 1e-6,
    "maximize": False,
    "nesterov": False,
    "init": "parameter",
    "capturable": False,
    "differentiable": False,
    "grad_scale": None,
    "found_inf": None,
    "offsets": None,
}


@dataclass
class Lists:
    """The arguments of a kernel, as lists."""

    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor] = field(default_factory=list)

    def clone(self) -> Lists:
        return Lists(*([t.clone() for t in tensors] for tensors in self.lists()))

    def lists(self) -> tuple[list[Tensor], ...]:
        return self.params, self.exp_avgs, self.exp_avg_sqs, self.steps

    def run(self, kernel: Callable[..., None], grads: Sequence[Tensor], **options: Any) -> None:
        with torch.no_grad():
            kernel(self.params, grads, self.exp_avgs, self.exp_avg_sqs, self.steps, **{**DEFAULTS, **options})


def make_lists(
    shapes: Sequence[tuple[int, ...]],
    *,
    dtype: torch.dtype = torch.float32,
    exp_avg_dtype: torch.dtype | None = None,
    exp_avg_sq_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Lists:
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return Lists(
        params,
        [torch.zeros_like(p, dtype=exp_avg_dtype or dtype) for p in params],
        [torch.zeros_like(p, dtype=exp_avg_sq_dtype or exp_avg_dtype or dtype) for p in params],
        [torch.zeros(()) for _ in params],
    )


def make_grads(lists: Lists, seed: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Gradients over many orders of magnitude, a few of them exactly 0."""
    generator = torch.Generator().manual_seed(1000 + seed)
    grads = []
    for p in lists.params:
        grad = torch.randn(p.shape, generator=generator) * 10.0 ** torch.randn(p.shape, generator=generator)
        grad[torch.rand(p.shape, generator=generator) < 0.05] = 0.0
        grads.append(grad.to(dtype or p.dtype))
    return grads


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal dtype, shape and values, NaN equal to NaN."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return bool(((left == right) | (left.isnan() & right.isnan())).all())


def assert_same_bits(left: Lists, right: Lists) -> None:
    names = ("params", "exp_avgs", "exp_avg_sqs", "steps")
    for name, mine, theirs in zip(names, left.lists(), right.lists(), strict=True):
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            assert same_bits(a, b), f"{name}[{i}] (shape {tuple(a.shape)}, {a.dtype}) differs by {(a - b).abs().max()}"


def authors_adopt(params: Any, **options: Any) -> torch.optim.Optimizer:
    """The authors' optimizer, its deprecated calls into torch silenced; skips where it is not installed."""
    package = pytest.importorskip("adopt", reason="the authors' package (extra 'reference') is not installed")

    class Quiet(package.ADOPT):  # type: ignore[misc, name-defined]
        def step(self, closure: Any = None) -> Any:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return super().step(closure)

    return Quiet(params, **options)
