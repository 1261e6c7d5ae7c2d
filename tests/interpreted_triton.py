"""The Triton kernel in its interpreter, on CPU tensors; `test_triton_kernel.py` runs this file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_cases import DTYPES, F32, assert_same_bits, call, clone, ieee_sqrt, make_grads, make_lists
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sharded_adopt.clipping import PowerClip
from sharded_adopt.kernels.reference import adopt_reference_
from sharded_adopt.kernels.triton_kernel import TritonAdopt

# numpy, which the interpreter computes with, warns of what the arithmetic is meant to do with infinities
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CONVERTED = 1500  # more than one block of the kernel, with a tail


@pytest.fixture(autouse=True)
def exact_sqrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "sqrt", ieee_sqrt)


OPTIONS = st.fixed_dictionaries(
    {
        "clip_lambda": st.sampled_from([None, PowerClip(0.25), lambda step: 0.5 * step]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "decouple": st.booleans(),
        "maximize": st.booleans(),
        "nesterov": st.booleans(),
        "init": st.sampled_from(["parameter", "element"]),
        "beta1": st.sampled_from([0.0, 0.3, 0.9]),
        "lr": st.sampled_from([1e-3, 0.1]),
        "grad_scale": st.sampled_from([None, torch.tensor(3.0), torch.tensor([1024.0])]),
        "step_increment": st.sampled_from([None, torch.tensor(1.0)]),
        "found_inf": st.sampled_from([None, torch.tensor(0.0)]),
    }
)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from([(), (0,), (5,), (3, 7), (CONVERTED,)]), st.sampled_from([0, 1, 7, 10_000])),
        min_size=1,
        max_size=3,
    ),
    dtypes=st.sampled_from(DTYPES),
    start=st.integers(0, 5),
    options=OPTIONS,
    seed=st.integers(0, 2**31),
)
def test_triton_equals_the_reference_to_the_bit(
    rows: list[tuple[tuple[int, ...], int]], dtypes: Any, start: int, options: dict[str, Any], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes, steps = [shape for shape, _ in rows], [step for _, step in rows]
    expected = make_lists(shapes, dtypes, generator, steps=steps, start=start)
    got = clone(expected)
    triton = TritonAdopt()
    offsets = [2**32 - 700 + 5000 * i for i in range(len(rows))]
    for _ in range(2):
        grads = make_grads(expected[0], dtypes[1], generator)
        call(adopt_reference_, expected, grads, **options, offsets=offsets)
        call(triton, got, grads, **options, offsets=offsets)
    assert_same_bits(got, expected)


def test_a_tensor_lr_is_read_by_the_kernel() -> None:
    generator = torch.Generator().manual_seed(0)
    expected = make_lists([(40,)], DTYPES[0], generator, steps=[2])
    got = clone(expected)
    lr, triton = torch.tensor(0.0), TritonAdopt()
    for rate in (0.25, 0.5):
        lr.fill_(rate)
        grads = make_grads(expected[0], F32, generator)
        call(adopt_reference_, expected, grads, lr=rate)
        call(triton, got, grads, lr=lr)
    assert_same_bits(got, expected)


def test_found_inf_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    lists = make_lists([(50,), (3,)], DTYPES[4], generator, steps=[2, 0])
    before = clone(lists)
    call(TritonAdopt(), lists, make_grads(lists[0], DTYPES[4][1], generator), found_inf=torch.tensor(1.0))
    assert_same_bits(lists, before)


def test_a_step_that_does_not_count_leaves_the_step() -> None:
    lists = make_lists([(50,), (0,)], DTYPES[0], torch.Generator().manual_seed(2))
    call(TritonAdopt(), lists, [torch.zeros_like(p) for p in lists[0]], step_increment=torch.tensor(0.0))
    assert [step.item() for step in lists[3]] == [0, 0]


def test_nan_and_inf_go_where_the_reference_lets_them_go() -> None:
    for dtypes in DTYPES:
        generator = torch.Generator().manual_seed(3)
        expected = make_lists([(64,)], dtypes, generator, steps=[3])
        special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0])
        for tensors in expected[:3]:
            tensors[0][:5] = special
            tensors[0][5:10] = special.roll(1)
        got = clone(expected)
        grads = make_grads(expected[0], dtypes[1], generator)
        for i in range(0, 60, 13):
            grads[0][i : i + 5] = special
        call(adopt_reference_, expected, grads)
        call(TritonAdopt(), got, grads)
        assert_same_bits(got, expected)


def test_layouts_that_are_not_row_major() -> None:
    generator = torch.Generator().manual_seed(4)
    for dtypes in (DTYPES[0], DTYPES[4]):
        for lay in (lambda t: t.to(memory_format=torch.channels_last), lambda t: torch.cat((t, t), 3)[..., ::2]):
            expected = make_lists([(4, 4, 3, 6), (7,)], dtypes, generator)
            for column in (0, 1, 2):
                expected[column][0] = lay(expected[column][0])
            got = [
                [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t) for t in tensors]
                for tensors in expected
            ]
            grads = make_grads(expected[0], dtypes[1], generator)
            grads[0] = lay(grads[0])
            call(adopt_reference_, expected, grads)
            call(TritonAdopt(), got, grads)
            assert_same_bits(got, expected)


def test_tables_are_written_again_only_when_something_moved() -> None:
    generator = torch.Generator().manual_seed(5)
    lists = make_lists([(50,), (30,)], DTYPES[0], generator)
    triton = TritonAdopt()
    grads = make_grads(lists[0], F32, generator)
    call(triton, lists, grads)
    (first,) = triton._tables.values()
    call(triton, lists, grads)
    (second,) = triton._tables.values()
    assert second is first
    grads[1] = grads[1].clone()
    call(triton, lists, grads)
    (third,) = triton._tables.values()
    assert third is not first
