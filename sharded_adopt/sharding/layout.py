"""Where every element lives: buckets, shards and segments, as integers.

Nothing here holds memory, sends a message or knows torch. `rank` and `world_size` are arguments, so the arithmetic of a
thousand ranks is tested on a laptop.

Three parameters of 5, 6 and 3 fp32 elements in one bucket over two ranks, drawn to scale (a letter is an element, a dot
is padding). The last parameter comes first, because its gradient is ready first; each one starts on 16 bytes, that is,
on a multiple of four elements:

    bucket   c c c . b b b b b b . . a a a a a     numel 17, padded_numel 18
    shards   [----- rank 0 -----|----- rank 1 ----]     shard_numel 9
    segments [c 0:3] [b 0:5]     [b 5:6] [a 0:5]        of rank 0 and of rank 1

An *element* of a parameter is counted in the order in which the parameter lies in memory (`ParamSpec.dim_order`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

ALIGNMENT_NBYTES = 16


@dataclass(frozen=True, slots=True)
class BucketKey:
    """What the parameters of one bucket have in common.

    `device` is the kind of device, counted where a rank uses several (`cuda`, or `cuda:0` and `cuda:1`): equal on ranks
    whose devices have other numbers. `process_group` counts the groups of ranks that an optimizer shards over, from 0.
    """

    dtype: str
    device: str
    process_group: int = 0


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One parameter as the layout sees it.

    `shape` is its logical shape. `dim_order` lists the dimensions from the slowest to the fastest in memory:
    `(0, 1, 2, 3)` for a contiguous 4-D tensor, `(0, 2, 3, 1)` for channels_last. `itemsize` is in bytes. `group` is the
    index of its parameter group: an attribute of the segment, never a reason for another bucket.
    """

    name: str
    shape: tuple[int, ...]
    key: BucketKey
    itemsize: int
    group: int = 0
    dim_order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.dim_order:
            object.__setattr__(self, "dim_order", tuple(range(len(self.shape))))
        if sorted(self.dim_order) != list(range(len(self.shape))):
            raise ValueError(f"{self.name!r} has {len(self.shape)} dimensions, which dim_order {self.dim_order} misses")
        if self.itemsize < 1 or any(size < 0 for size in self.shape):
            raise ValueError(f"{self.name!r} has shape {self.shape} and itemsize {self.itemsize}")

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)

    @property
    def memory_shape(self) -> tuple[int, ...]:
        """The sizes from the slowest to the fastest dimension: row-major over it is the order of the elements."""
        return tuple(self.shape[dim] for dim in self.dim_order)


@dataclass(frozen=True, slots=True)
class Placement:
    """Elements `[start, start + numel)` of a bucket hold parameter number `param`."""

    param: int
    start: int
    numel: int


@dataclass(frozen=True, slots=True)
class Segment:
    """The overlap of one rank's shard with one parameter; `numel` may be 0.

    Elements `[start, start + numel)` of parameter number `param` are `[shard_start, shard_start + numel)` of the rank's
    shard of bucket number `bucket`.
    """

    param: int
    bucket: int
    start: int
    numel: int
    shard_start: int

    @property
    def stop(self) -> int:
        """One past the last element, counted in the parameter."""
        return self.start + self.numel


@dataclass(frozen=True, slots=True)
class Bucket:
    """Parameters that are communicated together in one flat buffer.

    `numel` reaches to the end of the last parameter, gaps of alignment included. The buffer has `padded_numel`
    elements: `world_size` shards of `shard_numel` each.
    """

    key: BucketKey
    placements: tuple[Placement, ...]
    numel: int
    shard_numel: int
    padded_numel: int

    def __post_init__(self) -> None:
        end = 0
        for placement in self.placements:
            if placement.start < end:
                raise ValueError(f"{placement} overlaps the parameter before it, which ends at {end}")
            end = placement.start + placement.numel
        if not end <= self.numel <= self.padded_numel:
            raise ValueError(f"the last parameter ends at {end}, past numel {self.numel} or padded {self.padded_numel}")

    def gaps(self) -> Iterator[tuple[int, int]]:
        """Start and stop of what no parameter fills: alignment between them, padding at the end."""
        end = 0
        for start, stop in [*((p.start, p.start + p.numel) for p in self.placements), (self.padded_numel,) * 2]:
            if end < start:
                yield end, start
            end = stop

    def shard_range(self, rank: int) -> tuple[int, int]:
        """Start and stop, in elements of the buffer, of what `rank` owns."""
        return rank * self.shard_numel, (rank + 1) * self.shard_numel


