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
    reduces_gradients: bool,
    shards_gradients: bool,
    buckets_in_flight: int,
) -> MemoryPlan:
    """Add up what `layout` needs.

    `keeps_main`: fp32 values beside 16-bit parameters. `state_nbytes_per_element`: for each dtype of parameters, the
    bytes of state of one element (8 for fp32 ADOPT).
    """
    itemsize = {param.key.dtype: param.itemsize for param in layout.params}
    buffers = [bucket.padded_numel * itemsize[bucket.key.dtype] for bucket in layout.buckets]
    shards = [bucket.shard_numel * itemsize[bucket.key.dtype] for bucket in layout.buckets]
    to_others = sum(shards) * (layout.world_size - 1)
    largest = sorted(shards, reverse=True)[:buckets_in_flight]
    return MemoryPlan(
        world_size=layout.world_size,
        parameters=sum(buffers),
        gradients=0 if not reduces_gradients else sum(shards) if shards_gradients else sum(buffers),
        state=sum(b.shard_numel * state_nbytes_per_element[b.key.dtype] for b in layout.buckets),
        main_parameters=sum(4 * b.shard_numel for b in layout.buckets if keeps_main and itemsize[b.key.dtype] == 2),
        in_flight=sum(largest) * (layout.world_size - 1) if reduces_gradients else 0,
        sent_gradients=to_others if reduces_gradients else 0,
        sent_parameters=to_others,
    )
