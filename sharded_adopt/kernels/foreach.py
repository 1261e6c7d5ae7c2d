"""ADOPT over lists: the reference's operations, each issued once for many tensors.

Elements do not look at their neighbours, so a list may be cut and joined anywhere: tensors are worked on in blocks
that are big enough to hide the cost of a call and small enough that temporary memory is a constant, not a copy of the
model. On a CPU a block stays in the cache, and the nine passes over memory become nearly one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from sharded_adopt.clipping import Clip, clip_bound
from sharded_adopt.kernels.working import (
    add_scaled_,
    advance_,
    compute_dtype,
    held_elements,
    lr_for,
    settle_,
    skipped_on_host,
    stays_on_device,
    step_for,
    store_exp_avg_sq_,
)

# Elements in a block. On a CPU its tensors (parameter, gradient, state, two temporaries: 24 bytes an element in fp32)
# should stay in the caches: 2^14 to 2^20 were measured, and 2^18 was the fastest on the GPT-2 list and on one flat
# tensor. Elsewhere a block only bounds the temporary memory (256 MiB in fp32).
_CPU_BLOCK_NUMEL = 1 << 18
_DEVICE_BLOCK_NUMEL = 1 << 25


_Tensors: TypeAlias = "list[Tensor] | tuple[Tensor, ...]"


@dataclass(slots=True)
class Block:
    """Entries worked on together: equal device and dtypes, all in their first step or none. The lists are parallel."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[int | Tensor] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # index of the first element in its parameter
    numel: int = 0


