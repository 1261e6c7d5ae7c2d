"""The update of ADOPT over lists of tensors: one signature, several ways of running it, and the choice between them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from sharded_adopt.clipping import Clip
from sharded_adopt.kernels.foreach import adopt_foreach_
from sharded_adopt.kernels.fused import FusedAdopt, NotDenseError, runs_on, supports, why_unavailable
from sharded_adopt.kernels.fused import is_available as fused_is_available
from sharded_adopt.kernels.reference import adopt_reference_

__all__ = ["Kernel", "Kernels", "NotDenseError", "check_choice", "fused_is_available", "looks_at_gradients"]


class Kernel(Protocol):
    """An in-place update of lists of real, plain tensors; `adopt_reference_` says what each argument means."""

    def __call__(
        self,
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
        """Update everything but `grads` in place."""
        ...


def check_choice(*, foreach: bool | None, fused: bool | None, differentiable: bool) -> None:
    """Refuse what no kernel can do: `ValueError` for contradictions, and for `fused=True` where none is to be had."""
    if foreach and fused:
        raise ValueError("foreach=True and fused=True exclude each other; give one of them, or neither for the fastest")
    for name, value in (("foreach", foreach), ("fused", fused)):
        if value and differentiable:
            raise ValueError(
                f"{name}=True and differentiable=True exclude each other; only single tensors have autograd"
            )
    if fused and not fused_is_available():
        raise ValueError(f"fused=True: {why_unavailable()}; leave fused out for the fastest kernel there is")


def looks_at_gradients(devices: Iterable[torch.device]) -> bool:
    """Return whether the fastest kernel for these devices raises `NotDenseError`; only the native one does."""
    return all(device.type == "cpu" and runs_on(device) for device in devices)


class Kernels:
    """The choice of kernels for one owner of lists: an optimizer, or one call of `adopt`."""

    def __init__(self) -> None:
        self._fused = FusedAdopt()

    def select(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        *,
        foreach: bool | None,
        fused: bool | None,
        differentiable: bool,
    ) -> Kernel:
        """Return the kernel that was asked for; with neither, the fastest that supports the call.

        That is the fused kernel, then foreach (measured faster than the reference on a CPU as well: its blocks stay
        in the cache), then the reference for what only single tensors can do: autograd through the step, tensor
        subclasses. The first time that the fused kernel is wanted and missing, the log says so.
        """
        check_choice(foreach=foreach, fused=fused, differentiable=differentiable)
        if fused or (fused is None and foreach is None and not differentiable):
            if supports(params):
                return self._fused
            if fused:
                kinds = {tuple(f"{t.device.type} {t.dtype}" for t in row) for row in zip(params, grads, strict=True)}
                raise ValueError(f"fused=True does not support these (parameter, gradient): {sorted(kinds)}")
            if not fused_is_available() and not torch.compiler.is_compiling():
                _say_once(f"ADOPT runs its foreach kernel instead of the fused one: {why_unavailable()}")
        if foreach is None:
            foreach = not differentiable and all(type(param) in (Tensor, Parameter) for param in params)
        return adopt_foreach_ if foreach else adopt_reference_


@functools.cache
def _say_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)
