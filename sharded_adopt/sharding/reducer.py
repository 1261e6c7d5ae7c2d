"""When gradients move: from `param.grad` into buckets, from buckets to their owners.

[Note: a round] The gradients between two steps are a *round*. In a round every bucket is reduced once, in the order of
its index: from a hook when it and all earlier ones are full, the rest when the gradients are synchronised. One exchange
then tells every rank which parameters had a gradient anywhere and what went differently somewhere.

[Note: param.grad is the truth] A user may set, replace or drop `param.grad` at any time. Where it is the view of its
bucket, its values are in place; a new backward adds to it. Where it is another tensor, that is the gradient, and what
the bucket held is dropped. Where it is None, there is none. This also holds once the bucket has been reduced: the mean
in this rank's segment is then *carried*, that is, put aside before anything is added to the bucket, the bucket is
reduced again with what came late, and the carried mean is added to the result.

[Note: errors in a round] What a user did wrong is kept, not raised, until the exchange: a rank that left backward or
the reductions early would leave the others waiting. The exchange makes every rank raise. An error of the connection is
raised at once, because the others get one too.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sharded_adopt.sharding.buckets import BucketBuffer
from sharded_adopt.sharding.collectives import Collectives, Pending
from sharded_adopt.sharding.gradients import Verdict, sparse_gradient
from sharded_adopt.sharding.layout import Layout, ParamSpec, Placement, Segment

# A bucket in flight holds what the other ranks sent until it is added up: this bounds that memory.
MAX_BUCKETS_IN_FLIGHT = 2


@dataclass(slots=True)
class _Round:
    """What happened to one bucket since the last step."""

    launched: bool = False
    ready: set[int] = field(default_factory=set)  # had their hook in a backward that synchronises
    first: set[int] = field(default_factory=set)  # had a gradient when the bucket was launched
    dropped: set[int] = field(default_factory=set)  # of those: dropped or replaced by the user since
    again: set[int] = field(default_factory=set)  # got a gradient since
    late: bool = False  # has to be reduced again


class _BucketReduction:
    """One bucket's gradients through one round after another."""

    def __init__(
        self,
        buffer: BucketBuffer,
        params: Sequence[Tensor],
        specs: Sequence[ParamSpec],
        errors: list[Exception],
    ) -> None:
        self.buffer = buffer
        self._errors = errors
        self.params = {p.param: params[p.param] for p in buffer.bucket.placements}
        self.specs = specs
        self.views: dict[int, Tensor] = {}
        self.placements: dict[int, Placement] = {}
        for placement in buffer.bucket.placements:
            self.placements[placement.param] = placement
            self.views[placement.param] = buffer.grad_view(placement, params[placement.param])
        self.carry: Tensor | None = None  # 1D, shard_numel
        self.holds_step = False  # what is in the buffer was used by a step already
        self.pending: Pending | None = None
        self.version = 0
        self.round = _Round()

    @property
    def grads(self) -> Tensor:
        """The flat gradients, 1-D."""
        assert self.buffer.grads is not None
        return self.buffer.grads

    def is_full(self) -> bool:
        return all(i in self.round.ready or not p.requires_grad for i, p in self.params.items())

    def before_accumulation(self) -> None:
        """Autograd is about to add to `param.grad`: save what must not be added to."""
        if self.round.launched:
            self.reopen()
        elif self.holds_step:
            self.reuse()

    def collect(self, index: int) -> bool:
        """Move `param.grad` into the bucket if it is not there yet; return whether there is one."""
        grad = self.params[index].grad
        if grad is None:
            return False
        view = self.views[index]
        if grad.layout is not torch.strided:
            self._errors.append(sparse_gradient(self.specs[index].name, grad))
            return False
        if grad.dtype is not view.dtype or grad.device != view.device or grad.shape != view.shape:
            # The parameter was cast or moved; its values are checked, and the error raised, before the next step.
            return False
        if not _same_memory(grad, view):
            if not self.round.launched:
                self.forget_carried([index])
            view.copy_(grad.detach())
            self.params[index].grad = view
        return True

    def reuse(self) -> None:
        """Begin a round in a buffer that a step has used: keep only the gradients that the user left in place."""
        self.holds_step = False
        left = [i for i, p in self.params.items() if p.grad is not None and _same_memory(p.grad, self.views[i])]
        if left:
            self.put_aside([i for i in self.params if i not in left])

    def put_aside(self, without: Sequence[int]) -> None:
        """Carry this rank's segment, except of the parameters `without`, and zero the bucket."""
        own = self.grads[self.buffer.shard]
        self.carry = own.clone()
        self.forget_carried(without)
        self.grads.zero_()

    def forget_carried(self, indices: Sequence[int]) -> None:
        """Take the parameters `indices` out of the carried mean."""
        if self.carry is None:
            return
        start, stop = self.buffer.shard.start, self.buffer.shard.stop
        for index in indices:
            placement = self.placements[index]
            low, high = max(start, placement.start), min(stop, placement.start + placement.numel)
            if low < high:
                self.carry[low - start : high - start].zero_()

    def launch(self, group: Collectives) -> None:
        """Start to reduce the bucket with what it holds; parameters without a gradient count as zero."""
        if self.holds_step:
            self.reuse()
        for index, view in self.views.items():
            if self.collect(index):
                self.round.first.add(index)
            else:
                self.forget_carried([index])
                view.zero_()
        self.start(group, again=False)

    def start(self, group: Collectives, again: bool) -> None:
        self.round.launched = True
        self.pending = group.reduce_scatter_mean_(self.grads, tag=2 * self.buffer.index + again)
        self.version = self.grads._version

    def finish(self) -> None:
        """Wait for the mean and add what was carried."""
        if self.pending is None:
            return
        edited = self.version != self.grads._version
        self.pending.wait()
        self.pending = None
        if self.carry is not None:
            self.grads[self.buffer.shard].add_(self.carry)
            self.carry = None
        if edited:
            names = [self.specs[i].name for i in self.params]
            self._errors.append(
                RuntimeError(
                    f"a gradient of {names} was changed in place while its bucket was being reduced: call "
                    "synchronize_gradients() before editing gradients, or construct with overlap_grad_reduce=False"
                )
            )

    def reopen(self) -> None:
        """Make the launched bucket ready to take more. What it held stays as the carried mean."""
        self.finish()
        if not self.round.late:
            self.round.late = True
            self.put_aside(())
        self.note_dropped()

    def note_dropped(self) -> None:
        """See what the user has done to `param.grad` since the bucket was launched."""
        for index in [i for i in self.round.again if self.params[i].grad is None]:
            self.round.again.discard(index)
            self.views[index].zero_()
        for index in self.round.first - self.round.dropped - self.round.again:
            grad = self.params[index].grad
            if grad is None or not _same_memory(grad, self.views[index]):
                self.round.dropped.add(index)

    def collect_late(self) -> None:
        """Take in what the user assigned after the bucket was launched, and note what was dropped."""
        self.note_dropped()
        for index, param in self.params.items():
            if param.grad is not None and not _same_memory(param.grad, self.views[index]):
                self.reopen()
                if self.collect(index):
                    self.round.again.add(index)

    def reduce_late(self, group: Collectives, dropped: set[int]) -> None:
        """Reduce the bucket again with what came after its launch; on ranks where nothing came, with zeros."""
        if not self.round.late:
            self.put_aside(())
        self.forget_carried([i for i in self.params if i in dropped])
        self.start(group, again=True)
        self.finish()
        # The round goes on as if what came late had been there from the first.
        self.round = _Round(launched=True, ready=self.round.ready)

    def point_grads(self, present: frozenset[int]) -> None:
        """Make `param.grad` the view of the bucket for the parameters in `present`, None for the others."""
        self.round.first = {index for index in self.params if index in present}
        for index, param in self.params.items():
            grad = self.views[index] if index in present else None
            if param.grad is not grad:
                param.grad = grad

    def any_nonzero(self) -> bool:
        """Whether this rank sees a gradient other than zero; read on the host."""
        if self.carry is not None:
            return bool(self.carry.any()) or bool(self.grads.any())
        return bool(self.grads[self.buffer.shard].any())

    def close(self) -> None:
        self.round = _Round()
        self.carry = None
        self.holds_step = True


