"""`adopt`, the functional form of ADOPT, and the call of a kernel that it shares with the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sharded_adopt import options
from sharded_adopt.clipping import as_clip
from sharded_adopt.kernels import Kernels
from sharded_adopt.kernels.working import as_real


def adopt(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    foreach: bool | None = None,
    capturable: bool = False,
    differentiable: bool = False,
    fused: bool | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    has_complex: bool = False,
    *,
    beta1: float,
    beta2: float,
    lr: float | Tensor,
    clip_lambda: Any,
    weight_decay: float,
    decouple: bool,
    eps: float,
    maximize: bool,
    nesterov: bool = False,
    init: str = "parameter",
    offsets: Sequence[int] | None = None,
    step_increment: Tensor | None = None,
    kernels: Kernels | None = None,
) -> None:
    """Update lists of parameters and their state in place; the functional form of `ADOPT`.

    The lists run in parallel; a parameter, its gradient, exp_avg and exp_avg_sq share a shape, each of `state_steps`
    is a 0-dim tensor. `grads` are only read. `offsets[i]` is the index of the first element of `params[i]` in the
    parameter that it was cut from. `step_increment` (0-dim) is added to the steps in place of 1. `has_complex` may be
    left out. `kernels` keeps what a fused kernel prepared for these lists for the next call. See `ADOPT` for the rest.
    """
    lengths = [len(each) for each in (params, grads, exp_avgs, exp_avg_sqs, state_steps)]
    if len({*lengths, len(params if offsets is None else offsets)}) > 1:
        raise ValueError(f"the lists must have one entry a parameter, got {lengths} and offsets={offsets}")
    if not all(isinstance(step, Tensor) for step in state_steps):
        raise ValueError("state_steps must hold 0-dim tensors, they are advanced in place")
    if init not in options.INITS:
        raise ValueError(f"init must be one of {options.INITS}, got {init!r}")
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        run_kernel(
            kernels or Kernels(),
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            state_steps,
            foreach=foreach,
            fused=fused,
            has_complex=has_complex or any(param.is_complex() for param in params),
            capturable=capturable,
            differentiable=differentiable,
            grad_scale=grad_scale,
            found_inf=found_inf,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            clip_lambda=as_clip(clip_lambda),
            weight_decay=weight_decay,
            decouple=decouple,
            eps=eps,
            maximize=maximize,
            nesterov=nesterov,
            init=init,
            offsets=offsets,
            step_increment=step_increment,
        )


def run_kernel(
    kernels: Kernels,
    *lists: Sequence[Tensor],
    foreach: bool | None,
    fused: bool | None,
    has_complex: bool,
    differentiable: bool,
    **rule: Any,
) -> None:
    """Choose the kernel and call it; complex tensors are seen as real ones."""
    params, grads, exp_avgs, exp_avg_sqs, steps = lists
    if has_complex:
        params, grads, exp_avgs, exp_avg_sqs = map(as_real, (params, grads, exp_avgs, exp_avg_sqs))
    kernel = kernels.select(params, grads, foreach=foreach, fused=fused, differentiable=differentiable)
    kernel(params, grads, exp_avgs, exp_avg_sqs, steps, differentiable=differentiable, **rule)
