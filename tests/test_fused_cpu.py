"""The fused CPU kernel gives the bits of the reference, whatever the dtypes, options, cuts, threads and machine."""

from __future__ import annotations

import gc
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from fused_cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    OPTIONS,
    assert_same_bits,
    call,
    clone,
    ieee_sqrt,
    make_grads,
    make_lists,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch import Tensor

from sharded_adopt.clipping import PowerClip
from sharded_adopt.kernels import native
from sharded_adopt.kernels.fused import FusedAdopt, adopt_fused_
from sharded_adopt.kernels.reference import adopt_reference_

pytestmark = pytest.mark.skipif(native.load().library is None, reason=f"no fused CPU kernel: {native.load().reason}")

SHAPES = st.one_of(
    st.integers(0, 70).map(lambda n: (n,)),
    st.sampled_from([(), (3, 5), (1, 1), (4, 0, 2), (2, 3, 4, 5), (1025,), (40_000,)]),
)


@pytest.fixture
def exact_sqrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "sqrt", ieee_sqrt)


options = st.fixed_dictionaries(
    {
        "clip_lambda": st.sampled_from([None, PowerClip(0.25), PowerClip(0.0, 0.5), lambda step: 0.3 * step]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "decouple": st.booleans(),
        "maximize": st.booleans(),
        "nesterov": st.booleans(),
        "init": st.sampled_from(["parameter", "element"]),
        "beta1": st.sampled_from([0.0, 0.3, 0.9]),
        "beta2": st.sampled_from([0.0, 0.9, 0.9999]),
        "lr": st.sampled_from([1e-3, 0.1, torch.tensor(0.01), torch.tensor([0.02])]),
        "grad_scale": st.sampled_from([None, torch.tensor(3.0), torch.tensor([1024.0])]),
        "step_increment": st.sampled_from([None, torch.tensor(1.0)]),
    }
)


@pytest.mark.usefixtures("exact_sqrt")
@settings(deadline=None, max_examples=300)
@given(
    rows=st.lists(st.tuples(SHAPES, st.sampled_from([0, 0, 1, 7, 10_000])), min_size=1, max_size=5),
    dtypes=st.sampled_from(DTYPES),
    start=st.integers(0, 17),
    options=options,
    seed=st.integers(0, 2**31),
)
def test_fused_equals_the_reference_to_the_bit(
    rows: list[tuple[tuple[int, ...], int]], dtypes: Any, start: int, options: dict[str, Any], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes, steps = [shape for shape, _ in rows], [step for _, step in rows]
    expected = make_lists(shapes, dtypes, generator, steps=steps, start=start)
    got = [[torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t) for t in tensors] for tensors in expected]
    fused = FusedAdopt()
    offsets = [start + 1000 * i for i in range(len(rows))]
    for _ in range(3):
        grads = make_grads(expected[0], dtypes[1], generator)
        call(adopt_reference_, expected, grads, **options, offsets=offsets)
        call(fused, got, grads, **options, offsets=offsets)
    assert_same_bits(got, expected)


@pytest.mark.usefixtures("exact_sqrt")
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("init", ["parameter", "element"])
def test_nan_and_inf_go_where_the_reference_lets_them_go(dtypes: Any, init: str) -> None:
    generator = torch.Generator().manual_seed(0)
    expected = make_lists([(64,)], dtypes, generator, steps=[3])
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0])
    for tensors in expected[:3]:
        tensors[0][:5] = special
        tensors[0][5:10] = special.roll(1)
        tensors[0][20:25] = 1
    got = clone(expected)
    for _ in range(3):
        grads = make_grads(expected[0], dtypes[1], generator)
        for i in range(0, 64, 13):
            grads[0][i : i + 5] = special[: len(grads[0][i : i + 5])]
        call(adopt_reference_, expected, grads, init=init)
        call(adopt_fused_, got, grads, init=init)
    assert_same_bits(got, expected)
    assert expected[0][0].isnan().any()


# One unit in the last place of √v moves n by at most one and a half (division rounds too), so m by (1 - β1) * 1.5 units
# of n <= c = 1, and θ by less: 2^-22 covers them.
SQRT_TOLERANCE = 2.0**-22


