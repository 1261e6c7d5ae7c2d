"""Figures of a step: how large the update was, how much of it was clipped, how large the gradient was.

They are computed beside the kernel, from what it is about to read, and nothing of the step depends on them. Lists are
worked on in the blocks of the foreach kernel, so that temporary memory is a constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharded_adopt.clipping import Clip, clip_bound
from sharded_adopt.dtensor import Part, sum_over_mesh
from sharded_adopt.kernels.foreach import Block, blocks
from sharded_adopt.kernels.working import (
    as_real,
    compute_dtype,
    held_elements,
    normalised,
    stays_on_device,
    step_for,
)

Rule = Mapping[str, Any]
"""The keyword arguments of the kernel that is about to run; `adopt_reference_` says what they mean."""

# What is summed up: over the updated elements the square of the update over lr, their number, and the number of those
# that were clipped; over all elements with a gradient its square.
_UPDATE_SQ, _UPDATED, _CLIPPED, _GRAD_SQ = range(4)


# Elements in a block on a CPU: temporaries that stay in the second cache were measured to be the fastest.
_CPU_BLOCK_NUMEL = 1 << 17


class Statistics:
    """The sums of the last step, on `device`, one row for plain tensors and one for each mesh of DTensors.

    They stay in the same memory, so that a captured graph may write them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # MPS has no fp64.
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._rows: dict[Any, Tensor] = {}
        self._measured: dict[Any, Tensor] = {}

    def begin(self) -> None:
        """Start a step."""
        self._measured = {}

    @torch.no_grad()
    def measure(
        self,
        lists: tuple[Sequence[Tensor], ...],
        rule: Rule,
        parts: Sequence[Part | None],
    ) -> None:
        """Add one call of a kernel that is about to run on `lists`: params, grads, exp_avgs, exp_avg_sqs, steps.

        `parts` says of what mesh each parameter is a part; empty where none is.
        """
        if any(grad.layout is not torch.strided for grad in lists[1]):
            return  # the kernel will refuse it
        places: dict[Part | None, list[int]] = {}
        for index in range(len(lists[0])):
            places.setdefault(parts[index] if parts else None, []).append(index)
        for part, members in places.items():
            chosen = lists if len(places) == 1 else tuple([one[i] for i in members] for one in lists)
            sums = _sums(chosen, rule, self._device, self._dtype)
            mesh = None
            if part is not None:  # what every copy sees is counted once
                mesh, sums = part.mesh, sums / part.copies
            self._measured[mesh] = self._measured[mesh] + sums if mesh in self._measured else sums

    @torch.no_grad()
    def end(self, found_inf: Tensor | None) -> None:
        """Keep what was measured as the last step's, unless that step was skipped. Reads nothing on the host."""
        for mesh in {**self._rows, **self._measured, None: None}:
            new = self._measured.get(mesh)
            new = torch.zeros(4, dtype=self._dtype, device=self._device) if new is None else new
            row = self._rows.setdefault(mesh, torch.full_like(new, torch.nan))
            row.copy_(new if found_inf is None else torch.where(found_inf.reshape(()).to(row.device) != 0, row, new))
        self._measured = {}

    def clear(self) -> None:
        """Make the last step one in which nothing was updated and no gradient seen."""
        self.begin()
        self.end(None)

    def totals(self) -> Tensor:
        """The sums of the last step as a tensor of its own: 1-D, 4 elements, NaN before the first.

        Collective over the meshes of DTensors.
        """
        rows = [row if mesh is None else sum_over_mesh(row, mesh) for mesh, row in self._rows.items()]
        return torch.stack(rows).sum(0) if rows else torch.full((4,), torch.nan, dtype=self._dtype, device=self._device)


def figures(totals: Tensor) -> dict[str, Tensor]:
    """The figures as 0-dim fp32 tensors, from sums that may have been added up over ranks."""
    updated = totals[_UPDATED].clamp(min=1)
    values = {
        "update_rms": (totals[_UPDATE_SQ] / updated).sqrt(),
        "clipped_share": totals[_CLIPPED] / updated,
        "grad_norm": totals[_GRAD_SQ].sqrt(),
    }
    return {name: value.to(torch.float32) for name, value in values.items()}


