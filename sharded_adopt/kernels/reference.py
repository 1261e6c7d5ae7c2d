"""ADOPT one parameter at a time, the paper line by line: what every other kernel is compared with.

Taniguchi et al., "ADOPT: Modified Adam Can Converge with Any β2 with the Optimal Rate", arXiv 2411.02853, algorithm
2, in the form of the authors' package (torch-adopt 0.1.0), whose single-tensor path this equals bit for bit in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_adopt.clipping import Clip, clip_bound
from sharded_adopt.kernels.working import (
    add_scaled_,
    advance_,
    compute_dtype,
    held_elements,
    lr_for,
    normalised,
    settle_,
    skipped_on_host,
    stays_on_device,
    step_for,
    store_exp_avg_sq_,
)


def adopt_reference_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    beta1: float,
    beta2: float,
    lr: float | Tensor,
    clip_lambda: Clip | None,
    weight_decay: float,
    decouple: bool,
    eps: float,
    maximize: bool,
    nesterov: bool,
    init: str,
    capturable: bool,
    differentiable: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    offsets: Sequence[int] | None,
    step_increment: Tensor | None = None,
) -> None:
    """Update `params`, `exp_avgs`, `exp_avg_sqs` and `state_steps` in place; `grads` are only read.

    All tensors are real and plain (no DTensor); the four of a parameter share its shape, a step is 0-dim. The
    arithmetic is fp32, or fp64 where the parameter or its state is; what is narrower is widened first and rounded
    once at the end.

    `grad_scale` (0-dim) divides the gradients; a `found_inf` (0-dim) other than 0 changes nothing at all.
    `offsets[i]` is the index of the first element of `params[i]` in the parameter that it was cut from (for the
    rounding of a 16-bit exp_avg_sq). `step_increment` (0-dim) is added to the steps in place of 1. With `capturable`
    or under torch.compile nothing is read on the host: [Note: host and device] in `working`.
    """
    on_device = stays_on_device(capturable)
    if not on_device and skipped_on_host(found_inf):
        return
    skipped = found_inf.reshape(()) != 0 if on_device and found_inf is not None else None
    lr = lr_for(lr, as_tensor=on_device or differentiable)

    for i, (param, exp_avg, exp_avg_sq) in enumerate(zip(params, exp_avgs, exp_avg_sqs, strict=True)):
        step = step_for(state_steps[i], param.device, on_device=on_device)
        start = 0 if offsets is None else offsets[i]
        dtype = compute_dtype(param, exp_avg, exp_avg_sq)
        is_first = not on_device and step == 0
        held = None if is_first else held_elements(step, exp_avg_sq, init)
        # The working values are the tensors themselves where nothing needs rounding and nothing may have to be put
        # back.
        masked = held is not None or skipped is not None
        theta, m, v = (tensor.to(dtype, copy=masked) for tensor in (param, exp_avg, exp_avg_sq))

        grad = grads[i].to(dtype)
        if grad_scale is not None:
            grad = grad / grad_scale.to(grad).reshape(())
        if maximize:
            grad = -grad
        if weight_decay != 0 and not decouple:
            grad = grad.add(theta, alpha=weight_decay)

        if is_first:  # v_0 = g_0², and nothing moves
            store_exp_avg_sq_(exp_avg_sq, grad * grad, step=step, start=start)
            advance_(state_steps[i], step_increment, skipped)
            continue

        if weight_decay != 0 and decouple:
            add_scaled_(theta, theta, -lr * weight_decay)
        # n_t = clip(g_t / max(√v_{t-1}, ε), c_t)
        normed_grad = normalised(grad, v, eps, differentiable)
        bound = clip_bound(clip_lambda, step)
        if isinstance(bound, Tensor):
            bound = bound.to(normed_grad)
            normed_grad = torch.clamp(normed_grad, -bound, bound)
        elif bound is not None:
            normed_grad.clamp_(-bound, bound)
        # m_t = β1 m_{t-1} + (1 - β1) n_t
        m.lerp_(normed_grad, 1 - beta1)
        # θ_t = θ_{t-1} - α m_t; nesterov averages once more with n_t
        add_scaled_(theta, m.lerp(normed_grad, 1 - beta1) if nesterov else m, -lr)
        # v_t = β2 v_{t-1} + (1 - β2) g_t²
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)

        settle_((param, exp_avg, exp_avg_sq), (theta, m, v), grad, held=held, skipped=skipped, step=step, start=start)
        advance_(state_steps[i], step_increment, skipped)
