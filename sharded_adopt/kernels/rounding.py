"""Round fp32 to 16 bits at random, with bits that are a function of where and when.

A 16-bit `exp_avg_sq` rounded to nearest freezes: at β2 = 0.9999 a step changes it by less than half a unit in the
last place. Rounding up with the probability of the remainder keeps it right on average. The random bits are a hash of
`step` and of the element's index in its parameter, so they do not depend on cuts, threads, ranks or a generator's
state, and the kernel in C computes the same ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_NUMEL = 1 << 20  # elements hashed at a time: bounds the extra memory to a few times 4 MiB
_LOW_32 = 0xFFFFFFFF
_HALF_MAX = 65504.0
_HALF_MIN_NORMAL = 2.0**-14


def _as_int32(value: int) -> int:
    """The int32 with the low 32 bits of `value`: torch multiplies and adds int32 modulo 2^32."""
    value &= _LOW_32
    return value - (1 << 32) if value >> 31 else value


def rounding_bits(step: int | Tensor, start: int, numel: int, device: torch.device) -> Tensor:
    """Return 16 random bits (int32, 0 to 65535, 1-D) for `numel` elements of a parameter, the first of index `start`.

    `step` is the number of updates before this one, an int or a 0-dim tensor. With lo and hi the halves of the 64-bit
    index and everything modulo 2^32: h = lo * 9E3779B1 + hi * C2B2AE3D + step * 85EBCA77 + 27D4EB2F (hexadecimal),
    then a finaliser of two multiplications, then its upper half.
    """
    low_numel = (1 << 32) - (start & _LOW_32)
    if numel > low_numel:  # the upper half of the index changes on the way
        head = rounding_bits(step, start, low_numel, device)
        return torch.cat((head, rounding_bits(step, start + low_numel, numel - low_numel, device)))
    lo = torch.arange(numel, dtype=torch.int32, device=device) + _as_int32(start)
    place = (start >> 32) * 0xC2B2AE3D + 0x27D4EB2F
    h = lo * _as_int32(0x9E3779B1)
    if isinstance(step, Tensor):
        h += ((step.to(torch.int64) * 0x85EBCA77 + _as_int32(place)) & _LOW_32).to(torch.int32)
    else:
        h += _as_int32(place + step * 0x85EBCA77)
    h ^= (h >> 16) & 0xFFFF  # the mask makes the shift of a signed number a logical one
    h *= _as_int32(0x7FEB352D)
    h ^= (h >> 15) & 0x1FFFF
    h *= _as_int32(0x846CA68B)
    h ^= (h >> 16) & 0xFFFF
    return (h >> 16) & 0xFFFF


def round_stochastically_(target: Tensor, value: Tensor, *, step: int | Tensor, start: int) -> None:
    """Write fp32 `value` into bf16 or fp16 `target` of the same shape, each element up or down at random, unbiased.

    `start` is the index of the first element in its parameter; elements count in row-major order whatever the
    strides. NaN and infinities stay what they are, 16-bit values stay exactly themselves, and fp16 stops at 65504
    instead of becoming inf.
    """
    rounded = _round_bfloat16 if target.dtype == torch.bfloat16 else _round_float16
    source = value.reshape(-1)
    out = target.view(-1) if target.is_contiguous() else torch.empty_like(source, dtype=target.dtype)
    for first in range(0, source.numel(), _CHUNK_NUMEL):
        piece = source[first : first + _CHUNK_NUMEL]
        bits = rounding_bits(step, start + first, piece.numel(), piece.device)
        out[first : first + _CHUNK_NUMEL].copy_(torch.where(piece.isfinite(), rounded(piece, bits), piece))
    if not target.is_contiguous():
        target.copy_(out.view(target.shape))


def _round_bfloat16(value: Tensor, bits: Tensor) -> Tensor:
    """bf16 is the upper half of fp32: add the random bits to the lower half and cut it off."""
    return ((value.view(torch.int32) + bits) & -0x10000).view(torch.float32)


def _round_float16(value: Tensor, bits: Tensor) -> Tensor:
    """fp16 keeps 10 of fp32's 23 fraction bits in its normal range; below that its values are multiples of 2^-24."""
    normal = ((value.view(torch.int32) + (bits >> 3)) & -0x2000).view(torch.float32).clamp(-_HALF_MAX, _HALF_MAX)
    units = value.abs() * 2.0**24
    whole = units.floor()
    # floor(units + bits / 65536) without the rounding of that sum: both sides of the comparison are exact in fp32
    up = (units - whole) * 65536.0 >= (65536 - bits).to(torch.float32)
    subnormal = torch.copysign((whole + up) * 2.0**-24, value)
    return torch.where(value.abs() >= _HALF_MIN_NORMAL, normal, subnormal)
