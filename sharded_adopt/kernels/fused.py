"""ADOPT in one pass over memory: reads parameter, gradient and both moments once, writes three of them once.

On the CPU the pass is C (`native/`), on CUDA it is Triton (`triton_kernel.py`). What both need to know of a list of
tensors is prepared once, as a plan, and checked at every step; rows that neither can take (layouts that do not match,
exotic dtypes) go through the reference kernel, so every list that the reference accepts is accepted here.

The results are those of the reference kernel to the bit wherever torch's own arithmetic is that of IEEE 754;
docs/fused.md names the exception (the square root of torch's CPU wheels on some machines) and what follows from it.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import math
import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from sharded_adopt.clipping import Clip, PowerClip, clip_bound
from sharded_adopt.kernels import native
from sharded_adopt.kernels import operator as operator_
from sharded_adopt.kernels.foreach import adopt_foreach_
from sharded_adopt.kernels.reference import adopt_reference_
from sharded_adopt.kernels.working import lr_for, skipped_on_host

_MAXIMIZE, _UNSCALE, _L2, _DECOUPLED, _NESTEROV, _INIT_ELEMENT = (1 << bit for bit in range(6))
_PARAM, _EXP_AVG, _EXP_AVG_SQ, _STEP = 0, 2, 3, 4
_NOT_DENSE = -2
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PLANS_KEPT = 64  # lists that one optimizer steps, as a rule one for each parameter group


SMALL_NUMEL = 1 << 15
"""Lists of tensors that have fewer elements than this on average are remembered from step to step.

What is remembered is held: a tensor that its owner drops, say to move the state to another device, would live on until
the next step. For small tensors that is little memory, and preparing them again takes longer than updating them; for
large ones it is the other way round.
"""


@dataclass(frozen=True, slots=True)
class FusedStatus:
    """Which fused kernels there are, as plain data for a command line.

    `cpu` is the instruction set of the C loops ("avx512", "avx2", "baseline"), `cuda` the version of Triton; each is
    None where there is none, and then the reason says why. `cpu_library` is the file that the loops were loaded from.
    """

    cpu: str | None
    cpu_library: str | None
    cpu_reason: str
    cuda: str | None
    cuda_reason: str


_HAS_CPU = native.load().library is not None
_HAS_CUDA = torch.version.cuda is not None and importlib.util.find_spec("triton") is not None
_library = operator_.register(lambda: FusedAdopt())


def status() -> FusedStatus:
    """Return which fused kernels can run here, and why the others cannot."""
    loaded = native.load()
    path = None if loaded.path is None else str(loaded.path)
    if _HAS_CUDA:
        return FusedStatus(loaded.isa, path, loaded.reason, importlib.metadata.version("triton"), "")
    reason = "Triton is not installed" if torch.version.cuda else "this torch was built without CUDA"
    return FusedStatus(loaded.isa, path, loaded.reason, None, reason)


def runs_on(device: torch.device) -> bool:
    """Whether there is a fused kernel for tensors on this device."""
    return _HAS_CPU if device.type == "cpu" else device.type == "cuda" and _HAS_CUDA


def is_available() -> bool:
    """Whether there is a fused kernel for any device."""
    return _HAS_CPU or _HAS_CUDA


def why_unavailable(device_type: str = "cpu") -> str:
    """Why there is no fused kernel for a device, for a message."""
    reasons = {"cpu": status().cpu_reason, "cuda": status().cuda_reason}
    return f"the fused kernel for {device_type} is missing: {reasons.get(device_type, 'nobody wrote one')}"


def supports(params: Sequence[Tensor]) -> bool:
    """Whether a fused kernel can run on these parameters: plain tensors on a device that has one."""
    return all(runs_on(param.device) for param in params[:1]) and set(map(type, params)) <= {Tensor, Parameter}


class NotDenseError(RuntimeError):
    """A gradient is not dense. Raised before anything is changed; whoever knows the parameters' names says which."""