def test_with_torch_s_own_sqrt_the_difference_is_that_of_a_square_root() -> None:
    generator = torch.Generator().manual_seed(0)
    expected = make_lists([(100_000,)], (F32,) * 4, generator, steps=[1])
    before, got = clone(expected), clone(expected)
    grads = make_grads(expected[0], F32, generator)
    call(adopt_reference_, expected, grads)
    call(adopt_fused_, got, grads)
    torch.testing.assert_close(got[2], expected[2], rtol=0, atol=0)  # v does not look at its square root
    torch.testing.assert_close(got[1], expected[1], rtol=SQRT_TOLERANCE, atol=SQRT_TOLERANCE)
    torch.testing.assert_close(got[0], expected[0], rtol=SQRT_TOLERANCE, atol=SQRT_TOLERANCE)
    exact = before[2][0].sqrt() == ieee_sqrt(before[2][0])
    assert exact.any()
    for a, b in zip(got[:3], expected[:3], strict=True):
        assert torch.equal(a[0][exact], b[0][exact]), "where torch's square root is right, every bit is the same"


def _digest_with_threads(rank: int, world_size: int, threads: int) -> list[bytes]:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(1)
    lists = make_lists([(200_003,), (5,), (70_000,), (33, 1001)], (F32, F32, F32, BF16), generator)
    fused = FusedAdopt()
    for _ in range(4):
        call(fused, lists, make_grads(lists[0], F32, generator), weight_decay=0.1, decouple=True)
    return [tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensors in lists for tensor in tensors]


def test_the_number_of_threads_changes_no_bit() -> None:
    # in forked processes, so that this one starts no thread pool
    one, two, three = (run_ranks(1, _digest_with_threads, threads)[0] for threads in (1, 2, 3))
    assert one == two == three


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_the_instruction_set_changes_no_bit(isa: str) -> None:
    library = native.load().library
    assert library is not None
    generator = torch.Generator().manual_seed(2)
    lists = [make_lists([(n,) for n in range(70)], dtypes, generator, steps=[1] * 70) for dtypes in DTYPES]
    grads = [make_grads(one[0], dtypes[1], generator) for one, dtypes in zip(lists, DTYPES, strict=True)]
    widest = native.load().isa
    results = []
    for choice in (isa, widest):
        if library.sharded_adopt_choose_isa(str(choice).encode()):
            pytest.skip(f"this machine has no {isa}")
        try:
            copies = [clone(one) for one in lists]
            for copy, grad in zip(copies, grads, strict=True):
                call(adopt_fused_, copy, grad, nesterov=True, init="element")
            results.append(copies)
        finally:
            library.sharded_adopt_choose_isa(b"")
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)


