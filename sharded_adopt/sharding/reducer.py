"""When gradients move: from `param.grad` into buckets, from buckets to their owners.

[Note: a round] The gradients between two steps are a *round*. In a round every bucket is reduced once, in the order of
its index: from a hook when it and all earlier ones are full, the rest when the gradients are synchronised. One exchange
then tells every rank which parameters had a gradient anywhere and what went differently somewhere.

[Note: errors in a round] What a user did wrong is kept, not raised, until the exchange: a rank that left backward or
the reductions early would leave the others waiting. The exchange makes every rank raise. An error of the connection is
raised at once, because the others get one too.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharded_adopt.sharding.buckets import BucketBuffer
from sharded_adopt.sharding.collectives import Collectives
from sharded_adopt.sharding.gradients import Verdict, are_one, both_ends
from sharded_adopt.sharding.layout import Layout, Segment
from sharded_adopt.sharding.plan import MAX_FREED_IN_FLIGHT, MAX_KEPT_IN_FLIGHT
from sharded_adopt.sharding.reduction import BucketReduction
from sharded_adopt.sharding.scratch import Scratch

_alive: weakref.WeakSet[GradientReducer] = weakref.WeakSet()


def refuse_taken(tensors: Iterable[Tensor], names: Iterable[str], frees: bool) -> None:
    """Raise `ValueError` for a parameter whose gradients a live reducer takes away, or would lose to one that `frees`.

    Both would have hooks on it, and the first to run leaves the other nothing.
    """
    found = _taken(tensors, names, frees)
    if found:
        gc.collect()  # an optimizer and its scheduler know each other: dropped, they may be here still
        found = _taken(tensors, names, frees)
    if found:
        raise ValueError(
            f"another sharded optimizer is alive that holds {found[:5]}, and with shard_gradients=True one of the two "
            "would take the other's gradients: drop the other first, and the schedulers that hold it"
        )


def _taken(tensors: Iterable[Tensor], names: Iterable[str], frees: bool) -> list[str]:
    held = {id(p) for one in _alive if frees or one.frees for bucket in one.buckets for p in bucket.params.values()}
    return [name for tensor, name in zip(tensors, names, strict=True) if id(tensor) in held]


class GradientReducer:
    """Averages gradients over the ranks, bucket by bucket, while backward runs. See [Note: a round].

    `overlap=False` leaves every reduction to `agree`. `frees` is ZeRO-2. `wire_dtype`: what gradients travel in
    (default: their own dtype).
    """

    def __init__(self, group: Collectives, overlap: bool, frees: bool, wire_dtype: torch.dtype | None) -> None:
        _alive.add(self)
        self.frees = frees
        self._group = group
        self._wire_dtype = wire_dtype
        self._overlap = overlap
        self._max_in_flight = MAX_FREED_IN_FLIGHT if frees else MAX_KEPT_IN_FLIGHT
        self._scratch = Scratch()
        self._syncs = True
        self._layout = Layout(group.world_size, (), ())
        self.buckets: list[BucketReduction] = []
        self._of_param: dict[int, BucketReduction] = {}
        self._hooked: set[int] = set()
        self._next = 0  # the first bucket that is not launched in this round
        self._errors: list[Exception] = []  # see [Note: errors in a round]

    def add(self, layout: Layout, params: Sequence[Tensor], buffers: Sequence[BucketBuffer]) -> None:
        """Take over the parameters and buckets that came behind the known ones. Not within a round."""
        self._layout = layout
        for buffer in buffers[len(self.buckets) :]:
            bucket = BucketReduction(buffer, params, layout.params, self._errors, self._scratch, self._wire_dtype)
            numel, dtype, device = buffer.bucket.padded_numel, buffer.params.dtype, buffer.params.device
            self._group.announce(numel, dtype, device, self._wire_dtype)
            if len(bucket.params) > 1:
                self._scratch.announce(numel, dtype, device)
            self.buckets.append(bucket)
            self._of_param.update(dict.fromkeys(bucket.params, bucket))
        self._watch()

    def _watch(self) -> None:
        """Put hooks on the parameters that require a gradient and have none yet: some are unfrozen while training."""
        # Weak, so that a model outlives its optimizer without feeding it.
        this = weakref.ref(self)
        for index, bucket in self._of_param.items():
            param = bucket.params[index]
            if param.requires_grad and index not in self._hooked:
                self._hooked.add(index)
                param.register_hook(_Hook(this, index, GradientReducer._before))
                param.register_post_accumulate_grad_hook(_Hook(this, index, GradientReducer._after))

    def _before(self, index: int) -> None:
        self._of_param[index].before_accumulation()

    def _after(self, index: int) -> None:
        bucket = self._of_param[index]
        if bucket.round.launched and not bucket.keeps:
            # Another backward: what it makes waits for the exchange, and nothing else shall wait with it.
            self.buckets[self._next - 1].finish()
        reduces = self._syncs and self._overlap
        bucket.after_accumulation(index, is_last=reduces)
        if self._syncs:
            bucket.round.ready.add(index)
        if reduces:
            while self._next < len(self.buckets) and self.buckets[self._next].is_full():
                self._launch_next()

    def _launch_next(self) -> None:
        if self._next >= self._max_in_flight:
            self.buckets[self._next - self._max_in_flight].finish()
        self.buckets[self._next].launch(self._group)
        self._next += 1

    def agree(self, ask_nonzero: bool, problem: Exception | None, digest: bytes) -> Verdict:
        """Launch the buckets that are left, exchange what happened, and reduce again what came late.

        Once all buckets are finished, this rank's slice of each holds the mean. Kept, `param.grad` is the view of its
        bucket where any rank had a gradient; else it is None.

        `digest`: a few bytes that should be the same on all ranks. Raises on every rank: `problem`, `TypeError` for a
        sparse gradient, `RuntimeError` where a gradient was edited while it was being reduced or dropped on some
        ranks only.
        """
        if problem is not None:
            self._errors.insert(0, problem)
        while self._next < len(self.buckets):
            self._launch_next()
        for bucket in self.buckets:
            bucket.check_untouched()
            bucket.collect_late()
        if ask_nonzero:
            self.finish_all()
        verdict, late, dropped = self._exchange(ask_nonzero, digest)
        for index in late:
            self.buckets[index].reduce_late(self._group, dropped)
        for bucket in self.buckets:
            bucket.point_grads(verdict.present)
        self._watch()
        return verdict

    def finish(self, bucket: int) -> None:
        """Wait for the averaged gradients of a bucket."""
        self.buckets[bucket].finish()

    def finish_all(self) -> None:
        """Wait for all of them."""
        for bucket in self.buckets:
            bucket.finish()

    def _exchange(self, ask_nonzero: bool, digest: bytes) -> tuple[Verdict, list[int], set[int]]:
        """The one exchange of a round. Returns the verdict, the buckets to reduce again, and the dropped parameters."""
        error = self._errors[0] if self._errors else None
        params, buckets = len(self._layout.params), len(self.buckets)
        kept, dropped, again = (torch.zeros(params, dtype=torch.uint8) for _ in range(3))
        late = torch.zeros(buckets, dtype=torch.uint8)
        nonzero = torch.zeros(1, dtype=torch.uint8)
        for number, bucket in enumerate(self.buckets):
            kept[list(bucket.round.first - bucket.round.dropped)] = 1
            dropped[list(bucket.round.dropped)] = 1
            again[list(bucket.round.again)] = 1
            late[number] = bucket.round.late
            if ask_nonzero and not nonzero:
                nonzero[0] = bucket.any_nonzero()
        failed = torch.tensor([error is not None], dtype=torch.uint8)
        parts = [kept, dropped, again, late, nonzero, failed, both_ends(digest)]
        message = torch.cat(parts)
        self._group.max_(message)
        kept, dropped, again, late, nonzero, failed, ends = message.split([part.numel() for part in parts])
        disputed = torch.nonzero(kept & dropped).flatten().tolist()
        if disputed and not failed:
            names = [self._layout.params[i].name for i in disputed]
            error = RuntimeError(
                f"the gradients of {names} were dropped on some ranks after backward and kept on others: every rank "
                "must do the same before step(); where ranks use different parameters, call synchronize_gradients() "
                "before zero_grad()"
            )
        if failed or disputed:
            self.finish_all()
            self.abandon()
            self._group.raise_together(error)
        present = torch.nonzero((kept | again) != 0).flatten().tolist()
        gone = set(torch.nonzero(dropped).flatten().tolist())
        verdict = Verdict(frozenset(present), bool(nonzero) if ask_nonzero else None, are_one(ends))
        return verdict, torch.nonzero(late).flatten().tolist(), gone

    def segment_grad(self, segment: Segment) -> Tensor:
        """The averaged gradient of `segment`, 1-D: a view of its bucket's mean."""
        return self.buckets[segment.bucket].mean[segment.shard_start : segment.shard_start + segment.numel]

    def grads(self, verdict: Verdict) -> list[Tensor]:
        """This rank's segments of the mean. Not whole slices: what lies between parameters must stay zero."""
        places = self._layout.segments(self._group.rank)
        return [self.segment_grad(place) for place in places if place.param in verdict.present and place.numel]

    def drop(self, set_to_none: bool) -> None:
        """The user has dropped all gradients through the optimizer, or made zeros of them."""
        for bucket in self.buckets:
            bucket.drop(set_to_none)

    def close_round(self) -> None:
        """A step has used the gradients: what is still there at the next backward is added to, as in torch."""
        self._next = 0
        for bucket in self.buckets:
            bucket.close()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it, backward accumulates on this rank and starts no reduction."""
        before, self._syncs = self._syncs, False
        try:
            yield
        finally:
            self._syncs = before

    def abandon(self) -> None:
        """Forget the round and what is under way; all gradients are None afterwards. Not a collective."""
        self._next = 0
        self._errors.clear()
        for bucket in self.buckets:
            bucket.abandon()


@dataclass(frozen=True, slots=True)
class _Hook:
    """A hook of one parameter that does nothing once the reducer is gone."""

    reducer: weakref.ref[GradientReducer]
    index: int
    act: Callable[[GradientReducer, int], None]

    def __call__(self, _: Tensor) -> None:
        reducer = self.reducer()
        if reducer is not None:
            self.act(reducer, self.index)