def _sums(lists: tuple[Sequence[Tensor], ...], rule: Rule, device: torch.device, dtype: torch.dtype) -> Tensor:
    params, grads, exp_avgs, exp_avg_sqs = map(as_real, lists[:4])
    on_device = stays_on_device(rule["capturable"])
    steps = [step_for(step, param.device, on_device=on_device) for step, param in zip(lists[4], params, strict=True)]
    total = torch.zeros(4, dtype=dtype, device=device)
    for block in blocks(params, grads, exp_avgs, exp_avg_sqs, steps, None, cpu_numel=_CPU_BLOCK_NUMEL):
        total = total + _sums_of_block(block, rule, dtype).to(device)
    return total


def _sums_of_block(block: Block, rule: Rule, total_dtype: torch.dtype) -> Tensor:
    """The four sums of one block. The arithmetic is the kernels', down to the root that divides."""
    dtype = compute_dtype(block.params[0], block.exp_avgs[0], block.exp_avg_sqs[0])
    grad = _joined(block.grads).to(dtype)
    if rule["grad_scale"] is not None:
        grad = grad / rule["grad_scale"].to(grad).reshape(())
    grad_sq = torch.dot(grad, grad)
    none = torch.zeros_like(grad_sq)
    if not isinstance(block.steps[0], Tensor) and block.steps[0] == 0:  # a first step is no update
        return torch.stack([none, none, none, grad_sq]).to(total_dtype)
    if rule["maximize"]:
        grad = -grad
    if rule["weight_decay"] != 0 and not rule["decouple"]:
        grad = grad.add(_joined(block.params).to(dtype), alpha=rule["weight_decay"])
    exp_avg, exp_avg_sq = (_joined(tensors).to(dtype) for tensors in (block.exp_avgs, block.exp_avg_sqs))
    held = held_elements(_step_of(block), exp_avg_sq, rule["init"])
    normed = normalised(grad, exp_avg_sq, rule["eps"])
    bound = _bound_of(block, rule["clip_lambda"], normed)
    clamped = normed if bound is None else torch.clamp(normed, -bound, bound)
    update = exp_avg.lerp(clamped, 1 - rule["beta1"])
    if rule["nesterov"]:
        update.lerp_(clamped, 1 - rule["beta1"])
    # In place, 1.0 where it was clipped: ten times as fast as making a mask.
    was_clipped = torch.zeros_like(normed) if bound is None else normed.ne_(clamped)
    updated = torch.full_like(grad_sq, grad.numel())
    if held is not None:
        held = held.expand_as(grad)
        update.masked_fill_(held, 0)
        was_clipped.masked_fill_(held, 0)
        updated = updated - held.count_nonzero()
    return torch.stack([torch.dot(update, update), updated, was_clipped.count_nonzero(), grad_sq]).to(total_dtype)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """The elements of all tensors, 1-D; a view where there is one contiguous tensor."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _step_of(block: Block) -> int | Tensor:
    """The step of every element of a block; the host needs none once it knows that it is no first one."""
    if not isinstance(block.steps[0], Tensor):
        return int(block.steps[0])
    return _spread([step for step in block.steps if isinstance(step, Tensor)], block)


def _bound_of(block: Block, clip: Clip | None, like: Tensor) -> Any:
    """The clip bound: one number where the host knows that it is the same for all of a block, else for each element."""
    if clip is None:
        return None
    if not isinstance(block.steps[0], Tensor) and len(set(block.steps)) == 1:
        bound = clip_bound(clip, block.steps[0])
        return bound.to(like) if isinstance(bound, Tensor) else bound
    bounds = [torch.as_tensor(clip_bound(clip, step), device=like.device) for step in block.steps]
    return _spread([bound.to(like.dtype) for bound in bounds], block)


def _spread(values: Sequence[Tensor], block: Block) -> Tensor:
    """One 0-dim tensor for each entry of a block, repeated for each of its elements."""
    return torch.cat([value.reshape(1).expand(p.numel()) for value, p in zip(values, block.params, strict=True)])
