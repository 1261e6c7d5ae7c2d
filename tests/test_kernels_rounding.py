"""Stochastic rounding of a 16-bit exp_avg_sq: the bits, the rounding, and what it is for."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import pytest
import torch
from adopt_cases import Lists, make_lists, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from sharded_adopt.kernels.foreach import adopt_foreach_
from sharded_adopt.kernels.reference import adopt_reference_
from sharded_adopt.kernels.rounding import round_stochastically_, rounding_bits

CPU = torch.device("cpu")
BF16, F16 = torch.bfloat16, torch.float16
M32 = 0xFFFFFFFF


def hash_in_integers(step: int, index: int) -> int:
    """The definition, in Python's integers."""
    lo, hi = index & M32, index >> 32
    h = (lo * 0x9E3779B1 + hi * 0xC2B2AE3D + step * 0x85EBCA77 + 0x27D4EB2F) & M32
    h ^= h >> 16
    h = (h * 0x7FEB352D) & M32
    h ^= h >> 15
    h = (h * 0x846CA68B) & M32
    h ^= h >> 16
    return h >> 16


def rounded(value: torch.Tensor, dtype: torch.dtype, *, step: int = 1, start: int = 0) -> torch.Tensor:
    target = torch.empty_like(value, dtype=dtype)
    round_stochastically_(target, value, step=step, start=start)
    return target


@settings(max_examples=200, deadline=None)
@given(
    step=st.integers(0, 2**24),
    start=st.one_of(st.integers(0, 2**40), st.integers(2**32 - 20, 2**32 + 20), st.integers(2**31 - 20, 2**31 + 20)),
    numel=st.integers(0, 40),
)
def test_bits_are_the_hash_of_step_and_64_bit_index(step, start, numel):
    expected = [hash_in_integers(step, start + i) for i in range(numel)]
    assert rounding_bits(step, start, numel, CPU).tolist() == expected
    assert rounding_bits(torch.tensor(float(step)), start, numel, CPU).tolist() == expected


def test_known_bits():
    """Fixed numbers for implementations in other languages."""
    assert rounding_bits(0, 0, 4, CPU).tolist() == [hash_in_integers(0, i) for i in range(4)] == KNOWN_AT_0
    assert rounding_bits(12345, 2**32 - 2, 4, CPU).tolist() == KNOWN_ACROSS_2_32


KNOWN_AT_0 = [51090, 15345, 57137, 38987]
KNOWN_ACROSS_2_32 = [45626, 22434, 38, 16842]


def test_bits_are_uniform_and_do_not_repeat_from_step_to_step():
    bits = torch.stack([rounding_bits(step, 0, 1 << 16, CPU) for step in range(8)]).double()
    # the mean of 2^19 uniform 16-bit numbers: standard error 65536 / √12 / √2^19 = 26
    assert abs(bits.mean().item() - 32767.5) < 4 * 26
    counts = torch.histc(bits.flatten(), bins=64, min=0, max=65536)
    expected = bits.numel() / 64
    chi2 = ((counts - expected) ** 2 / expected).sum().item()  # 63 degrees of freedom: mean 63, sd 11
    assert chi2 < 63 + 5 * 11.3
    correlation = torch.corrcoef(bits).fill_diagonal_(0).abs().max().item()
    assert correlation < 5 / math.sqrt(1 << 16)
    neighbours = torch.corrcoef(torch.stack((bits[0, :-1], bits[0, 1:])))[0, 1].item()
    assert abs(neighbours) < 5 / math.sqrt(1 << 16)


def rounded_in_fractions(value: float, bits: int, dtype: torch.dtype) -> Fraction:
    """The definition in exact arithmetic, for finite fp32 values of at least 0."""
    if dtype == F16 and value < 2.0**-14:
        return Fraction(math.floor(Fraction(value) * 2**24 + Fraction(bits, 65536)), 2**24)
    whole = struct.unpack("<I", struct.pack("<f", value))[0]
    kept = (whole + bits) & ~0xFFFF if dtype == BF16 else (whole + (bits >> 3)) & ~0x1FFF
    up_or_down = struct.unpack("<f", struct.pack("<I", kept))[0]
    return Fraction(min(up_or_down, 65504.0) if dtype == F16 else up_or_down)


@pytest.mark.parametrize("dtype", [BF16, F16])
@settings(max_examples=150, deadline=None)
@given(
    value=st.one_of(
        st.floats(0, 2.0**126, width=32),
        st.floats(0, 2.0**-13, width=32),
        st.integers(0, 4096).map(lambda quarters: quarters * 2.0**-26),  # halves and quarters of fp16's smallest unit
    ),
    step=st.integers(0, 1000),
)
def test_rounding_is_its_definition_in_exact_arithmetic(dtype, value, step):
    result = rounded(torch.full((64,), value), dtype, step=step)
    bits = rounding_bits(step, 0, 64, CPU).tolist()
    assert [Fraction(x) for x in result.tolist()] == [rounded_in_fractions(value, r, dtype) for r in bits]


