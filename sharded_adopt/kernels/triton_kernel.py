"""The fused kernel for CUDA: one launch for a list of tensors, nothing read on the host. Imported only when used.

A table on the device holds the addresses of every row (parameter, gradient, exp_avg, exp_avg_sq) and a second one says
which program takes which chunk of which row. Both are written again only when an address or a length has changed; no
reference to a tensor is kept. Launches are as many as there are combinations of dtypes and alignment, as a rule one.

The arithmetic is that of the kernel in C, to the bit: fp32 (fp64 where the parameter or its state is), correctly
rounded roots and quotients, and a fused multiply-add exactly where torch's CPU kernels have one.

Runs in Triton's interpreter on CPU tensors (TRITON_INTERPRET=1), which is how it is tested without a GPU.
"""

# mypy: disable-error-code="import-not-found,untyped-decorator,no-untyped-def"
# ruff: noqa: SIM300 - a constexpr has a capital name but is an argument

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from sharded_adopt.clipping import Clip, PowerClip, clip_bound
from sharded_adopt.kernels.reference import adopt_reference_
from sharded_adopt.kernels.working import compute_dtype

_CHUNK = 1 << 14  # elements of a program: enough to hide the look-up in the tables, few enough for an even load
_BLOCK = 1 << 10  # elements that a program holds in registers at a time
_WARPS = 4

# What a launch is compiled for, as bits of FLAGS.
_MAXIMIZE = tl.constexpr(1)
_UNSCALE = tl.constexpr(2)
_L2 = tl.constexpr(4)
_DECOUPLED = tl.constexpr(8)
_NESTEROV = tl.constexpr(16)
_INIT_ELEMENT = tl.constexpr(32)
_TENSOR_LR = tl.constexpr(64)
_FOUND_INF = tl.constexpr(128)
_ALIGNED = tl.constexpr(256)

_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _rounding_bits(index, step):
    """16 bits from the element's 64-bit index and the step; the same as in `rounding` and in native/convert.h."""
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    h = low * 0x9E3779B1 + high * 0xC2B2AE3D + step.to(tl.uint32) * 0x85EBCA77 + 0x27D4EB2F
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    h = h ^ (h >> 16)
    return h >> 16


