"""What a layout costs: bytes a rank and bytes on the wire, from integers alone."""

from __future__ import annotations

from dataclasses import dataclass

from sharded_adopt.sharding.layout import Layout


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on one rank, and bytes that one rank sends for each step.

    `parameters`: the flat buffers that all parameters are views of. `gradients`: what is kept of them between backward
    and step: whole flat buffers, this rank's shards of them, or 0 where somebody else keeps them. `state`: this rank's
    shard of the optimizer state. `main_parameters`: its fp32 values of 16-bit parameters. `in_flight`: what other
    ranks sent for the buckets under way, at most. `sent_gradients`, `sent_parameters`: on the wire, in a step in
    which every parameter has a gradient.
    """

    world_size: int
    parameters: int
    gradients: int
    state: int
    main_parameters: int
    in_flight: int
    sent_gradients: int
    sent_parameters: int

    @property
    def resident(self) -> int:
        """Bytes held between steps."""
        return self.parameters + self.gradients + self.state + self.main_parameters

    @property
    def sent(self) -> int:
        """Bytes that this rank sends in a step."""
        return self.sent_gradients + self.sent_parameters


def plan_memory(
    layout: Layout,
    state_nbytes_per_element: dict[str, int],
    keeps_main: bool,
    reduce_itemsize: int | None,
    gather_itemsize: int | None,
    reduces_gradients: bool,
    shards_gradients: bool,
    buckets_in_flight: int,
) -> MemoryPlan:
    """Add up what `layout` needs.

    `state_nbytes_per_element`: for each dtype of parameters, the bytes of state of one element (8 for fp32 ADOPT).
    `keeps_main`: fp32 values beside 16-bit parameters. `reduce_itemsize`, `gather_itemsize`: bytes of an element on the
    wire, where they are not those of the parameters.
    """
    others = layout.world_size - 1
    itemsize = {param.key.dtype: param.itemsize for param in layout.params}
    parameters = gradients = state = main = sent_gradients = sent_parameters = 0
    arriving: list[int] = []
    for bucket in layout.buckets:
        size = itemsize[bucket.key.dtype]
        is_complex = bucket.key.dtype.startswith("complex")
        reduced = size if reduce_itemsize is None or is_complex else reduce_itemsize
        narrows = gather_itemsize is not None and gather_itemsize < size and not is_complex
        parameters += bucket.padded_numel * size
        gradients += (bucket.shard_numel if shards_gradients else bucket.padded_numel) * size
        state += bucket.shard_numel * state_nbytes_per_element[bucket.key.dtype]
        main += bucket.shard_numel * (4 if size == 2 and keeps_main else size if narrows else 0)
        sent_gradients += bucket.shard_numel * reduced * others
        sent_parameters += bucket.shard_numel * (gather_itemsize if narrows and gather_itemsize else size) * others
        copied = bucket.padded_numel * reduced if reduced != size else 0
        arriving.append(bucket.shard_numel * reduced * others + copied)
    return MemoryPlan(
        world_size=layout.world_size,
        parameters=parameters,
        gradients=gradients if reduces_gradients else 0,
        state=state,
        main_parameters=main,
        in_flight=sum(sorted(arriving, reverse=True)[:buckets_in_flight]) if reduces_gradients else 0,
        sent_gradients=sent_gradients if reduces_gradients else 0,
        sent_parameters=sent_parameters,
    )
