"""`torch.ops.sharded_adopt.adopt_`: the fused update as one operator, for graphs.

Under torch.compile nothing of the fused kernel can be traced: it works on addresses. The operator stands in the graph
for the whole call, with a fake implementation that computes nothing, since it only writes into its arguments. Eager
calls do not pass through here: packing thousands of tensors into an operator's arguments takes longer than the update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sharded_adopt.clipping import PowerClip

_SCHEMA = (
    "adopt_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] state_steps, *, float beta1, float beta2, float lr, Tensor? lr_tensor, float? clip_exponent, "
    "float clip_scale, float weight_decay, bool decouple, float eps, bool maximize, bool nesterov, str init, "
    "bool capturable, Tensor? grad_scale, Tensor? found_inf, int[]? offsets, Tensor? step_increment) -> ()"
)


def register(make_kernel: Callable[[], Callable[..., None]]) -> torch.library.Library:
    """Define the operator; `make_kernel()` gives the kernel of one call. The result owns the operator."""
    library = torch.library.Library("sharded_adopt", "FRAGMENT")
    library.define(_SCHEMA)

    def run(
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        state_steps: list[Tensor],
        *,
        lr: float,
        lr_tensor: Tensor | None,
        clip_exponent: float | None,
        clip_scale: float,
        **options: Any,
    ) -> None:
        make_kernel()(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            state_steps,
            lr=lr if lr_tensor is None else lr_tensor,
            clip_lambda=None if clip_exponent is None else PowerClip(clip_exponent, clip_scale),
            differentiable=False,
            **options,
        )

    library.impl("adopt_", run, "CompositeExplicitAutograd")
    torch.library.register_fake("sharded_adopt::adopt_", lambda *lists, **options: None, lib=library)
    return library


def call(*lists: list[Tensor], lr: float | Tensor, clip_lambda: PowerClip | None, **options: Any) -> None:
    """Call the operator with the arguments of a kernel."""
    del options["differentiable"]
    is_tensor = isinstance(lr, Tensor)
    torch.ops.sharded_adopt.adopt_.default(
        *lists,
        lr=0.0 if is_tensor else lr,
        lr_tensor=lr if is_tensor else None,
        clip_exponent=None if clip_lambda is None else clip_lambda.exponent,
        clip_scale=1.0 if clip_lambda is None else clip_lambda.scale,
        **options,
    )