def test_a_remainder_that_the_bits_fill_up_exactly_rounds_up():
    """Half a unit and bits of 0.5: floor(1) is 1."""
    step, index = next((s, i) for s in range(64) for i, r in enumerate(rounding_bits(s, 0, 4096, CPU)) if r == 32768)
    assert rounded(torch.tensor([2.0**-25]), F16, step=step, start=index).item() == 2.0**-24


@pytest.mark.parametrize("dtype", [BF16, F16])
@settings(max_examples=100, deadline=None)
@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False), step=st.integers(0, 100))
def test_rounding_gives_one_of_the_two_neighbours(dtype, value, step):
    exact = torch.full((4,), value, dtype=torch.float32)
    result = rounded(exact, dtype, step=step)
    nearest = exact.to(dtype)
    for got, to_nearest in zip(result, nearest, strict=True):
        if dtype == F16 and abs(value) > 65504:
            assert abs(got.item()) == 65504  # finite values never become inf
            continue
        below = torch.nextafter(to_nearest, torch.tensor(-math.inf, dtype=dtype))
        above = torch.nextafter(to_nearest, torch.tensor(math.inf, dtype=dtype))
        assert got in (below, to_nearest, above)
        if math.isfinite(got.item()):
            # a neighbour on each side of the value at most one unit away
            assert (got.item() - value) * (to_nearest.item() - value) <= 0 or got == to_nearest


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_sixteen_bit_values_nan_and_infinities_stay_what_they_are(dtype):
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    for step in range(3):
        assert same_bits(rounded(every.float(), dtype, step=step), every)
    special = torch.tensor([math.nan, -math.nan, math.inf, -math.inf])
    assert same_bits(rounded(special, dtype), special.to(dtype))
    quiet = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)  # a NaN whose upper half is that of inf
    assert rounded(quiet, dtype).isnan().all()


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("value", [1.0 + 2.0**-9, 0.7, 1e-3, 3.3e-6, 5e-8, 60000.3])
def test_rounding_is_unbiased_within_statistics(dtype, value):
    numel = 1 << 18
    exact = torch.full((numel,), value, dtype=torch.float32)
    result = rounded(exact, dtype, step=3).double()
    low, high = result.min().item(), result.max().item()
    exact_value = exact[0].item()
    assert low <= exact_value <= high
    p = (exact_value - low) / (high - low) if high > low else 0.0
    # 16 random bits resolve p to 2^-16; 5 standard errors of a coin thrown 2^18 times
    slack = (high - low) * (5 * math.sqrt(p * (1 - p) / numel) + 2.0**-16)
    assert abs(result.mean().item() - exact_value) <= slack


@pytest.mark.parametrize("shape", [(7, 9, 4, 5), (3_000_000,)])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_elements_count_in_row_major_order_whatever_the_strides_and_chunks(shape, dtype):
    value = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    whole = rounded(value, dtype, step=5, start=11)
    if value.ndim == 4:
        strided = torch.empty(shape, dtype=dtype).to(memory_format=torch.channels_last)
        round_stochastically_(strided, value.to(memory_format=torch.channels_last), step=5, start=11)
        assert same_bits(strided, whole)
    flat, cut = value.flatten(), value.numel() // 3
    head, tail = rounded(flat[:cut], dtype, step=5, start=11), rounded(flat[cut:], dtype, step=5, start=11 + cut)
    assert same_bits(torch.cat((head, tail)), whole.flatten())


@pytest.mark.parametrize(("kernel", "grad"), [(adopt_reference_, 0.1), (adopt_foreach_, 10.0)])
def test_stochastic_v_tracks_fp32_where_rounding_to_nearest_freezes(kernel, grad):
    """β2 = 0.9999, 20,000 steps, g jumps by 10 either way: a bf16 v keeps within 2 % of fp32's on average."""
    # T33
    numel, steps = 2048, 20_000
    nearest = torch.ones((), dtype=BF16)
    ones = torch.ones(numel, dtype=BF16)
    lists = Lists([torch.zeros(numel)], [torch.zeros(numel)], [ones], [torch.ones(())])
    g = [torch.full((numel,), grad)]
    for _ in range(steps):
        lists.run(kernel, g)
        nearest = (nearest.float() * 0.9999 + (1 - 0.9999) * grad**2).to(BF16)
    exact = grad**2 + (1.0 - grad**2) * 0.9999**steps
    assert lists.exp_avg_sqs[0].float().mean().item() == pytest.approx(exact, rel=0.02)
    assert abs(nearest.item() - exact) > 0.25 * exact  # what it is for


def test_first_step_rounds_stochastically_too():
    lists = make_lists([(4096,)], exp_avg_sq_dtype=BF16)
    grad = torch.full((4096,), math.sqrt(1.0 + 2.0**-9))
    lists.run(adopt_reference_, [grad])
    assert lists.exp_avg_sqs[0].unique().numel() == 2


def test_exp_avg_is_rounded_to_nearest():
    lists = Lists([torch.zeros(1)], [torch.zeros(1, dtype=BF16)], [torch.ones(1, dtype=BF16)], [torch.ones(())])
    lists.run(adopt_reference_, [torch.tensor([0.7])])
    expected = torch.zeros(1).lerp(torch.tensor([0.7]), 1 - 0.9).to(BF16)
    assert same_bits(lists.exp_avgs[0], expected)
