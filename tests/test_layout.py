"""The layout is arithmetic: it is tested for every world size, without a rank running."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharded_adopt.sharding.layout import (
    ALIGNMENT_NBYTES,
    BucketKey,
    Layout,
    ParamSpec,
    StoredRange,
    boxes,
    first_difference,
    make_layout,
    reshard_plan,
)

FP32, BF16 = BucketKey("float32", "cpu"), BucketKey("bfloat16", "cpu")
shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
param_lists = st.lists(
    st.tuples(shapes, st.sampled_from([(FP32, 4), (BF16, 2)]), st.integers(0, 2)), min_size=1, max_size=12
).map(lambda rows: [ParamSpec(f"p{i}", s, key, size, g) for i, (s, (key, size), g) in enumerate(rows)])


@given(params=param_lists, world_size=st.integers(1, 1024), cap=st.sampled_from([1, 64, 1000, 1 << 20]))
@settings(max_examples=300, deadline=None)
def test_segments_tile_every_parameter_once(params: list[ParamSpec], world_size: int, cap: int) -> None:
    layout = make_layout(params, world_size, cap)
    owned: dict[int, list[tuple[int, int]]] = {index: [] for index in range(len(params))}
    # Beyond the ranks that own something every segment is empty; a sample of them is enough.
    for rank in {*range(min(world_size, 70)), world_size - 1, world_size // 2}:
        segments = layout.segments(rank)
        assert [segment.param for segment in segments] == list(range(len(params)))
        for segment in segments:
            bucket = layout.buckets[segment.bucket]
            assert 0 <= segment.shard_start <= segment.shard_start + segment.numel <= bucket.shard_numel
            if segment.numel:
                owned[segment.param].append((segment.start, segment.stop))
    if world_size <= 70:
        for index, ranges in owned.items():
            ends = [0, *(end for pair in sorted(ranges) for end in pair), params[index].numel]
            assert all(a == b for a, b in zip(ends[::2], ends[1::2], strict=True))


@given(params=param_lists, world_size=st.integers(1, 1024), cap=st.sampled_from([1, 64, 1000, 1 << 20]))
@settings(max_examples=200, deadline=None)
def test_buckets_are_aligned_capped_and_of_one_kind(params: list[ParamSpec], world_size: int, cap: int) -> None:
    layout = make_layout(params, world_size, cap)
    for bucket in layout.buckets:
        keys = {params[placement.param].key for placement in bucket.placements}
        assert keys == {bucket.key}
        itemsize = params[bucket.placements[0].param].itemsize
        assert all(p.start * itemsize % ALIGNMENT_NBYTES == 0 for p in bucket.placements)
        assert bucket.shard_numel == math.ceil(bucket.numel / world_size)
        assert bucket.padded_numel == bucket.shard_numel * world_size
        assert len(bucket.placements) == 1 or bucket.numel * itemsize <= cap
        # Last parameter first: the order in which backward makes gradients.
        assert all(a.param > b.param for a, b in pairwise(bucket.placements))
    assert sorted(p.param for b in layout.buckets for p in b.placements) == list(range(len(params)))


def test_the_drawing_in_the_module_is_what_the_code_does() -> None:
    layout = make_layout([ParamSpec(n, (k,), FP32, 4) for n, k in (("a", 5), ("b", 6), ("c", 3))], 2, 1 << 20)
    (bucket,) = layout.buckets
    assert (bucket.numel, bucket.padded_numel, bucket.shard_numel) == (17, 18, 9)
    assert [(s.start, s.stop) for s in layout.segments(0)] == [(0, 0), (0, 5), (0, 3)]
    assert [(s.start, s.stop) for s in layout.segments(1)] == [(0, 5), (5, 6), (3, 3)]


def gpt2_shapes() -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = [(50257, 768), (1024, 768)]
    for _ in range(12):
        shapes += [(768,), (768,), (2304, 768), (2304,), (768, 768), (768,), (768,), (768,)]
        shapes += [(3072, 768), (3072,), (768, 3072), (768,)]
    return [*shapes, (768,), (768,)]


def llama3_8b_shapes() -> list[tuple[int, ...]]:
    block = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
    return [(128256, 4096), *(32 * [*block, (4096,), (4096,)]), (4096,), (128256, 4096)]


@pytest.mark.parametrize("shapes", [gpt2_shapes(), llama3_8b_shapes()], ids=["gpt2", "llama3-8b"])
def test_every_rank_owns_the_even_share_within_half_a_percent(shapes: list[tuple[int, ...]]) -> None:
    params = [ParamSpec(f"p{i}", shape, FP32, 4) for i, shape in enumerate(shapes)]
    total = sum(param.numel for param in params)
    for world_size in range(2, 1025):
        layout = make_layout(params, world_size, 25 << 20)
        assert sum(bucket.shard_numel for bucket in layout.buckets) <= 1.005 * total / world_size


def test_extending_leaves_what_is_there_where_it_is() -> None:
    before = make_layout([ParamSpec("a", (5,), FP32, 4), ParamSpec("b", (7,), FP32, 4)], 3, 1 << 20)
    after = before.extended([ParamSpec("c", (11,), FP32, 4, group=1)], 1 << 20)
    assert after.buckets[: len(before.buckets)] == before.buckets
    for rank in range(3):
        assert after.segments(rank)[:2] == before.segments(rank)
    assert after.segments(0)[2].bucket == len(before.buckets)


def test_two_parameters_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two parameters are called 'a'"):
        make_layout([ParamSpec("a", (5,), FP32, 4), ParamSpec("a", (7,), FP32, 4)], 1, 100)


@pytest.mark.parametrize(("world_size", "cap", "match"), [(0, 100, "world_size"), (2, 0, "at least one byte")])
def test_senseless_layouts_are_refused(world_size: int, cap: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make_layout([ParamSpec("a", (5,), FP32, 4)], world_size, cap)


def test_more_than_2_to_the_31_elements_stay_integers() -> None:
    # T39
    layout = make_layout([ParamSpec("huge", (3, 2**31 + 1), FP32, 4)], 2, 25 << 20)
    (segment,) = layout.segments(1)
    assert segment.stop == 3 * (2**31 + 1)


@given(params=param_lists, world_size=st.integers(1, 64))
def test_a_layout_survives_json_and_keeps_its_fingerprint(params: list[ParamSpec], world_size: int) -> None:
    layout = make_layout(params, world_size, 1000)
    again = Layout.from_json(json.loads(json.dumps(layout.to_json())))
    assert again == layout
    assert again.fingerprint() == layout.fingerprint()
    assert first_difference(layout, again) is None


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ([ParamSpec("a", (5,), FP32, 4), ParamSpec("x", (7,), FP32, 4)], "'b' against 'x'.*name"),
        ([ParamSpec("a", (5,), FP32, 4), ParamSpec("b", (8,), FP32, 4)], r"shape \(7,\) against \(8,\)"),
        ([ParamSpec("a", (5,), BF16, 2), ParamSpec("b", (7,), FP32, 4)], "dtype 'float32' against 'bfloat16'"),
        ([ParamSpec("a", (5,), FP32, 4), ParamSpec("b", (7,), FP32, 4, group=1)], "parameter group 0 against 1"),
        ([ParamSpec("a", (5,), FP32, 4)], "2 parameters against 1: 'b' is on one side only"),
    ],
)
def test_the_first_difference_is_named(other: list[ParamSpec], match: str) -> None:
    ours = make_layout([ParamSpec("a", (5,), FP32, 4), ParamSpec("b", (7,), FP32, 4)], 2, 1 << 20)
    theirs = make_layout(other, 2, 1 << 20)
    difference = first_difference(ours, theirs)
    assert difference is not None
    assert re.search(match, difference), difference
    assert ours.fingerprint() != theirs.fingerprint()


@given(numel=st.integers(0, 60), cuts=st.lists(st.integers(0, 60), max_size=6), data=st.data())
def test_a_reshard_plan_copies_every_element_once_and_in_order(
    numel: int, cuts: list[int], data: st.DataObject
) -> None:
    ends = [0, *sorted(min(cut, numel) for cut in cuts), numel]
    stored = [StoredRange(rank, a, b) for rank, (a, b) in enumerate(pairwise(ends))]
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    rebuilt: list[int] = []
    for piece in reshard_plan(stored, start, stop):
        assert piece.target_start == len(rebuilt)
        elements = range(piece.stored.start, piece.stored.stop)
        rebuilt += elements[piece.source_start : piece.source_start + piece.numel]
    assert rebuilt == list(range(start, stop))


def test_a_gap_and_an_overlap_in_stored_ranges_are_errors() -> None:
    with pytest.raises(ValueError, match=r"\[3, 4\) are missing"):
        reshard_plan([StoredRange(0, 0, 3), StoredRange(1, 4, 8)], 0, 8)
    with pytest.raises(ValueError, match=r"\[2, 3\) are stored twice"):
        reshard_plan([StoredRange(0, 0, 3), StoredRange(1, 2, 8)], 0, 8)
    with pytest.raises(ValueError, match=r"\[8, 9\) are missing"):
        reshard_plan([StoredRange(0, 0, 8)], 0, 9)


@given(shape=st.lists(st.integers(1, 5), max_size=4), data=st.data())
@settings(max_examples=300)
def test_boxes_tile_a_range_with_contiguous_blocks(shape: list[int], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    reached, count = start, 0
    for box in boxes(shape, start, stop):
        assert box.start == reached
        assert math.prod(box.sizes) == box.stop - box.start
        assert sum(o * s for o, s in zip(box.offsets, strides, strict=True)) == box.start
        last = sum((o + n - 1) * s for o, n, s in zip(box.offsets, box.sizes, strides, strict=True))
        # The first and the last element are as far apart as the box has elements: it is one block of memory.
        assert last == box.stop - 1
        reached, count = box.stop, count + 1
    assert reached == (stop if start < stop else start)
    assert count <= max(1, 2 * len(shape) - 1)