def adopt_foreach_(
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
    """Do what `adopt_reference_` does, to the bit on a CPU; see there. `differentiable` raises `ValueError`.

    Every parameter has its own step and clip bound, whatever else is in the list.
    """
    if differentiable:
        raise ValueError("foreach=True cannot be differentiated; use foreach=False with differentiable=True")
    on_device = stays_on_device(capturable)
    if not on_device and skipped_on_host(found_inf):
        return
    skipped = found_inf.reshape(()) != 0 if on_device and found_inf is not None else None
    lr = lr_for(lr, as_tensor=on_device)
    steps = [step_for(step, p.device, on_device=on_device) for step, p in zip(state_steps, params, strict=True)]

    for block in blocks(params, grads, exp_avgs, exp_avg_sqs, steps, offsets):
        dtype = compute_dtype(block.params[0], block.exp_avgs[0], block.exp_avg_sqs[0])
        thetas = _as_dtype(block.params, dtype)
        gradients = _as_dtype(block.grads, dtype)
        if grad_scale is not None:
            gradients = list(torch._foreach_div(gradients, grad_scale.to(gradients[0]).reshape(())))
        if maximize:
            gradients = list(torch._foreach_neg(gradients))
        if weight_decay != 0 and not decouple:
            gradients = list(torch._foreach_add(gradients, thetas, alpha=weight_decay))

        if _is_first(block.steps[0]):
            _store_exp_avg_sqs_(block, torch._foreach_mul(gradients, gradients))
            continue

        held = [held_elements(step, v, init) for step, v in zip(block.steps, block.exp_avg_sqs, strict=True)]
        masked = held[0] is not None or skipped is not None
        if masked:
            thetas = [theta.to(dtype, copy=True) for theta in block.params]
        ms = _as_dtype(block.exp_avgs, dtype, copy=masked)
        vs = _as_dtype(block.exp_avg_sqs, dtype, copy=masked)

        if weight_decay != 0 and decouple:
            _add_scaled_(thetas, thetas, -lr * weight_decay)
        denoms = torch._foreach_sqrt(vs)
        torch._foreach_clamp_min_(denoms, eps)
        normed_grads = torch._foreach_div(gradients, denoms)
        del denoms
        _clip_(normed_grads, clip_lambda, block.steps)
        torch._foreach_lerp_(ms, normed_grads, 1 - beta1)
        _add_scaled_(thetas, torch._foreach_lerp(ms, normed_grads, 1 - beta1) if nesterov else ms, -lr)
        torch._foreach_mul_(vs, beta2)
        torch._foreach_addcmul_(vs, gradients, gradients, value=1 - beta2)

        if masked:
            for i, tensors in enumerate(zip(block.params, block.exp_avgs, block.exp_avg_sqs, strict=True)):
                settle_(
                    tensors,
                    (thetas[i], ms[i], vs[i]),
                    gradients[i],
                    held=held[i],
                    skipped=skipped,
                    step=block.steps[i],
                    start=block.starts[i],
                )
            continue
        if thetas is not block.params:
            torch._foreach_copy_(block.params, thetas)
        if ms is not block.exp_avgs:
            torch._foreach_copy_(block.exp_avgs, ms)
        if vs is not block.exp_avg_sqs:
            _store_exp_avg_sqs_(block, vs)

    if step_increment is None and skipped is None and state_steps and all(step.is_cpu for step in state_steps):
        torch._foreach_add_(list(state_steps), torch.ones(()), alpha=1)  # a Python 1 would be wrapped once a step
    else:
        for step in state_steps:
            advance_(step, step_increment, skipped)


def blocks(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[int | Tensor],
    offsets: Sequence[int] | None,
    cpu_numel: int | None = None,
) -> Iterator[Block]:
    """Cut and join the lists into blocks, on a CPU of `cpu_numel` elements.

    Empty tensors are left out; a tensor that is not contiguous is not cut.
    """
    unfinished: dict[object, Block] = {}
    whole = torch.compiler.is_compiling()  # a compiler fuses across blocks by itself and wants few nodes
    for i, entry in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        param = entry[0]
        numel = param.numel()
        if numel == 0:
            continue
        key = (param.device, *(tensor.dtype for tensor in entry), _is_first(steps[i]))
        limit = (cpu_numel or _CPU_BLOCK_NUMEL) if param.device.type == "cpu" else _DEVICE_BLOCK_NUMEL
        start = 0 if offsets is None else offsets[i]
        pieces: Iterator[tuple[Tensor, ...]] = iter((entry,))
        if numel > limit and not whole and all(tensor.is_contiguous() for tensor in entry):
            pieces = zip(*(tensor.view(-1).split(limit) for tensor in entry), strict=True)
        for piece in pieces:
            block = unfinished.setdefault(key, Block())
            if block.numel + piece[0].numel() > limit and block.numel and not whole:
                yield block
                block = unfinished[key] = Block()
            block.params.append(piece[0])
            block.grads.append(piece[1])
            block.exp_avgs.append(piece[2])
            block.exp_avg_sqs.append(piece[3])
            block.steps.append(steps[i])
            block.starts.append(start)
            block.numel += piece[0].numel()
            start += piece[0].numel()
    yield from unfinished.values()


def _is_first(step: int | Tensor) -> bool:
    """Whether the host knows this to be a first step; a step on the device is decided by `held_elements`."""
    return not isinstance(step, Tensor) and step == 0


def _as_dtype(tensors: list[Tensor], dtype: torch.dtype, *, copy: bool = False) -> list[Tensor]:
    """The list itself where nothing has to be widened or copied: `is` tells whether results must be written back."""
    if tensors[0].dtype == dtype and not copy:
        return tensors
    return [tensor.to(dtype, copy=copy) for tensor in tensors]


def _add_scaled_(targets: _Tensors, sources: _Tensors, scale: float | Tensor) -> None:
    if isinstance(scale, Tensor):
        for target, source in zip(targets, sources, strict=True):
            add_scaled_(target, source, scale)
    else:
        torch._foreach_add_(targets, sources, alpha=scale)


def _clip_(normed_grads: _Tensors, clip_lambda: Clip | None, steps: list[int | Tensor]) -> None:
    """Clamp each tensor in place to the bound of its own step."""
    if isinstance(steps[0], int):
        of_step = {step: clip_bound(clip_lambda, step) for step in dict.fromkeys(steps)}
        bounds = [of_step[step] for step in steps]
    else:
        bounds = [clip_bound(clip_lambda, step) for step in steps]
    numbers = [bound for bound in bounds if isinstance(bound, float)]
    if len(numbers) < len(bounds):
        for normed_grad, bound in zip(normed_grads, bounds, strict=True):
            if bound is not None:
                bound = torch.as_tensor(bound).to(normed_grad)
                normed_grad.clamp_(-bound, bound)
    elif min(numbers) == max(numbers):
        torch._foreach_clamp_max_(normed_grads, numbers[0])
        torch._foreach_clamp_min_(normed_grads, -numbers[0])
    else:
        torch._foreach_clamp_max_(normed_grads, numbers)
        torch._foreach_clamp_min_(normed_grads, [-number for number in numbers])


def _store_exp_avg_sqs_(block: Block, values: Sequence[Tensor]) -> None:
    for i, exp_avg_sq in enumerate(block.exp_avg_sqs):
        store_exp_avg_sq_(exp_avg_sq, values[i], step=block.steps[i], start=block.starts[i])