@triton.jit
def _round_to_bf16(x, random):
    """fp32 that bf16 holds exactly: one of the two neighbours of `x`, by chance. NaN and infinity stay."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = ((bits + random) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F800000) == 0x7F800000, x, rounded)


@triton.jit
def _round_to_fp16(x, random):
    """The same for fp16, whose numbers below 2^-14 are the multiples of 2^-24; what is finite stays finite."""
    bits = x.to(tl.uint32, bitcast=True)
    normal = tl.minimum(((bits + (random >> 3)) & 0xFFFFE000).to(tl.float32, bitcast=True), 65504.0)
    is_small = x < 6.103515625e-05
    units = tl.where(is_small, x, 0.0) * 16777216.0
    whole = tl.floor(units)
    up = (units - whole) * 65536.0 >= (65536 - random.to(tl.int32)).to(tl.float32)
    rounded = tl.where(is_small, (whole + up.to(tl.float32)) * 5.9604644775390625e-08, normal)
    return tl.where((bits & 0x7F800000) == 0x7F800000, x, rounded)


@triton.jit
def _load(at, inside, MASKED: tl.constexpr, TYPE: tl.constexpr, COMPUTE: tl.constexpr):
    if MASKED:
        x = tl.load(at, mask=inside, other=1.0)
    else:
        x = tl.load(at)
    if TYPE == tl.bfloat16:  # by way of fp32: the interpreter knows no other
        x = x.to(tl.float32)
    return x.to(COMPUTE)


@triton.jit
def _store(at, x, inside, MASKED: tl.constexpr, TYPE: tl.constexpr):
    """Round to nearest, ties to even. In integers for bf16, which the interpreter would cut off."""
    if TYPE == tl.bfloat16:
        x = x.to(tl.float32)
        bits = x.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    if MASKED:
        tl.store(at, x.to(TYPE), mask=inside)
    else:
        tl.store(at, x.to(TYPE))


@triton.jit
def _lerp(m, n, weight):
    return tl.where(weight < 0.5, tl.fma(weight, n - m, m), tl.fma(weight - 1, n - m, n))


@triton.jit
def _sqrt(x, COMPUTE: tl.constexpr):
    """Correctly rounded, as `_div`: in fp32 Triton's own operators are approximations."""
    if COMPUTE == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def _div(x, y, COMPUTE: tl.constexpr):
    if COMPUTE == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def _update_block(
    p_at,
    g_at,
    m_at,
    v_at,
    inside,
    index,
    step,
    weight,
    beta2,
    one_minus_beta2,
    neg_lr,
    neg_lr_decay,
    weight_decay,
    eps,
    bound,
    scale,
    MASKED: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    COMPUTE: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """One block of elements: the lines of `reference.adopt_reference_`, in its order."""
    p = _load(p_at, inside, MASKED, PARAM, COMPUTE)
    g = _load(g_at, inside, MASKED, GRAD, COMPUTE)
    m = _load(m_at, inside, MASKED, EXP_AVG, COMPUTE)
    v = _load(v_at, inside, MASKED, EXP_AVG_SQ, COMPUTE)
    if _UNSCALE & FLAGS:
        g = _div(g, scale, COMPUTE)
    if _MAXIMIZE & FLAGS:
        g = -g
    if _L2 & FLAGS:
        g = tl.fma(p, weight_decay, g)
    denom = _sqrt(v, COMPUTE)
    denom = tl.where(denom < eps, eps, denom)  # NaN stays
    n = _div(g, denom, COMPUTE)
    n = tl.where(n < -bound, -bound, n)
    n = tl.where(n > bound, bound, n)
    p_new = p
    if _DECOUPLED & FLAGS:
        p_new = tl.fma(p, neg_lr_decay, p)
    m_new = _lerp(m, n, weight)
    along = m_new
    if _NESTEROV & FLAGS:
        along = _lerp(m_new, n, weight)
    p_new = tl.fma(along, neg_lr, p_new)
    v_new = tl.fma(one_minus_beta2 * g, g, v * beta2)
    moves = tl.zeros_like(v) + step.to(COMPUTE) != 0
    if _INIT_ELEMENT & FLAGS:
        moves = moves & (v != 0)
    _store(p_at, tl.where(moves, p_new, p), inside, MASKED, PARAM)
    _store(m_at, tl.where(moves, m_new, m), inside, MASKED, EXP_AVG)
    v_new = tl.where(moves, v_new, g * g)
    if EXP_AVG_SQ == tl.bfloat16:
        v_new = _round_to_bf16(v_new.to(tl.float32), _rounding_bits(index, step))
    if EXP_AVG_SQ == tl.float16:
        v_new = _round_to_fp16(v_new.to(tl.float32), _rounding_bits(index, step))
    _store(v_at, v_new, inside, MASKED, EXP_AVG_SQ)


@triton.jit
def _update(
    addresses,  # int64 [rows, 6]: parameter, gradient, exp_avg, exp_avg_sq, numel, index of the first element
    chunks,  # int64 [programs, 2]: row, first element
    steps,  # fp32 [rows]
    bounds,  # fp64 [rows]: of the normalised gradient
    hyper,  # fp64 [6]: 1 - beta1, beta2, 1 - beta2, lr, weight_decay, eps
    lr_tensor,
    grad_scale,
    found_inf,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    COMPUTE: tl.constexpr,
    FLAGS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of one row a program."""
    program = tl.program_id(0).to(tl.int64)
    row = tl.load(chunks + program * 2)
    begin = tl.multiple_of(tl.load(chunks + program * 2 + 1), BLOCK)
    entry = addresses + row * 6
    p_at = tl.load(entry).to(tl.pointer_type(PARAM))
    g_at = tl.load(entry + 1).to(tl.pointer_type(GRAD))
    m_at = tl.load(entry + 2).to(tl.pointer_type(EXP_AVG))
    v_at = tl.load(entry + 3).to(tl.pointer_type(EXP_AVG_SQ))
    if _ALIGNED & FLAGS:  # what lets the compiler move 16 bytes at a time
        p_at = tl.multiple_of(p_at, 16)
        g_at = tl.multiple_of(g_at, 16)
        m_at = tl.multiple_of(m_at, 16)
        v_at = tl.multiple_of(v_at, 16)
    numel = tl.load(entry + 4)
    first_index = tl.load(entry + 5)
    step = tl.load(steps + row)
    bound = tl.load(bounds + row).to(COMPUTE)
    weight = tl.load(hyper).to(COMPUTE)
    beta2 = tl.load(hyper + 1).to(COMPUTE)
    one_minus_beta2 = tl.load(hyper + 2).to(COMPUTE)
    lr = tl.load(hyper + 3)
    if _TENSOR_LR & FLAGS:
        lr = tl.load(lr_tensor).to(tl.float64)
    decay = tl.load(hyper + 4)
    eps = tl.load(hyper + 5).to(COMPUTE)
    neg_lr = (-lr).to(COMPUTE)
    neg_lr_decay = (-lr * decay).to(COMPUTE)
    decay = decay.to(COMPUTE)
    scale = eps
    if _UNSCALE & FLAGS:
        scale = tl.load(grad_scale).to(COMPUTE)
    end = tl.minimum(begin + CHUNK, numel)
    if _FOUND_INF & FLAGS:
        end = tl.where(tl.load(found_inf) != 0, begin, end)

    lane = tl.arange(0, BLOCK)
    whole_end = begin + (end - begin) // BLOCK * BLOCK
    for start in range(begin, whole_end, BLOCK):
        at = tl.multiple_of(start, BLOCK) + lane
        _update_block(
            p_at + at,
            g_at + at,
            m_at + at,
            v_at + at,
            at < end,
            first_index + at,
            step,
            weight,
            beta2,
            one_minus_beta2,
            neg_lr,
            neg_lr_decay,
            decay,
            eps,
            bound,
            scale,
            False,
            PARAM,
            GRAD,
            EXP_AVG,
            EXP_AVG_SQ,
            COMPUTE,
            FLAGS,
        )
    if whole_end < end:
        at = whole_end + lane
        _update_block(
            p_at + at,
            g_at + at,
            m_at + at,
            v_at + at,
            at < end,
            first_index + at,
            step,
            weight,
            beta2,
            one_minus_beta2,
            neg_lr,
            neg_lr_decay,
            decay,
            eps,
            bound,
            scale,
            True,
            PARAM,
            GRAD,
            EXP_AVG,
            EXP_AVG_SQ,
            COMPUTE,
            FLAGS,
        )


_Launch = tuple[tuple[torch.dtype, ...], bool]
"""What must be equal in one launch: the four dtypes, and whether all addresses are multiples of 16."""


@dataclass(slots=True)
class _Tables:
    """What a launch needs to know of its rows, on the device, and the integers it was made of."""

    rows: list[tuple[int, ...]]
    addresses: Tensor  # int64 [rows, 6]
    chunks: Tensor  # int64 [programs, 2]


class TritonAdopt:
    """The fused kernel for one owner of lists on CUDA; keeps the tables of its launches, but no tensor of the lists."""

    def __init__(self) -> None:
        self._tables: dict[object, _Tables] = {}
        self._captured: list[Tensor] = []  # host memory that CUDA graphs copy from at every replay

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
        """Do what `adopt_reference_` does, with one launch a combination of dtypes.

        Nothing is read on the host where the steps are on the device (capturable or fused); steps on the CPU are read
        there, and then `found_inf` is too.
        """
        if differentiable:
            raise ValueError("fused=True cannot be differentiated; use fused=False with differentiable=True")
        device = params[0].device
        on_host = state_steps[0].device.type == "cpu" and device.type != "cpu"
        if on_host and found_inf is not None:
            if found_inf.item():
                return
            found_inf = None
        lr_tensor = lr.to(device) if isinstance(lr, Tensor) else None
        rate = 0.0 if isinstance(lr, Tensor) else lr
        hyper = self._upload([1 - beta1, beta2, 1 - beta2, rate, weight_decay, eps], torch.float64, device)
        scale = None if grad_scale is None else grad_scale.to(device)
        skip = None if found_inf is None else found_inf.to(device)

        flags = sum(
            int(bit)
            for bit, is_set in (
                (_MAXIMIZE, maximize),
                (_UNSCALE, scale is not None),
                (_L2, weight_decay != 0 and not decouple),
                (_DECOUPLED, weight_decay != 0 and decouple),
                (_NESTEROV, nesterov),
                (_INIT_ELEMENT, init == "element"),
                (_TENSOR_LR, lr_tensor is not None),
                (_FOUND_INF, skip is not None),
            )
            if is_set
        )
        groups: dict[_Launch, list[int]] = {}
        others: list[int] = []
        lists = (params, grads, exp_avgs, exp_avg_sqs, state_steps)
        for i, row in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
            key = _launch_of(*row)
            if key is None:
                others.append(i)
            elif params[i].numel():
                groups.setdefault(key, []).append(i)
        for key, rows in groups.items():
            dtypes, aligned = key
            steps, bounds = self._steps_and_bounds([state_steps[i] for i in rows], clip_lambda, device, on_host)
            tables = self._tables_for(
                key,
                [
                    (
                        *(tensors[i].data_ptr() for tensors in lists[:4]),
                        params[i].numel(),
                        0 if offsets is None else offsets[i],
                    )
                    for i in rows
                ],
                device,
            )
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                _update[(len(tables.chunks),)](
                    tables.addresses,
                    tables.chunks,
                    steps,
                    bounds,
                    hyper,
                    hyper if lr_tensor is None else lr_tensor,
                    hyper if scale is None else scale,
                    hyper if skip is None else skip,
                    PARAM=_TYPES[dtypes[0]],
                    GRAD=_TYPES[dtypes[1]],
                    EXP_AVG=_TYPES[dtypes[2]],
                    EXP_AVG_SQ=_TYPES[dtypes[3]],
                    COMPUTE=_TYPES[compute_dtype(params[rows[0]], exp_avgs[rows[0]], exp_avg_sqs[rows[0]])],
                    FLAGS=flags | (int(_ALIGNED) if aligned else 0),
                    CHUNK=_CHUNK,
                    BLOCK=_BLOCK,
                    num_warps=_WARPS,
                    enable_fp_fusion=False,  # a multiply-add is fused where it is written and nowhere else
                )
        left = set(others)
        advanced = [step for i, step in enumerate(state_steps) if i not in left]
        if advanced:
            torch._foreach_add_(advanced, _increment(advanced[0], step_increment, skip))
        increment_version(params)
        if others:
            adopt_reference_(
                *([tensors[i] for i in others] for tensors in lists),
                beta1=beta1,
                beta2=beta2,
                lr=lr,
                clip_lambda=clip_lambda,
                weight_decay=weight_decay,
                decouple=decouple,
                eps=eps,
                maximize=maximize,
                nesterov=nesterov,
                init=init,
                capturable=not on_host,
                differentiable=False,
                grad_scale=grad_scale,
                found_inf=found_inf,
                offsets=None if offsets is None else [offsets[i] for i in others],
                step_increment=step_increment,
            )

    def _steps_and_bounds(
        self, state_steps: list[Tensor], clip_lambda: Clip | None, device: torch.device, on_host: bool
    ) -> tuple[Tensor, Tensor]:
        """The rows' steps (fp32) and clip bounds (fp64, inf for none) as vectors on the device."""
        if on_host:
            values = [step.item() for step in state_steps]
            found = [clip_bound(clip_lambda, int(value)) if value else None for value in values]
            bounds = [math.inf if bound is None else float(bound) for bound in found]
            return self._upload(values, torch.float32, device), self._upload(bounds, torch.float64, device)
        steps = torch.stack(state_steps)
        if clip_lambda is None:
            return steps, torch.full_like(steps, math.inf, dtype=torch.float64)
        if isinstance(clip_lambda, PowerClip):
            return steps, clip_lambda(steps)
        each = [torch.as_tensor(clip_bound(clip_lambda, step), device=device) for step in state_steps]
        return steps, torch.stack([bound.to(torch.float64) for bound in each])

    def _tables_for(self, key: object, rows: list[tuple[int, ...]], device: torch.device) -> _Tables:
        tables = self._tables.get((key, device))
        if tables is None or tables.rows != rows:
            chunks = [(i, begin) for i, row in enumerate(rows) for begin in range(0, row[4], _CHUNK)]
            tables = _Tables(rows, self._upload(rows, torch.int64, device), self._upload(chunks, torch.int64, device))
            self._tables[key, device] = tables
        return tables

    def _upload(self, values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Copy numbers to the device in stream order; a graph that is being captured copies them at every replay."""
        if device.type != "cuda":
            return torch.tensor(values, dtype=dtype, device=device)
        host = torch.tensor(values, dtype=dtype, pin_memory=True)
        if torch.cuda.is_current_stream_capturing():
            self._captured.append(host)
        return host.to(device, non_blocking=True)


def _launch_of(*row: Tensor) -> _Launch | None:
    """The launch that (parameter, gradient, exp_avg, exp_avg_sq) belong to, or None where Triton cannot take them."""
    param = row[0]
    if any(t.dtype not in _TYPES or t.device != param.device or t.shape != param.shape for t in row):
        return None
    if not all(t.is_contiguous() for t in row) and (
        row[3].itemsize == 2 or any(t.stride() != param.stride() for t in row) or not _is_dense(param)
    ):
        return None
    return tuple(t.dtype for t in row), all(t.data_ptr() % 16 == 0 for t in row)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements lie one after the other, in whatever order of the dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _increment(step: Tensor, step_increment: Tensor | None, skip: Tensor | None) -> Tensor:
    by = torch.ones_like(step) if step_increment is None else step_increment.to(step).reshape(())
    return by if skip is None else torch.where(skip.to(step.device).reshape(()) != 0, torch.zeros_like(by), by)