class _Rule(ctypes.Structure):
    """`struct rule` of native/rule.h."""

    _fields_ = (
        *(
            (name, ctypes.c_double)
            for name in (
                "beta1",
                "one_minus_beta1",
                "beta2",
                "one_minus_beta2",
                "neg_lr",
                "neg_lr_decay",
                "weight_decay",
                "eps",
                "grad_scale",
                "step_increment",
            )
        ),
        ("clips", ctypes.c_void_p),
        ("flags", ctypes.c_int64),
    )


class FusedAdopt:
    """The fused kernel; an instance remembers what it prepared for the lists that it was called with.

    A plan holds references to parameters, moments and steps, so an instance belongs to whoever owns these: an
    optimizer keeps one. Only plans of small tensors are kept from call to call: see `SMALL_NUMEL`. Gradients are never
    held. A plan is right for as long as the lists hold the same tensor objects and these have the shape, strides, dtype
    and device they had; storage may be swapped under them (`param.data = …`), as DeepSpeed does. Whatever else changes
    is noticed and prepared again.
    """

    def __init__(self) -> None:
        self._plans: dict[int, _Plan] = {}
        self._cuda: Callable[..., None] | None = None

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
        """Do what `adopt_reference_` does, in one pass; see there. `differentiable` raises `ValueError`."""
        if differentiable:
            raise ValueError("fused=True cannot be differentiated; use fused=False with differentiable=True")
        if not params:
            return
        lists = (params, grads, exp_avgs, exp_avg_sqs, state_steps)
        options: dict[str, Any] = {
            "beta1": beta1,
            "beta2": beta2,
            "lr": lr,
            "clip_lambda": clip_lambda,
            "weight_decay": weight_decay,
            "decouple": decouple,
            "eps": eps,
            "maximize": maximize,
            "nesterov": nesterov,
            "init": init,
            "capturable": capturable,
            "differentiable": False,
            "grad_scale": grad_scale,
            "found_inf": found_inf,
            "step_increment": step_increment,
        }
        if torch.compiler.is_compiling():
            if clip_lambda is None or isinstance(clip_lambda, PowerClip):
                operator_.call(*map(list, lists), offsets=offsets, **options)
            else:  # an operator's arguments are data
                adopt_foreach_(*lists, offsets=offsets, **options)
            return
        if params[0].device.type == "cpu":
            if not skipped_on_host(found_inf):
                options |= {"lr": float(lr_for(lr, as_tensor=False)), "found_inf": None, "capturable": False}
                self._on_cpu(lists, offsets, options)
            return
        for device in {param.device for param in params}:
            rows = [i for i, param in enumerate(params) if param.device == device]
            rest, starts = (lists, offsets) if len(rows) == len(params) else _rows(rows, lists, offsets)
            self._elsewhere(device)(*rest, offsets=starts, **options)

    def _elsewhere(self, device: torch.device) -> Callable[..., None]:
        """The kernel for rows that the loops in C do not take."""
        if device.type != "cuda" or not runs_on(device):
            return adopt_reference_
        if self._cuda is None:
            from sharded_adopt.kernels.triton_kernel import TritonAdopt  # only here: it takes a second to import

            self._cuda = TritonAdopt()
        return self._cuda

    def _on_cpu(
        self, lists: Sequence[Sequence[Tensor]], offsets: Sequence[int] | None, options: dict[str, Any]
    ) -> None:
        """Update rows whose first, and as a rule all, are on the CPU; what the pass leaves is prepared again."""
        left = self._pass(lists, offsets, options)
        if left:  # their layout or step changed under the plan, or a gradient is not laid out as its parameter
            rest, starts = _rows(left, lists, offsets)
            rest[1] = list(map(_laid_out_as, rest[1], rest[0]))
            left = FusedAdopt()._pass(rest, starts, options)
            if left:
                rest, starts = _rows(left, rest, starts)
                adopt_reference_(*rest, offsets=starts, **options)

    def _pass(
        self, lists: Sequence[Sequence[Tensor]], offsets: Sequence[int] | None, options: dict[str, Any]
    ) -> list[int]:
        """Update what can be updated; return the rows that were left."""
        params, grads, exp_avgs, exp_avg_sqs, state_steps = lists
        owned = (params, exp_avgs, exp_avg_sqs, state_steps)
        key = id(params[0])  # of a tensor that a kept plan keeps alive, so no other can have it
        plan = self._plans.get(key)
        if plan is None or not plan.is_of(owned, offsets):
            self._plans.pop(key, None)
            plan = _Plan(owned, offsets)
            if sum(map(Tensor.numel, params)) < SMALL_NUMEL * len(params):
                while len(self._plans) >= _PLANS_KEPT:
                    self._plans.pop(next(iter(self._plans)))
                self._plans[key] = plan
        increment_version(params)
        left = plan.run(grads, options)
        for device in {params[i].device for i in plan.others}:
            rest, starts = _rows([i for i in plan.others if params[i].device == device], lists, offsets)
            self._elsewhere(device)(*rest, offsets=starts, **options)
        if left:
            self._plans.pop(key, None)
        return left