@dataclass(frozen=True, slots=True)
class Layout:
    """Which rank owns which elements of which parameter."""

    world_size: int
    params: tuple[ParamSpec, ...]
    buckets: tuple[Bucket, ...]

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """The segments of `rank`, one for every parameter, in the order of the parameters."""
        found: list[Segment | None] = [None] * len(self.params)
        for index, bucket in enumerate(self.buckets):
            shard_start, shard_stop = bucket.shard_range(rank)
            for placement in bucket.placements:
                start = min(max(shard_start, placement.start), placement.start + placement.numel)
                stop = max(start, min(shard_stop, placement.start + placement.numel))
                found[placement.param] = Segment(
                    param=placement.param,
                    bucket=index,
                    start=start - placement.start,
                    numel=stop - start,
                    # An empty segment points at the start of the shard, so that slicing it is always legal.
                    shard_start=start - shard_start if stop > start else 0,
                )
        return tuple(segment for segment in found if segment is not None)

    def extended(self, params: Sequence[ParamSpec], bucket_cap_nbytes: int) -> Layout:
        """This layout with `params` behind it, in buckets of their own: what was laid out stays where it is."""
        _refuse_duplicate_names([*self.params, *params])
        first = len(self.params)
        buckets = _fill_buckets(params, first, bucket_cap_nbytes, self.world_size)
        return replace(self, params=(*self.params, *params), buckets=(*self.buckets, *buckets))

    def to_json(self) -> dict[str, Any]:
        """Plain data that says everything."""
        return {
            "world_size": self.world_size,
            "params": [asdict(param) for param in self.params],
            "buckets": [asdict(bucket) for bucket in self.buckets],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Layout:
        """The inverse of `to_json`, also after a trip through JSON text. Raises `ValueError` for what is no layout."""
        try:
            params = tuple(
                ParamSpec(
                    name=str(one["name"]),
                    shape=tuple(one["shape"]),
                    key=BucketKey(**one["key"]),
                    itemsize=one["itemsize"],
                    group=one["group"],
                    dim_order=tuple(one["dim_order"]),
                )
                for one in data["params"]
            )
            buckets = tuple(
                Bucket(
                    key=BucketKey(**one["key"]),
                    placements=tuple(Placement(**placement) for placement in one["placements"]),
                    numel=one["numel"],
                    shard_numel=one["shard_numel"],
                    padded_numel=one["padded_numel"],
                )
                for one in data["buckets"]
            )
            return cls(data["world_size"], params, buckets)
        except (KeyError, TypeError) as error:
            raise ValueError(f"expected the plain data of a layout, got something else: {error!r}") from error

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the layout: equal on two ranks exactly if their layouts are."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def make_layout(params: Sequence[ParamSpec], world_size: int, bucket_cap_nbytes: int) -> Layout:
    """Lay `params` out in buckets of at most `bucket_cap_nbytes` (a larger parameter fills one alone).

    Buckets are filled from the last parameter to the first, the order in which backward makes gradients, one open
    bucket for each `BucketKey`. Parameter groups do not split buckets.

    Raises `ValueError` for `world_size < 1`, a cap below one byte, and two parameters of one name.
    """
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    if bucket_cap_nbytes < 1:
        raise ValueError(f"a bucket must hold at least one byte, got a cap of {bucket_cap_nbytes}")
    return Layout(world_size, (), ()).extended(params, bucket_cap_nbytes)


def _refuse_duplicate_names(params: Iterable[ParamSpec]) -> None:
    seen: set[str] = set()
    for param in params:
        if param.name in seen:
            raise ValueError(f"two parameters are called {param.name!r}: names must be unique")
        seen.add(param.name)


def _fill_buckets(params: Sequence[ParamSpec], first: int, bucket_cap_nbytes: int, world_size: int) -> Iterator[Bucket]:
    open_buckets: dict[BucketKey, tuple[list[Placement], int]] = {}
    for offset in reversed(range(len(params))):
        param = params[offset]
        placements, end = open_buckets.get(param.key, ([], 0))
        start = _round_up(end, max(1, ALIGNMENT_NBYTES // param.itemsize))
        if placements and (start + param.numel) * param.itemsize > bucket_cap_nbytes:
            yield _close(param.key, placements, end, world_size)
            placements, start = [], 0
        placements.append(Placement(first + offset, start, param.numel))
        open_buckets[param.key] = (placements, start + param.numel)
    for key, (placements, end) in open_buckets.items():
        yield _close(key, placements, end, world_size)


def _close(key: BucketKey, placements: list[Placement], numel: int, world_size: int) -> Bucket:
    shard_numel = -(-numel // world_size)
    return Bucket(key, tuple(placements), numel, shard_numel, shard_numel * world_size)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def first_difference(ours: Layout, theirs: Layout) -> str | None:
    """Say in words where two layouts part, or None where they are equal.

    Parameters are compared before buckets, because a bucket only differs for a reason, and the parameter is the reason.
    """
    if ours.world_size != theirs.world_size:
        return f"world size {ours.world_size} against {theirs.world_size}"
    for index, (a, b) in enumerate(zip(ours.params, theirs.params, strict=False)):
        for field, mine, other in (
            ("name", a.name, b.name),
            ("shape", a.shape, b.shape),
            ("dtype", a.key.dtype, b.key.dtype),
            ("parameter group", a.group, b.group),
            ("memory order", a.dim_order, b.dim_order),
            ("device", a.key.device, b.key.device),
        ):
            if mine != other:
                return f"parameter {index} ({a.name!r} against {b.name!r}): {field} {mine!r} against {other!r}"
    if len(ours.params) != len(theirs.params):
        longer = ours if len(ours.params) > len(theirs.params) else theirs
        extra = longer.params[min(len(ours.params), len(theirs.params))]
        return f"{len(ours.params)} parameters against {len(theirs.params)}: {extra.name!r} is on one side only"
    if ours.buckets != theirs.buckets:
        index = next(
            (i for i, (a, b) in enumerate(zip(ours.buckets, theirs.buckets, strict=False)) if a != b),
            min(len(ours.buckets), len(theirs.buckets)),
        )
        return f"bucket {index}: the bucket sizes differ (is bucket_cap_mb the same everywhere?)"
    return None


@dataclass(frozen=True, slots=True)
class StoredRange:
    """Elements `[start, stop)` of a parameter, kept by `source` (a rank, or the number of a file)."""

    source: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Copy `numel` elements from `source_start` of the stored range to `target_start` of the range asked for."""

    stored: StoredRange
    source_start: int
    target_start: int
    numel: int


def reshard_plan(stored: Iterable[StoredRange], start: int, stop: int) -> tuple[Piece, ...]:
    """Which pieces of the stored ranges make up elements `[start, stop)`, in order.

    This is the whole of loading at another world size. Raises `ValueError` where the stored ranges leave a gap or give
    an element twice.
    """
    pieces: list[Piece] = []
    reached = start
    for one in sorted(stored, key=lambda r: (r.start, r.stop)):
        low, high = max(one.start, start), min(one.stop, stop)
        if low >= high:
            continue
        if low != reached:
            what = "are missing" if low > reached else "are stored twice"
            raise ValueError(f"elements [{min(low, reached)}, {max(low, reached)}) {what}")
        pieces.append(Piece(one, low - one.start, low - start, high - low))
        reached = high
    if reached < stop:
        raise ValueError(f"elements [{reached}, {stop}) are missing")
    return tuple(pieces)


@dataclass(frozen=True, slots=True)
class Box:
    """An n-D block `offsets`, `sizes` of a tensor whose elements are `[start, stop)` of its row-major order."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    stop: int


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Cut the row-major range `[start, stop)` of a tensor into blocks, in order, each contiguous in memory.

    At most `2 * ndim - 1` of them: part of a first row, whole rows, part of a last row, and the same within each part.
    An empty range has none.
    """
    if start >= stop:
        return
    if not shape:
        yield Box((), (), start, stop)
        return
    inner = tuple(shape[1:])
    row_numel = math.prod(inner)
    first, head = divmod(start, row_numel)
    last, tail = divmod(stop, row_numel)
    if first == last:
        yield from _in_row(inner, first, head, tail)
        return
    if head:
        yield from _in_row(inner, first, head, row_numel)
        first += 1
    if first < last:
        yield Box((first,) + (0,) * len(inner), (last - first, *inner), first * row_numel, last * row_numel)
    if tail:
        yield from _in_row(inner, last, 0, tail)


def _in_row(inner: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Box]:
    shift = row * math.prod(inner)
    for box in boxes(inner, start, stop):
        yield Box((row, *box.offsets), (1, *box.sizes), box.start + shift, box.stop + shift)