@settings(deadline=None, max_examples=50)
@given(
    cuts=st.lists(st.integers(0, 5000), max_size=20).map(sorted),
    dtypes=st.sampled_from([DTYPES[0], DTYPES[2], DTYPES[4], DTYPES[5], DTYPES[6]]),
    apart=st.booleans(),
)
def test_any_cut_of_a_tensor_gives_the_same_bits(cuts: list[int], dtypes: Any, apart: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    whole = make_lists([(5000,)], dtypes, generator)
    edges = [0, *cuts, 5000]
    flat = clone(whole)
    parts = [[tensors[0][a:b] for a, b in pairwise(edges)] for tensors in flat[:3]]
    parts.append([torch.tensor(0.0) for _ in edges[1:]])
    if apart:  # pieces in storage of their own instead of neighbours in one buffer
        parts = clone(parts)
    fused = FusedAdopt()
    for _ in range(3):
        grads = make_grads(whole[0], dtypes[1], generator)
        call(adopt_fused_, whole, grads)
        pieces = [grads[0][a:b] for a, b in pairwise(edges)]
        call(fused, parts, [piece.clone() for piece in pieces] if apart else pieces, offsets=edges[:-1])
    joined = [[torch.cat(tensors)] for tensors in parts[:3]]
    assert_same_bits([*joined, [parts[3][0]]], whole)


def test_an_index_beyond_32_bits_changes_the_rounding_as_in_the_reference() -> None:
    generator = torch.Generator().manual_seed(4)
    for start in (2**32 - 3, 2**32, 2**40 + 5):
        expected = make_lists([(100,)], (F32, F32, F32, BF16), generator)
        got = clone(expected)
        grads = make_grads(expected[0], F32, generator)
        call(adopt_reference_, expected, grads, offsets=[start])
        call(adopt_fused_, got, grads, offsets=[start])
        assert_same_bits(got, expected)


def test_found_inf_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(5)
    lists = make_lists([(50,), (3,)], DTYPES[0], generator, steps=[2, 0])
    before = clone(lists)
    fused = FusedAdopt()
    call(fused, lists, make_grads(lists[0], F32, generator), found_inf=torch.tensor(1.0))
    assert_same_bits(lists, before)
    call(fused, lists, make_grads(lists[0], F32, generator), found_inf=torch.tensor(0.0))
    assert lists[3][0].item() == 3


def test_a_step_that_does_not_count_leaves_the_step() -> None:
    lists = make_lists([(50,), (200_000,), (0,)], DTYPES[0], torch.Generator().manual_seed(6))
    fused = FusedAdopt()
    for increment, expected in ((0.0, 0.0), (1.0, 1.0), (1.0, 2.0)):
        call(fused, lists, [torch.zeros_like(p) for p in lists[0]], step_increment=torch.tensor(increment))
        assert [step.item() for step in lists[3]] == [expected] * 3


# ---- what a plan must notice ----


def _run_beside_reference(change: Any, steps: int = 4, shapes: Any = ((6, 6), (40_000,), (9,))) -> None:
    """Run both kernels on their own lists; before the third step `change(lists)` does the same to each."""
    generator = torch.Generator().manual_seed(7)
    expected = make_lists(shapes, DTYPES[0], generator)
    got = clone(expected)
    fused = FusedAdopt()
    for i in range(steps):
        if i == 2:
            change(expected)
            change(got)
        grads = make_grads(expected[0], F32, generator)
        call(adopt_reference_, expected, grads)
        call(fused, got, grads)
    assert_same_bits(got, expected)


def _replace(lists: list[list[Tensor]]) -> None:
    lists[1][0] = lists[1][0].clone() + 1


def _swap_storage(lists: list[list[Tensor]]) -> None:
    for tensors in lists:
        for tensor in tensors:
            tensor.data = tensor.data * 2  # steps too


def _transpose(lists: list[list[Tensor]]) -> None:
    lists[0][0].data = lists[0][0].data.t()  # same storage, same sizes, other strides


def _shrink(lists: list[list[Tensor]]) -> None:
    for tensors in lists[:3]:
        tensors[1].data = tensors[1].data[:100]  # same storage, fewer elements


def _change_dtype(lists: list[list[Tensor]]) -> None:
    lists[2][2].data = lists[2][2].data.double()


def _set_step(lists: list[list[Tensor]]) -> None:
    lists[3][1].fill_(0)


def _drop_first(lists: list[list[Tensor]]) -> None:
    for tensors in lists:
        del tensors[0]


@pytest.mark.usefixtures("exact_sqrt")
@pytest.mark.parametrize(
    "change", [_replace, _swap_storage, _transpose, _shrink, _change_dtype, _set_step, _drop_first]
)
def test_a_change_behind_the_kernel_s_back_is_noticed(change: Any) -> None:
    _run_beside_reference(change)


@pytest.mark.usefixtures("exact_sqrt")
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[4]], ids=str)
@pytest.mark.parametrize(
    "lay",
    [
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.transpose(0, 1),
        lambda t: torch.cat((t, t), 3)[..., ::2],  # with gaps
    ],
    ids=["channels_last", "transposed", "gaps"],
)
@pytest.mark.parametrize("which", ["all", "params", "grads"])
def test_layouts_that_are_not_row_major(lay: Any, which: str, dtypes: Any) -> None:
    generator = torch.Generator().manual_seed(8)
    expected = make_lists([(4, 4, 3, 6), (7,)], dtypes, generator)
    for column in {"all": (0, 1, 2), "params": (0,), "grads": ()}[which]:
        expected[column][0] = lay(expected[column][0])
    got = [[torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t) for t in tensors] for tensors in expected]
    fused = FusedAdopt()
    for _ in range(3):
        grads = make_grads(expected[0], dtypes[1], generator)
        if which != "params":
            grads[0] = lay(grads[0])
        call(adopt_reference_, expected, grads)
        call(fused, got, grads)
    assert_same_bits(got, expected)