def _rows(
    rows: Sequence[int], lists: Sequence[Sequence[Tensor]], offsets: Sequence[int] | None
) -> tuple[list[list[Tensor]], list[int] | None]:
    """The lists and offsets of these rows only."""
    return [[tensors[i] for i in rows] for tensors in lists], None if offsets is None else [offsets[i] for i in rows]


def adopt_fused_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    **options: Any,
) -> None:
    """Do what `adopt_reference_` does, in one pass; the arguments are the same.

    Prepares the lists afresh in every call; a `FusedAdopt` remembers them.
    """
    FusedAdopt()(params, grads, exp_avgs, exp_avg_sqs, state_steps, **options)


class _Plan:
    """What is constant of (params, exp_avgs, exp_avg_sqs, state_steps), in C.

    `others` are the rows that the reference kernel has to take.
    """

    def __init__(self, lists: Sequence[Sequence[Tensor]], offsets: Sequence[int] | None) -> None:
        library = native.load().library
        if library is None:
            raise RuntimeError(f"there is no fused CPU kernel: {native.load().reason}")
        self._library = library
        columns = self._lists = tuple(map(tuple, lists))
        starts = self._offsets = None if offsets is None else tuple(offsets)
        self._address, usable = _prepare(library, columns, starts)
        self.others = [i for i, good in enumerate(usable) if not good]
        self._usable: bytes | None = None
        if self.others:
            _free(library, self._address)
            self._usable = usable
            columns = tuple(tuple(compress(column, usable)) for column in columns)
            starts = None if starts is None else tuple(compress(starts, usable))
            self._address, _ = _prepare(library, columns, starts)
        weakref.finalize(self, _free, library, self._address).atexit = False
        count = ctypes.c_int64()
        self._rows = len(columns[0])
        self._steps = library.sharded_adopt_plan_steps(self._address, ctypes.byref(count))
        self._clips = (ctypes.c_double * count.value)()
        self._rule = _Rule(clips=ctypes.addressof(self._clips))
        self._rule_address = ctypes.addressof(self._rule)

    def is_of(self, lists: Sequence[Sequence[Tensor]], offsets: Sequence[int] | None) -> bool:
        """Whether these are the very tensors that the plan was made for."""
        for mine, theirs in zip(self._lists, lists, strict=True):
            if mine is not theirs and (len(mine) != len(theirs) or not all(map(operator.is_, mine, theirs))):
                return False
        self._lists = tuple(map(tuple, lists))  # a caller that keeps tuples is known again at once
        return self._offsets == (None if offsets is None else tuple(offsets))

    def run(self, grads: Sequence[Tensor], options: dict[str, Any]) -> list[int]:
        """Update the rows that are not in `others`; return those that were left because they are not what they were."""
        self._fill_rule(**options)
        if self._usable is not None:
            grads = tuple(compress(grads, self._usable))
        left = torch.ops.sharded_adopt.adopt_native_.default(self._address, self._rule_address, grads)
        if left == 0:
            return []
        if left == _NOT_DENSE:
            raise NotDenseError("ADOPT needs dense gradients")
        if left < 0:
            raise ValueError(f"grads must hold one tensor for each of the {len(self._lists[0])} params")
        flags = ctypes.create_string_buffer(self._rows)
        self._library.sharded_adopt_plan_left(self._address, flags)
        rows = set(range(len(self._lists[0]))).difference(self.others)
        return list(compress(sorted(rows), flags.raw))

    def _fill_rule(
        self,
        *,
        beta1: float,
        beta2: float,
        lr: float,
        clip_lambda: Clip | None,
        weight_decay: float,
        decouple: bool,
        eps: float,
        maximize: bool,
        nesterov: bool,
        init: str,
        grad_scale: Tensor | None,
        step_increment: Tensor | None,
        **_: Any,
    ) -> None:
        """Write the hyperparameters where the pass reads them. Differences are taken in double: 1 - beta2 is small."""
        rule = self._rule
        rule.beta1, rule.one_minus_beta1 = beta1, 1 - beta1
        rule.beta2, rule.one_minus_beta2 = beta2, 1 - beta2
        rule.neg_lr, rule.neg_lr_decay = -lr, -lr * weight_decay
        rule.weight_decay, rule.eps = weight_decay, eps
        rule.grad_scale = 1.0 if grad_scale is None else grad_scale.item()
        rule.step_increment = 1.0 if step_increment is None else step_increment.item()
        rule.flags = (
            (_MAXIMIZE if maximize else 0)
            | (_UNSCALE if grad_scale is not None else 0)
            | ((_DECOUPLED if decouple else _L2) if weight_decay != 0 else 0)
            | (_NESTEROV if nesterov else 0)
            | (_INIT_ELEMENT if init == "element" else 0)
        )
        for i in range(len(self._clips)):
            step = int(self._steps[i])
            bound = clip_bound(clip_lambda, step) if step else None
            self._clips[i] = math.inf if bound is None else float(bound)


