"""What kernels in torch operations share: where scalars are read, and how results go back into the tensors.

[Note: host and device] Eager and not capturable, a kernel may read `step` (on the CPU), `found_inf` and a tensor `lr`
on the host and branch on them. With `capturable` or under torch.compile it may not: they stay 0-dim tensors,
everything is computed as if every element took an ordinary step, on copies, and `settle_` chooses between before and
after.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_adopt.kernels.rounding import round_stochastically_

_SIXTEEN_BIT = (torch.float16, torch.bfloat16)


def stays_on_device(capturable: bool) -> bool:
    """Return whether this call must not read a tensor on the host; see [Note: host and device]."""
    return capturable or torch.compiler.is_compiling()


def skipped_on_host(found_inf: Tensor | None) -> bool:
    """Return whether the gradients hold an inf or NaN, so that nothing may change. Reads `found_inf`."""
    return found_inf is not None and bool(found_inf.item())


def lr_for(lr: float | Tensor, *, as_tensor: bool) -> float | Tensor:
    """Return `lr` as the kernel needs it: a tensor that must stay one as 0-dim, else one float, read once a call."""
    if not isinstance(lr, Tensor):
        return lr
    return lr.reshape(()) if as_tensor else float(lr.item())


def step_for(step: Tensor, device: torch.device, *, on_device: bool) -> int | Tensor:
    """Return `step` as the kernel needs it: an int, or a 0-dim tensor beside the parameter."""
    return step.to(device) if on_device else int(step.item())


def compute_dtype(param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic: fp64 where the parameter or its state is fp64, fp32 everywhere else."""
    is_double = torch.float64 in (param.dtype, exp_avg.dtype, exp_avg_sq.dtype)
    return torch.float64 if is_double else torch.float32


def add_scaled_(target: Tensor, source: Tensor, scale: float | Tensor) -> None:
    """target += scale * source, where a tensor `scale` is not read on the host."""
    if isinstance(scale, Tensor):
        if scale.requires_grad:  # autograd keeps `source`, which the next step overwrites
            source = source.clone()
        target.add_(source * scale.to(target))
    else:
        target.add_(source, alpha=scale)


def as_real(tensors: Sequence[Tensor]) -> list[Tensor]:
    """View complex tensors as real ones with a last dimension of 2, others as they are."""
    return [torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor for tensor in tensors]


def normalised(grad: Tensor, exp_avg_sq: Tensor, eps: float, differentiable: bool = False) -> Tensor:
    """g / max(√v, eps)."""
    return grad.div(torch.clamp(sqrt_of(exp_avg_sq, eps, differentiable), eps))


def sqrt_of(exp_avg_sq: Tensor, eps: float, differentiable: bool) -> Tensor:
    """√v. Differentiable, zeros are replaced by what the clamp to `eps` hides: √0 has slope inf, and inf * 0 is NaN."""
    if differentiable:
        exp_avg_sq = exp_avg_sq.masked_fill(exp_avg_sq == 0, (0.5 * eps) ** 2)
    return exp_avg_sq.sqrt()


def held_elements(step: int | Tensor, exp_avg_sq: Tensor, init: str) -> Tensor | None:
    """Return where only v <- g² happens, as a mask that broadcasts over the parameter, or None for nowhere.

    That is everywhere in a first step whose `step` is a tensor, and with init="element" where v is 0.
    """
    held = torch.eq(step, 0) if isinstance(step, Tensor) else None
    if init == "element":
        fresh = exp_avg_sq == 0
        held = fresh if held is None else held | fresh
    return held


def settle_(
    tensors: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    *,
    held: Tensor | None,
    skipped: Tensor | None,
    step: int | Tensor,
    start: int,
) -> None:
    """Write `results` into `tensors` (each: parameter, exp_avg, exp_avg_sq), rounding where those are narrower.

    Where `held`, exp_avg_sq becomes grad² and the rest stays; where `skipped` (0-dim), everything stays. A result
    that is its tensor was computed in place and needs nothing.
    """
    param, exp_avg, exp_avg_sq = tensors
    theta, m, v = results
    if held is not None:
        theta, m, v = torch.where(held, param, theta), torch.where(held, exp_avg, m), torch.where(held, grad * grad, v)
    if skipped is not None:
        skipped = skipped.to(param.device)
        theta, m, v = (torch.where(skipped, old, new) for old, new in zip(tensors, (theta, m, v), strict=True))
    if theta is not param:
        param.copy_(theta)
    if m is not exp_avg:
        exp_avg.copy_(m)
    if v is not exp_avg_sq:
        store_exp_avg_sq_(exp_avg_sq, v, step=step, start=start)


def store_exp_avg_sq_(exp_avg_sq: Tensor, value: Tensor, *, step: int | Tensor, start: int) -> None:
    """Write `value` into `exp_avg_sq`: 16 bits are rounded stochastically (`rounding`), anything else to nearest."""
    if exp_avg_sq.dtype in _SIXTEEN_BIT:
        round_stochastically_(exp_avg_sq, value.to(torch.float32), step=step, start=start)
    else:
        exp_avg_sq.copy_(value)


def advance_(step: Tensor, increment: Tensor | None, skipped: Tensor | None) -> None:
    """step += increment (None: 1), or += 0 where the whole step is `skipped`."""
    if increment is None and skipped is None:
        step.add_(1)
        return
    by = torch.ones_like(step) if increment is None else increment.to(step)
    step.add_(by if skipped is None else torch.where(skipped.to(step.device), torch.zeros_like(by), by))