def test_gradients_are_not_kept_alive() -> None:
    lists = make_lists([(50,)], DTYPES[0], torch.Generator().manual_seed(9))
    fused = FusedAdopt()
    grads = [torch.ones(50)]
    call(fused, lists, grads)
    storage = weakref.ref(grads[0].untyped_storage())
    alive = weakref.ref(grads[0])
    del grads
    gc.collect()
    assert alive() is None
    assert storage() is None


def test_what_the_plan_holds_is_freed_with_the_kernel() -> None:
    lists = make_lists([(50,)] * 3, DTYPES[0], torch.Generator().manual_seed(10))
    fused = FusedAdopt()
    call(fused, lists, [torch.ones(50)] * 3)
    alive = [weakref.ref(tensor) for tensors in lists for tensor in tensors]
    del lists, fused
    gc.collect()
    assert [tensor() for tensor in alive] == [None] * len(alive)


def test_autograd_notices_that_a_parameter_changed() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    loss = (param * param).sum()
    lists = [[param], [torch.zeros(3)], [torch.ones(3)], [torch.tensor(1.0)]]
    call(adopt_fused_, lists, [torch.ones(3)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_differentiable_is_refused() -> None:
    lists = make_lists([(3,)], DTYPES[0], torch.Generator())
    with pytest.raises(ValueError, match="cannot be differentiated"):
        call(adopt_fused_, lists, [torch.ones(3)], differentiable=True)


def test_lists_of_unequal_length_are_refused() -> None:
    lists = make_lists([(3,), (4,)], DTYPES[0], torch.Generator())
    with pytest.raises(ValueError, match="grads must hold one tensor for each of the 2 params"):
        call(adopt_fused_, lists, [torch.ones(3)])


# ---- stochastic rounding ----


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_stochastic_rounding_is_right_on_average(dtype: torch.dtype) -> None:
    # β2 v + (1 - β2) g² lies between two 16-bit numbers; the mean of 2^17 roundings must be within 5 standard errors
    numel = 1 << 17
    for value in (0.3, 1.7e-3, 900.0, 3e-7 if dtype == BF16 else 3.1e-6):
        v = torch.full((numel,), value).to(dtype)
        lists = [[torch.zeros(numel)], [torch.zeros(numel)], [v], [torch.tensor(5.0)]]
        grad = torch.full((numel,), value**0.5 * 1.3)
        exact = (v[0].double() * 0.99 + 0.01 * grad[0].double() ** 2).item()
        call(adopt_fused_, lists, [grad], beta2=0.99)
        rounded = v.double()
        low, high = rounded.min().item(), rounded.max().item()
        assert low <= exact <= high
        assert len(rounded.unique()) <= 2, "only the two neighbours"
        share = (exact - low) / (high - low)
        error = (rounded.mean().item() - exact) / (high - low)
        assert abs(error) < 5 * (share * (1 - share) / numel) ** 0.5 + 1e-6


def test_a_bf16_second_moment_follows_fp32_where_nearest_rounding_freezes() -> None:
    beta2, numel = 0.9999, 4096
    generator = torch.Generator().manual_seed(11)
    shapes = [(numel,)]
    fp32 = make_lists(shapes, (F32, F32, F32, F32), generator)
    bf16 = make_lists(shapes, (F32, F32, F32, BF16), generator)
    nearest = torch.ones(numel, dtype=BF16)
    kernels = FusedAdopt(), FusedAdopt()
    for step in range(20_001):
        grads = [torch.full((numel,), 1.0 if step == 0 else 0.3)]
        call(kernels[0], fp32, grads, beta2=beta2)
        call(kernels[1], bf16, grads, beta2=beta2)
        if step:
            nearest = (nearest.float() * beta2 + (1 - beta2) * grads[0].square()).to(BF16)
    expected = fp32[2][0].mean().item()
    assert abs(bf16[2][0].float().mean().item() / expected - 1) < 0.02
    assert nearest.float().mean().item() == 1.0, "rounded to nearest, v stands where it started"
    assert expected < 0.3


def test_every_option_is_covered_here() -> None:
    varied = {
        *("clip_lambda", "weight_decay", "decouple", "maximize", "nesterov", "init", "beta1", "beta2", "lr"),
        *("grad_scale", "step_increment", "found_inf", "offsets", "differentiable"),
    }
    assert set(OPTIONS) - varied == {"eps", "capturable"}
