"""What the tests of the fused kernels share: lists of tensors, a way of calling a kernel, an exact square root."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharded_adopt.clipping import PowerClip

Lists = list[list[Tensor]]
"""params, exp_avgs, exp_avg_sqs, state_steps"""

OPTIONS: dict[str, Any] = {
    "beta1": 0.9,
    "beta2": 0.99,
    "lr": 0.01,
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
    "step_increment": None,
}

# (parameter, gradient, exp_avg, exp_avg_sq) as they occur: plain, 16-bit with fp32 state, 16-bit state, mixtures
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [
    (F32, F32, F32, F32),
    (F64, F64, F64, F64),
    (BF16, BF16, F32, F32),
    (F16, F16, F32, F32),
    (BF16, BF16, BF16, BF16),
    (F16, F16, F16, F16),
    (F32, F32, BF16, BF16),
    (F32, F32, F32, BF16),
    (F32, BF16, F32, F32),
    (F32, F32, F16, F16),
    (F64, F64, F32, F32),
    (F64, F64, BF16, BF16),
]


def ieee_sqrt(x: Tensor) -> Tensor:
    """The square root that IEEE 754 asks for, which numpy has everywhere.

    torch's CPU wheels take it from MKL, which on some machines is one unit in the last place off for a sixth of all
    numbers (seen: AMD EPYC of family 25). The kernels in C round it correctly everywhere, so tests of equality to
    the bit put this in the place of `Tensor.sqrt`.
    """
    root = torch.empty_like(x)
    with np.errstate(invalid="ignore"):
        np.sqrt(x.numpy(), out=root.numpy())
    return root


def make_lists(
    shapes: Sequence[tuple[int, ...]],
    dtypes: tuple[torch.dtype, ...],
    generator: torch.Generator,
    *,
    steps: Sequence[int] | None = None,
    start: int = 0,
) -> Lists:
    """Random lists whose tensors begin `start` elements into their storage; v is a plausible one where step > 0."""
    steps = [0] * len(shapes) if steps is None else steps
    param_dtype, _, exp_avg_dtype, exp_avg_sq_dtype = dtypes

    def place(values: Tensor, dtype: torch.dtype) -> Tensor:
        storage = torch.empty(values.numel() + start, dtype=dtype)
        return storage[start:].view(values.shape).copy_(values)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    return [
        [place(draw(shape), param_dtype) for shape in shapes],
        [place(draw(shape) * (step > 0), exp_avg_dtype) for shape, step in zip(shapes, steps, strict=True)],
        [place(draw(shape).square() * (step > 0), exp_avg_sq_dtype) for shape, step in zip(shapes, steps, strict=True)],
        [torch.tensor(float(step)) for step in steps],
    ]


def make_grads(params: Sequence[Tensor], dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """Normal gradients; some elements are large, tiny or zero."""
    grads = []
    for param in params:
        grad = torch.randn(param.shape, generator=generator)
        kind = torch.randint(0, 16, param.shape, generator=generator)
        grad = torch.where(kind == 0, grad * 100, torch.where(kind == 1, grad * 1e-6, grad))
        grads.append(torch.where(kind == 2, torch.zeros(()), grad).to(dtype))
    return grads


def clone(lists: Lists) -> Lists:
    """The same lists in storage of their own, strides kept."""
    return [[tensor.clone() for tensor in tensors] for tensors in lists]


def call(kernel: Callable[..., None], lists: Lists, grads: Sequence[Tensor], **options: Any) -> None:
    """One step."""
    params, exp_avgs, exp_avg_sqs, steps = lists
    with torch.no_grad():
        kernel(params, grads, exp_avgs, exp_avg_sqs, steps, **{**OPTIONS, **options})


def assert_same_bits(left: Lists, right: Lists) -> None:
    """Every element of every tensor is the same number; NaN equals NaN."""
    for name, a_list, b_list in zip(("param", "exp_avg", "exp_avg_sq", "step"), left, right, strict=True):
        for i, (a, b) in enumerate(zip(a_list, b_list, strict=True)):
            differs = ~((a == b) | (a.isnan() & b.isnan()))
            if differs.any():
                at = differs.nonzero()[0].tolist()
                got, expected = a[tuple(at)].item(), b[tuple(at)].item()
                raise AssertionError(
                    f"{name} {i} {tuple(a.shape)} {a.dtype} differs in {int(differs.sum())} of {a.numel()} elements, "
                    f"first at {at}: {got!r} and {expected!r}"
                )