def _prepare(
    library: ctypes.CDLL, columns: tuple[tuple[Tensor, ...], ...], offsets: tuple[int, ...] | None
) -> tuple[int, bytes]:
    """Make a plan of (params, exp_avgs, exp_avg_sqs, state_steps); return its address and which rows run in C."""
    rows = len(columns[0])
    address = library.sharded_adopt_plan_new(rows)
    if not address:
        raise MemoryError(f"no memory for a plan of {rows} tensors")
    bind = torch.ops.sharded_adopt._bind.default
    usable = ctypes.create_string_buffer(rows)
    starts = None if offsets is None else (ctypes.c_int64 * rows)(*offsets)
    if any(
        bind(address, c, tensors) for c, tensors in zip((_PARAM, _EXP_AVG, _EXP_AVG_SQ, _STEP), columns, strict=True)
    ):
        _free(library, address)
        raise ValueError(f"the lists must have one length, got {[len(tensors) for tensors in columns]}")
    if library.sharded_adopt_plan_seal(address, starts, usable):
        _free(library, address)
        raise MemoryError(f"no memory for the shapes of {rows} tensors")
    return address, usable.raw


def _free(library: ctypes.CDLL, address: int) -> None:
    library.sharded_adopt_plan_free(address)


def _laid_out_as(grad: Tensor, param: Tensor) -> Tensor:
    """`grad` with the strides of `param` and a dtype that the loops read, copied only where it has others."""
    if grad.shape != param.shape:
        raise ValueError(f"a gradient must have its parameter's shape, {tuple(param.shape)}, got {tuple(grad.shape)}")
    dtype = grad.dtype if grad.dtype in _DTYPES else torch.float32
    if grad.stride() == param.stride() and grad.dtype == dtype:
        return grad
    return torch.empty_like(param, dtype=dtype).copy_(grad)