class GradientReducer:
    """Averages gradients over the ranks, bucket by bucket, while backward runs. See [Note: a round].

    `overlap=False` leaves every reduction to `synchronize`.
    """

    def __init__(self, group: Collectives, overlap: bool) -> None:
        self._group = group
        self._overlap = overlap
        self._syncs = True
        self._layout = Layout(group.world_size, (), ())
        self._buckets: list[_BucketReduction] = []
        self._of_param: dict[int, _BucketReduction] = {}
        self._hooked: set[int] = set()
        self._next = 0  # the first bucket that is not launched in this round
        self._errors: list[Exception] = []  # see [Note: errors in a round]

    def add(self, layout: Layout, params: Sequence[Tensor], buffers: Sequence[BucketBuffer]) -> None:
        """Take over the parameters and buckets that came behind the known ones. Not within a round."""
        self._layout = layout
        for buffer in buffers[len(self._buckets) :]:
            bucket = _BucketReduction(buffer, params, layout.params, self._errors)
            self._buckets.append(bucket)
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
        if bucket.collect(index) and bucket.round.launched:
            bucket.round.again.add(index)
        if not self._syncs:
            return
        bucket.round.ready.add(index)
        if self._overlap:
            self._launch_full()

    def _launch_full(self) -> None:
        while self._next < len(self._buckets) and self._buckets[self._next].is_full():
            self._launch_next()

    def _launch_next(self) -> None:
        if self._next >= MAX_BUCKETS_IN_FLIGHT:
            self._buckets[self._next - MAX_BUCKETS_IN_FLIGHT].finish()
        self._buckets[self._next].launch(self._group)
        self._next += 1

    def synchronize(self, ask_nonzero: bool, problem: Exception | None) -> Verdict:
        """Reduce what is not reduced yet and agree on the round.

        Afterwards this rank's segment of every bucket holds the mean, and `param.grad` is the view of its bucket where
        any rank had a gradient, else None.

        Raises on every rank: `TypeError` for a sparse gradient, `RuntimeError` where a gradient was edited while it was
        being reduced or dropped on some ranks only.
        """
        if problem is not None:
            self._errors.insert(0, problem)
        while self._next < len(self._buckets):
            self._launch_next()
        for bucket in self._buckets:
            bucket.finish()
            bucket.collect_late()
        verdict, late, dropped = self._agree(ask_nonzero)
        for index in late:
            self._buckets[index].reduce_late(self._group, dropped)
        for bucket in self._buckets:
            bucket.point_grads(verdict.present)
        self._watch()
        return verdict

    def _agree(self, ask_nonzero: bool) -> tuple[Verdict, list[int], set[int]]:
        """The one exchange of a round. Returns the verdict, the buckets to reduce again, and the dropped parameters."""
        error = self._errors[0] if self._errors else None
        params, buckets = len(self._layout.params), len(self._buckets)
        kept, dropped, again = (torch.zeros(params, dtype=torch.uint8) for _ in range(3))
        late = torch.zeros(buckets, dtype=torch.uint8)
        nonzero = torch.zeros(1, dtype=torch.uint8)
        for number, bucket in enumerate(self._buckets):
            kept[list(bucket.round.first - bucket.round.dropped)] = 1
            dropped[list(bucket.round.dropped)] = 1
            again[list(bucket.round.again)] = 1
            late[number] = bucket.round.late
            if ask_nonzero and not nonzero:
                carried = bucket.carry is not None and bool(bucket.carry.any())
                nonzero[0] = carried or bool(
                    (bucket.grads if late[number] else bucket.grads[bucket.buffer.shard]).any()
                )
        failed = torch.tensor([error is not None], dtype=torch.uint8)
        message = torch.cat([kept, dropped, again, late, nonzero, failed])
        self._group.max_(message)
        kept, dropped, again, late, nonzero, failed = message.split([params, params, params, buckets, 1, 1])
        disputed = torch.nonzero(kept & dropped).flatten().tolist()
        if disputed and not failed:
            names = [self._layout.params[i].name for i in disputed]
            error = RuntimeError(
                f"the gradients of {names} were dropped on some ranks after backward and kept on others: every rank "
                "must do the same before step()"
            )
        if failed or disputed:
            self.abandon()
            self._group.raise_together(error)
        present = torch.nonzero((kept | again) != 0).flatten().tolist()
        gone = set(torch.nonzero(dropped).flatten().tolist())
        verdict = Verdict(frozenset(present), bool(nonzero) if ask_nonzero else None)
        return verdict, torch.nonzero(late).flatten().tolist(), gone

    def segment_grad(self, segment: Segment) -> Tensor:
        """The averaged gradient of `segment`, 1-D: the view of its bucket."""
        buffer = self._buckets[segment.bucket].buffer
        return buffer.segment(self._buckets[segment.bucket].grads, segment)

    def grads(self, verdict: Verdict) -> list[Tensor]:
        """This rank's slice of every bucket: the rest of a bucket is unspecified."""
        return [bucket.grads[bucket.buffer.shard] for bucket in self._buckets]

    def close_round(self) -> None:
        """A step has used the gradients: what is still there at the next backward is added to, as in torch."""
        self._next = 0
        for bucket in self._buckets:
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
        self.close_round()
        self._errors.clear()
        for bucket in self._buckets:
            bucket.pending = None
            bucket.holds_step = False
            for param in bucket.params.values():
                param.grad = None


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


def _same_memory(a: Tensor, b: Tensor) -> bool:
    # Not the whole truth for strides of a dimension of size 1, but those never differ with equal addresses here.
    return a is b or (a.layout is torch.strided and a.data_ptr() == b.data_ptr() and a.stride() == b.stride())
