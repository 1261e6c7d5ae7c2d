"""What a layout costs: bytes a rank and bytes on the wire, from integers alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sharded_adopt.sharding.layout import Bucket, Layout, Segment

# A bucket in flight holds what the other ranks sent until it is added up: this bounds that memory. Freed gradients
# are in flight one bucket at a time, so that with the one that fills there are never more than three buckets' worth.
MAX_KEPT_IN_FLIGHT, MAX_FREED_IN_FLIGHT = 2, 1
# What is fetched in a narrower dtype holds a copy of its bucket until it is there.
MAX_COPIES_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class Dtype:
    """A dtype as integers see it; `itemsize` in bytes."""

    name: str
    itemsize: int


@dataclass(frozen=True, slots=True)
class StateCost:
    """What an optimizer keeps for one parameter: the dtypes of its entries by their names, and bytes of counters.

    `flat`: entries that are there before the first step; those of a bucket lie in one tensor as long as the shard,
    whichever of its parameters have them. `loose`: entries that the first step of a segment makes, each of its size.
    """

    flat: Mapping[str, Dtype]
    loose: Mapping[str, Dtype]
    counters: int

    @property
    def of_element(self) -> int:
        """Bytes for each element of the parameter."""
        return _nbytes(self.flat.values()) + _nbytes(self.loose.values())


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The arguments of the engine that change bytes, as `ShardedOptimizer` takes them.

    `keeps_main`: fp32 values beside 16-bit parameters. `exchanges`: gradients are exchanged point to point, as on gloo,
    and what arrives needs memory; NCCL reduces in place.
    """

    shards_gradients: bool = False
    reduces_gradients: bool = True
    keeps_main: bool = True
    reduce_dtype: Dtype | None = None
    gather_dtype: Dtype | None = None
    overlaps: bool = True
    exchanges: bool = True


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on one rank, and bytes that one rank sends for each step.

    `parameters`: the flat buffers that all parameters are views of. `gradients`: what is kept of them between backward
    and step: whole flat buffers, this rank's shards of them, or whole tensors that somebody else averages. `state`:
    this rank's part of the optimizer state, and the counters of all parameters. `main_parameters`: its fp32 values of
    16-bit parameters. `in_flight`: buffers for the buckets under way, borrowed within a step and kept for the next.
    `largest_gradient`: what autograd makes before it is in its bucket. `accumulated`: with `shard_gradients`, the whole
    gradients that wait in `param.grad` where backward runs more than once before a step; kept ones add up in place.
    `sent_gradients`, `sent_parameters`: on the wire, in a step in which every parameter has a gradient.
    """

    world_size: int
    parameters: int
    gradients: int
    state: int
    main_parameters: int
    in_flight: int
    largest_gradient: int
    accumulated: int
    sent_gradients: int
    sent_parameters: int

    @property
    def resident(self) -> int:
        """Bytes held between steps."""
        return self.parameters + self.gradients + self.state + self.main_parameters + self.in_flight

    @property
    def peak(self) -> int:
        """Bytes held at most, with one backward a step; activations and what the model computes with are left out."""
        return self.resident + self.largest_gradient

    @property
    def peak_accumulating(self) -> int:
        """The same with several backwards a step, all but the last under `no_sync()`."""
        return self.peak + self.accumulated

    @property
    def sent(self) -> int:
        """Bytes that this rank sends in a step."""
        return self.sent_gradients + self.sent_parameters


@dataclass(slots=True)
class _Pool:
    """Borrowed tensors of one dtype: all as large as the largest, and as many as are ever out together."""

    itemsize: int
    numel: int = 0
    users: dict[str, list[int]] = field(default_factory=dict)  # how many are out at most, how many buckets ask

    def ask(self, user: str, numel: int, at_once: int) -> None:
        self.numel = max(self.numel, numel)
        asked = self.users.setdefault(user, [at_once, 0])
        asked[1] += 1

    def nbytes(self) -> int:
        return self.numel * self.itemsize * sum(min(at_once, buckets) for at_once, buckets in self.users.values())


def plan_memory(
    layout: Layout, state: Mapping[tuple[int, str], StateCost], options: EngineOptions, rank: int = 0
) -> MemoryPlan:
    """Add up what `layout` needs on `rank`.

    `state`: what the optimizer keeps for a parameter, by its group and the name of its dtype.
    """
    others = layout.world_size - 1
    segments = layout.segments(rank)
    itemsize = {param.key.dtype: param.itemsize for param in layout.params}
    parameters = gradients = held = main = sent_gradients = sent_parameters = 0
    pools: dict[tuple[str, str], _Pool] = {}
    for bucket in layout.buckets:
        dtype = Dtype(bucket.key.dtype, itemsize[bucket.key.dtype])
        reduced = _wire(dtype, options.reduce_dtype)
        gathered = _narrower(dtype, options.gather_dtype)
        parameters += bucket.padded_numel * dtype.itemsize
        gradients += _gradient_numel(bucket, options) * dtype.itemsize
        held += _state_nbytes(layout, bucket, state, segments)
        narrows = gathered is not dtype
        main += bucket.shard_numel * (4 if _is_16_bit(dtype) and options.keeps_main else narrows * dtype.itemsize)
        sent_parameters += bucket.shard_numel * others * gathered.itemsize
        if options.reduces_gradients:
            sent_gradients += _sent_numel(bucket, options, rank, layout.world_size) * reduced.itemsize
            _ask_for_gradients(pools, bucket, dtype, reduced, options, others)
        if narrows and others:
            pool = pools.setdefault(("wire", gathered.name), _Pool(gathered.itemsize))
            pool.ask("gather", bucket.padded_numel, MAX_COPIES_IN_FLIGHT)
    whole = [param.numel * param.itemsize for param in layout.params]
    return MemoryPlan(
        world_size=layout.world_size,
        parameters=parameters,
        gradients=gradients,
        state=held + sum(state[param.group, param.key.dtype].counters for param in layout.params),
        main_parameters=main,
        in_flight=sum(pool.nbytes() for pool in pools.values()),
        largest_gradient=max(whole, default=0),
        accumulated=sum(whole) if options.shards_gradients else 0,
        sent_gradients=sent_gradients,
        sent_parameters=sent_parameters,
    )


def _state_nbytes(
    layout: Layout, bucket: Bucket, state: Mapping[tuple[int, str], StateCost], segments: Sequence[Segment]
) -> int:
    flat: set[tuple[str, Dtype]] = set()
    loose = 0
    for placement in bucket.placements:
        param = layout.params[placement.param]
        cost = state[param.group, param.key.dtype]
        flat.update(cost.flat.items())
        loose += segments[placement.param].numel * _nbytes(cost.loose.values())
    return bucket.shard_numel * _nbytes(dtype for _, dtype in flat) + loose


def _nbytes(dtypes: Iterable[Dtype]) -> int:
    return sum(dtype.itemsize for dtype in dtypes)


def segment_dtype(dtype: Dtype, options: EngineOptions) -> Dtype:
    """What the optimizer sees of a parameter of `dtype`: its main values where they are kept."""
    return Dtype("float32", 4) if _is_16_bit(dtype) and options.keeps_main else dtype


def _is_16_bit(dtype: Dtype) -> bool:
    return dtype.itemsize == 2


def _wire(dtype: Dtype, wanted: Dtype | None) -> Dtype:
    return dtype if wanted is None or dtype.name.startswith("complex") else wanted


def _narrower(dtype: Dtype, wanted: Dtype | None) -> Dtype:
    wire = _wire(dtype, wanted)
    return wire if wire.itemsize < dtype.itemsize else dtype


def _is_borrowed(bucket: Bucket, options: EngineOptions) -> bool:
    # A freed bucket of one parameter travels in the memory of its gradient.
    return options.shards_gradients and len(bucket.placements) > 1


def _gradient_numel(bucket: Bucket, options: EngineOptions) -> int:
    if not options.reduces_gradients:
        return sum(placement.numel for placement in bucket.placements)
    return bucket.shard_numel if options.shards_gradients else bucket.padded_numel


def _sent_numel(bucket: Bucket, options: EngineOptions, rank: int, world_size: int) -> int:
    numel = bucket.padded_numel if not options.shards_gradients or _is_borrowed(bucket, options) else bucket.numel
    start, stop = bucket.shard_range(rank)
    return numel - max(0, min(stop, numel) - start) if world_size > 1 else 0


def _ask_for_gradients(
    pools: dict[tuple[str, str], _Pool],
    bucket: Bucket,
    dtype: Dtype,
    reduced: Dtype,
    options: EngineOptions,
    others: int,
) -> None:
    if _is_borrowed(bucket, options):
        # One that fills, and one that is under way.
        pool = pools.setdefault(("flat", dtype.name), _Pool(dtype.itemsize))
        pool.ask("flat", bucket.padded_numel, MAX_FREED_IN_FLIGHT + options.overlaps)
    if not others:
        return
    at_once = MAX_FREED_IN_FLIGHT if options.shards_gradients else MAX_KEPT_IN_FLIGHT
    pool = pools.setdefault(("wire", reduced.name), _Pool(reduced.itemsize))
    if options.exchanges:
        pool.ask("arrived", bucket.shard_numel * others, at_once)
    is_uneven = options.shards_gradients and bucket.numel != bucket.padded_numel and len(bucket.placements) == 1
    if reduced != dtype or (is_uneven and not options.exchanges):
        pool.ask("copy", bucket.padded_numel, at_once)
