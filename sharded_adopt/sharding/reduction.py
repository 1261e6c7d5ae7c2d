"""One bucket's gradients through one round after another.

[Note: param.grad is the truth] A user may set, replace or drop `param.grad` at any time. Where it is the view of its
bucket, its values are in place; a new backward adds to it. Where it is another tensor, that is the gradient, and what
the bucket held is dropped. Where it is None, there is none. This also holds once the bucket has been reduced: the mean
in this rank's segment is then *carried*, that is, put aside before anything is added to the bucket, the bucket is
reduced again with what came late, and the carried mean is added to the result.

[Note: kept and freed gradients] Kept (ZeRO-1), every bucket has a flat buffer for ever, `param.grad` is a view of it,
and the mean replaces this rank's slice. Freed (ZeRO-2), a bucket borrows a buffer from its first gradient until it is
reduced, `param.grad` is None from then on, and the mean has memory of its own. There what the user drops can only be
seen in the optimizer's `zero_grad`. A bucket of one parameter borrows nothing: the memory of `param.grad` itself is
sent, and only read. So a large parameter costs its gradient once, and all buffers are at most a bucket's cap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sharded_adopt.sharding.buckets import BucketBuffer
from sharded_adopt.sharding.collectives import Collectives, Pending
from sharded_adopt.sharding.gradients import sparse_gradient
from sharded_adopt.sharding.layout import ParamSpec, Placement
from sharded_adopt.sharding.scratch import Scratch


@dataclass(slots=True)
class _Round:
    """What happened to one bucket since the last step."""

    launched: bool = False
    ready: set[int] = field(default_factory=set)  # had their hook in a backward that synchronises
    taken: set[int] = field(default_factory=set)  # moved out of `param.grad` before the launch (freed gradients)
    first: set[int] = field(default_factory=set)  # had a gradient when the bucket was launched
    dropped: set[int] = field(default_factory=set)  # of those: dropped or replaced by the user since
    again: set[int] = field(default_factory=set)  # got a gradient since
    late: bool = False  # has to be reduced again
    full_up_to: int = 0  # so many parameters, in the bucket's order, were seen to be ready or frozen


class BucketReduction:
    """One bucket's gradients through one round after another. See [Note: kept and freed gradients].

    `flat`: 1-D, padded_numel elements, what is to be reduced; None while freed. `mean`: 1-D, shard_numel elements, this
    rank's slice of the result. `carry`: like `mean`, what is to be added to the next result, or None.
    """

    def __init__(
        self,
        buffer: BucketBuffer,
        params: Sequence[Tensor],
        specs: Sequence[ParamSpec],
        errors: list[Exception],
        scratch: Scratch,
        wire_dtype: torch.dtype | None,
    ) -> None:
        self.buffer = buffer
        self._wire_dtype = wire_dtype
        self.keeps = buffer.grads is not None
        self.specs = specs
        self.params = {p.param: params[p.param] for p in buffer.bucket.placements}
        self.placements: dict[int, Placement] = {p.param: p for p in buffer.bucket.placements}
        self._order = tuple(self.params)
        # As they were bound: until the next step a parameter may have others.
        self._strides = {p.param: params[p.param].stride() for p in buffer.bucket.placements}
        self._errors = errors
        self._scratch = scratch
        self._is_alone = len(buffer.bucket.placements) == 1
        self.views: dict[int, Tensor] = {}
        self.flat: Tensor | None = None
        self.carry: Tensor | None = None
        self.pending: Pending | None = None
        self.version = 0
        self.holds_step = False  # what is in the kept buffer was used by a step already
        self.round = _Round()
        self.had: set[int] = set()  # freed gradients: had one that the last step has used
        self.zeroed: set[int] = set()  # freed gradients: the user has made a zero of it
        if buffer.grads is not None:
            self._use(buffer.grads)
            self.mean = buffer.grads[buffer.shard]
        else:
            self.mean = buffer.params.new_zeros(buffer.bucket.shard_numel)

    def _use(self, flat: Tensor) -> Tensor:
        self.flat = flat
        for index, placement in self.placements.items():
            start = flat.storage_offset() + placement.start
            self.views[index] = flat.as_strided(self.specs[index].shape, self._strides[index], start)
        return flat

    def opened(self) -> Tensor:
        """The flat buffer, borrowed where none is held.

        That is zero where no parameter is. Where one is, `launch` writes; what is reduced again starts from zeros.
        """
        if self.flat is not None:
            return self.flat
        like, bucket = self.buffer.params, self.buffer.bucket
        if self._is_alone:
            # As long as the gradient that other ranks may have instead.
            flat = like.new_empty(bucket.numel)
        else:
            flat = self._scratch.take(bucket.padded_numel, like.dtype, like.device)
        for start, stop in [(0, bucket.padded_numel)] if self.round.late else bucket.gaps():
            flat[start:stop].zero_()
        return self._use(flat)

    def _free(self) -> None:
        if not self.keeps and self.flat is not None:
            if not self._is_alone:
                self._scratch.give_back(self.flat)
            self.flat = None
            self.views.clear()

    def is_full(self) -> bool:
        """Whether every parameter that can have a gradient has had its hook."""
        # Asked after every hook: it goes on where it stopped, so that thousands of parameters do not cost their square.
        while self.round.full_up_to < len(self._order):
            index = self._order[self.round.full_up_to]
            if index not in self.round.ready and self.params[index].requires_grad:
                return False
            self.round.full_up_to += 1
        return True

    # --- from param.grad into the bucket ---------------------------------------------------------------------------

    def before_accumulation(self) -> None:
        """Autograd is about to add to `param.grad`: where that is the kept buffer, save what must not be added to."""
        if not self.keeps:
            return
        if self.round.launched:
            self.reopen()
        elif self.holds_step:
            self.reuse()

    def after_accumulation(self, index: int, is_last: bool) -> None:
        """Autograd has added to `param.grad`. `is_last`: nothing else is expected of it in this round."""
        if self.keeps:
            if self.collect(index) and self.round.launched:
                self.round.again.add(index)
        elif is_last and not self.round.launched:
            self.collect(index)
        # Otherwise freed gradients wait in `param.grad`, where autograd adds to them.

    def _fits(self, index: int, grad: Tensor) -> bool:
        """Whether the bucket can take a gradient; a sparse one is an error of this round."""
        spec, like = self.specs[index], self.buffer.params
        if grad.layout is not torch.strided:
            self._errors.append(sparse_gradient(spec.name, grad))
            return False
        # Otherwise the parameter was cast or moved; its values are checked, and the error raised, before the next step.
        return grad.dtype is like.dtype and grad.device == like.device and tuple(grad.shape) == spec.shape

    def collect(self, index: int) -> bool:
        """Move `param.grad` into the bucket if it is not there yet; return whether there is a gradient."""
        param = self.params[index]
        grad = param.grad
        if grad is None:
            return index in self.round.taken
        if not self._fits(index, grad):
            return False
        if self.flat is None and self._can_be_sent(grad, index):
            self._use(grad.detach().as_strided((grad.numel(),), (1,)))
            self.round.taken.add(index)
            param.grad = None
            return True
        self.opened()
        if not self.keeps:
            view = self.views[index]
            view.add_(grad.detach()) if index in self.round.taken else view.copy_(grad.detach())
            self.round.taken.add(index)
            param.grad = None
        elif not self._is_in_place(index):
            if not self.round.launched:
                self.forget_carried([index])
            self.views[index].copy_(grad.detach())
            self._hand_out(index)
        return True

    def _can_be_sent(self, grad: Tensor, index: int) -> bool:
        """Whether a freed bucket is this gradient and nothing else, in the order of the parameter's elements."""
        return self._is_alone and grad.stride() == self._strides[index] and not (grad.is_conj() or grad.is_neg())

    def _is_in_place(self, index: int) -> bool:
        """Whether `param.grad` is the view of the kept buffer."""
        grad, view = self.params[index].grad, self.views.get(index)
        return grad is not None and view is not None and _same_memory(grad, view)

    def _hand_out(self, index: int) -> None:
        """Make `param.grad` a view of the kept buffer: one of its own, for casting a model gives it other memory."""
        self.params[index].grad = self.views[index].detach()

    def reuse(self) -> None:
        """Begin a round in a buffer that a step has used: keep only the gradients that the user left in place."""
        self.holds_step = False
        left = [i for i, p in self.params.items() if p.grad is not None and self._is_in_place(i)]
        if left:
            self.put_aside([i for i in self.params if i not in left])

    # --- the mean that is there already ----------------------------------------------------------------------------

    def put_aside(self, without: Sequence[int]) -> None:
        """Carry the mean, except of the parameters `without`, and empty the bucket."""
        self.carry = self.mean.clone()
        self.forget_carried(without)
        if self.flat is not None:
            self.flat.zero_()

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

    def reopen(self) -> None:
        """Make the launched, kept bucket ready to take more. What it held stays as the carried mean."""
        self.finish()
        if not self.round.late:
            self.round.late = True
            self.put_aside(())
        self.note_dropped()

    # --- reduction -------------------------------------------------------------------------------------------------

    def launch(self, group: Collectives) -> None:
        """Start to reduce the bucket with what it holds; parameters without a gradient count as zero."""
        if self.holds_step:
            self.reuse()
        self.round.first.update(index for index in self.params if self.collect(index))
        absent = [index for index in self.params if index not in self.round.first]
        self.forget_carried(absent)
        self.opened()
        for index in absent:
            self.views[index].zero_()
        self.round.first |= self.zeroed
        self.start(group, again=False)

    def start(self, group: Collectives, again: bool) -> None:
        """Send what the bucket holds; `again` tells the second time in a round from the first."""
        flat = self.opened()
        self.round.launched = True
        tag, what = 2 * self.buffer.index + again, f"the gradients of bucket {self.buffer.index}"
        out = None if self.keeps else self.mean
        self.pending = group.reduce_scatter_mean_(flat, tag, self._wire_dtype, what, out)
        self.version = flat._version

    def check_untouched(self) -> None:
        """See whether somebody wrote to the bucket while it was on its way."""
        if self.pending is None or self.flat is None or self.flat._version == self.version:
            return
        self.version = self.flat._version
        names = [self.specs[i].name for i in self.params]
        self._errors.append(
            RuntimeError(
                f"a gradient of {names} was changed in place while its bucket was being reduced. To clip, use this "
                "optimizer's clip_grad_norm_, not torch's; to edit otherwise, call synchronize_gradients() first: only "
                "this rank's segment is then the mean. If DistributedDataParallel is around the model, it averages the "
                "same gradients: train its .module instead, or make this optimizer with reduce_gradients=False"
            )
        )

    def finish(self) -> None:
        """Wait for the mean and add what was carried."""
        if self.pending is None:
            return
        self.check_untouched()
        self.pending.wait()
        self.pending = None
        self._free()
        if self.carry is not None:
            self.mean.add_(self.carry)
            self.carry = None

    def note_dropped(self) -> None:
        """See what the user has done to `param.grad` since the bucket was launched."""
        if not self.keeps:
            return
        for index in [i for i in self.round.again if self.params[i].grad is None]:
            self.round.again.discard(index)
            self.views[index].zero_()
        for index in self.round.first - self.round.dropped - self.round.again:
            if self.params[index].grad is None or not self._is_in_place(index):
                self.round.dropped.add(index)

    def collect_late(self) -> None:
        """Take in what came or was assigned after the bucket was launched, and note what was dropped.

        Where gradients are freed they stay in `param.grad` until the bucket's turn comes: one buffer is then enough.
        """
        self.note_dropped()
        for index, param in self.params.items():
            if param.grad is None or (self.keeps and self._is_in_place(index)):
                continue
            if not self.keeps:
                if self._fits(index, param.grad):
                    self.round.late = True
                    self.round.again.add(index)
                continue
            self.reopen()
            if self.collect(index):
                self.round.again.add(index)

    def reduce_late(self, group: Collectives, dropped: set[int]) -> None:
        """Reduce the bucket again with what came after its launch; on ranks where nothing came, with zeros."""
        self.finish()
        if not (self.keeps and self.round.late):
            self.round.late = True
            self.put_aside(())
        self.forget_carried([i for i in self.params if i in dropped])
        if not self.keeps:
            self.round.taken.clear()
            for index in self.round.again:
                self.collect(index)
        self.start(group, again=True)
        self.finish()
        # The round goes on as if what came late had been there from the first.
        self.round = _Round(launched=True, ready=self.round.ready)

    def point_grads(self, present: frozenset[int]) -> None:
        """Make `param.grad` the view of the kept buffer for the parameters in `present`, and None for all others."""
        self.round.first = {index for index in self.params if index in present}
        for index, param in self.params.items():
            if not self.keeps or index not in present:
                param.grad = None
            elif not self._is_in_place(index):
                self._hand_out(index)

    def any_nonzero(self) -> bool:
        """Whether this rank sees a gradient other than zero; read on the host, once the bucket is finished."""
        parts = [self.mean] if self.carry is None else [self.carry, self.opened()]
        late = [] if self.keeps else [self.params[index].grad for index in self.round.again]
        return any(bool(part.any()) for part in (*parts, *late) if part is not None)

    def drop(self, set_to_none: bool) -> None:
        """The user has dropped all gradients: forget those that are not in `param.grad` any more.

        Made zeros instead, they stay gradients, as torch's do: those that a step has used, and those of this round.
        """
        if self.keeps:
            return
        self.zeroed = set() if set_to_none else self.zeroed | self.had | self.round.first | self.round.taken
        self.round.dropped |= self.round.first
        self.round.taken.clear()
        if not self.round.launched:
            self._free()

    def close(self) -> None:
        """A step has used the round's gradients."""
        self.had, self.zeroed = self.round.first - self.round.dropped, set()
        self.round = _Round()
        self.carry = None
        self.holds_step = self.keeps

    def abandon(self) -> None:
        """Forget the round and what is under way."""
        self.close()
        self.pending = None
        self.holds_step = False
        self.flat = self.flat if self.keeps else None  # not given back: a message may still write into it
        for param in self.params.values():
            param.grad = None


def _same_memory(a: Tensor, b: Tensor) -> bool:
    # Not the whole truth for strides of a dimension of size 1, but those never differ with equal addresses here.
    return a.layout is torch.strided and a.data_ptr() == b.data_ptr() and a.stride() == b.stride()
