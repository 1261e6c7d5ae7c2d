"""Every message between ranks: the only module of the engine that calls torch.distributed.

[Note: two groups] Gradients and parameters travel on a group of their own (`data`), everything else on another
(`control`, always gloo, so that a host decision never waits for a GPU stream). gloo matches the messages of a group in
the order in which they were sent: two kinds of traffic on one group gave wrong sums without an error when two ranks
interleaved them differently. Neither group is the caller's, so nothing that the training loop sends can come between.

[Note: exchange on gloo] gloo builds `reduce_scatter` from a whole all-reduce, and its `all_gather` allocates a second
output; together they cost four all-reduces and send half as much again as needed. Sending each rank its slice and
adding up what arrives costs one. The sum then has a fixed order, by rank, whatever the world size.
"""

from __future__ import annotations

import ctypes
import datetime
import functools
import json
import struct
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_adopt.sharding.scratch import Scratch

__all__ = ["Collectives", "Pending", "RankLost", "RanksDisagree"]


# [Note: one method at a time] A collective method that one rank calls and another does not would pair messages that
# have nothing to do with each other. So each names itself in `Collectives.about`, and every exchange of decisions
# carries the name. One that is short carries its data along.
_ABOUT_NBYTES, _SHORT_NBYTES = 56, 64


class RanksDisagree(ValueError):
    """The ranks were given different things where all must be given the same."""


class RankLost(RuntimeError):
    """Another rank has failed, left, or not come in time; the message says which, and with what."""


class Pending(Protocol):
    """An operation under way."""

    def wait(self) -> None:
        """Return when its result is in place; idempotent."""


class Collectives:
    """The messages of one set of ranks; a lone process is the ordinary case of one rank.

    `process_group` is where the ranks come from (default: all, if torch.distributed is initialised, else this process
    alone). Construction is a collective over it: two groups of the same ranks are made. `timeout` in seconds bounds
    every operation on them (default: that of torch.distributed).
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None, timeout: float | None = None) -> None:
        self.process_group = process_group
        # The method that this rank is in; see [Note: one method at a time].
        self.about = "construction"
        error: Exception | None = None
        if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or timeout <= 0):
            # Raised once there is a group to tell the other ranks on.
            error, timeout = ValueError(f"timeout must be a number of seconds above 0 or None, got {timeout!r}"), None
        self._timedelta = None if timeout is None else datetime.timedelta(seconds=timeout)
        self._data: dist.ProcessGroup | None = None
        self._control: dist.ProcessGroup | None = None
        self._abandoned: list[dist.ProcessGroup] = []
        self._scratch = Scratch()
        # Whether gradients are exchanged point to point. See [Note: exchange on gloo].
        self.exchanges = True
        if process_group is None and not (dist.is_available() and dist.is_initialized()):
            self.rank, self.world_size = 0, 1
            self.global_ranks = [0]
            self.raise_together(error)
            return
        self.rank = dist.get_rank(process_group)
        self.world_size = dist.get_world_size(process_group)
        if self.rank < 0:
            raise ValueError(f"this process (rank {dist.get_rank()}) is not a member of the process group it was given")
        self.global_ranks = dist.get_process_group_ranks(process_group or dist.group.WORLD)
        self._open()
        self.raise_together(error)

    def _open(self, patience: datetime.timedelta | None = None) -> None:
        if self.world_size == 1:
            return
        backend = dist.get_backend(self.process_group)
        self.exchanges = backend == "gloo"
        self._data = self._new_group(backend, "sharded_adopt data", patience)
        self._control = self._new_group("gloo", "sharded_adopt control", patience)

    def _new_group(self, backend: str, description: str, patience: datetime.timedelta | None) -> dist.ProcessGroup:
        make: Callable[..., dist.ProcessGroup] = functools.partial(dist.new_group, timeout=patience)
        if self.world_size == dist.get_world_size():
            group = make(self.global_ranks, backend=backend, group_desc=description)
        else:
            self._require_equal_group_counts()
            # Only the members call, and the others know nothing of it.
            group = make(self.global_ranks, backend=backend, group_desc=description, use_local_synchronization=True)
        if self._timedelta is not None:
            # Not at creation: ranks may come to it minutes apart, when one has loaded its data and another has not.
            dist.distributed_c10d._set_pg_timeout(self._timedelta, group)
        return group

    def _require_equal_group_counts(self) -> None:
        """torch names a group of some ranks after the number of groups that a rank is in: unequal ones never meet."""
        count = torch.tensor([len(dist.distributed_c10d._world.pg_names)])
        device = torch.device("cpu" if self.exchanges else "cuda")
        counts = [torch.empty_like(count, device=device) for _ in range(self.world_size)]
        dist.all_gather(counts, count.to(device), group=self.process_group)
        if len({int(one) for one in counts}) > 1:
            raise ValueError(
                f"the ranks of this process group are members of {[int(one) for one in counts]} groups, and torch "
                "cannot make a new group of such ranks: give every rank the same number of groups"
            )

    def reopen(self) -> None:
        """Replace both groups by new ones after an error: what was under way on the old ones is dropped. Collective."""
        # Not destroyed before close(): torch would give their names, and with them their old addresses, to the new
        # ones.
        self._abandoned += [group for group in (self._data, self._control) if group is not None]
        # One rank may come here at once and another when its own wait has ended.
        patience = None if self._timedelta is None else 2 * self._timedelta + datetime.timedelta(seconds=10)
        try:
            self._open(patience)
        except RuntimeError as error:
            raise self._without_word(error) from error

    def close(self) -> None:
        """Give all groups back; nothing can be sent afterwards. Not a collective."""
        for group in (self._data, self._control, *self._abandoned):
            if group is not None:
                dist.destroy_process_group(group)
        self._data = self._control = None
        self._abandoned.clear()

    # --- tensors of the size of a bucket ---------------------------------------------------------------------------

    def announce(self, numel: int, dtype: torch.dtype, device: torch.device, wire: torch.dtype | None) -> None:
        """Say that a buffer of this kind will travel in `wire` (default: its own dtype). Not a collective.

        What is borrowed for it is then large enough from the first, and never allocated anew.
        """
        if self.world_size == 1:
            return
        if wire is None or wire is dtype or dtype.is_complex:
            numel -= numel // self.world_size  # only what arrives: this rank's slice from every other
        self._scratch.announce(numel, dtype if wire is None or dtype.is_complex else wire, device)

    def reduce_scatter_mean_(
        self,
        buffer: Tensor,
        tag: int,
        dtype: torch.dtype | None = None,
        what: str = "gradients",
        out: Tensor | None = None,
    ) -> Pending:
        """Start to take the mean of this rank's slice of `buffer` over the ranks.

        It replaces that slice, or is written to the first elements of `out`; the rest of `buffer` is left as it is.
        `buffer`: 1-D, of the same size on every rank, cut into `world_size` equal slices, of which the last ones are
        shorter where it cannot be divided. They travel in `dtype` (default: the buffer's); the sum is taken in the
        order of the ranks, of 16-bit numbers in fp32, then divided and rounded once. `tag` tells messages of one kind
        apart; every rank must start the same operations in the same order. `buffer` must not change until `wait()` has
        returned.
        """
        own = self._slices(buffer)[self.rank]
        target = own if out is None else out[: own.numel()]
        if self.world_size == 1 or buffer.numel() == 0:
            target.copy_(own)
            return _DONE
        sent = self._cast(buffer, dtype)
        if self.exchanges:
            return _MeanOfSlices(self, target, sent, sent is not buffer, tag, what)
        # NCCL sums into its output, which may be a slice of its input.
        shard = target if sent is buffer else self._slices(sent)[self.rank]
        work = dist.reduce_scatter_tensor(shard, sent, op=dist.ReduceOp.AVG, group=self._data, async_op=True)
        works = _Works([(work, f"rank {self.rank} reduces {what}")], self._timedelta)
        return works if sent is buffer else _Copied(self, works, sent, [(target, shard)])

    def all_gather_(
        self, buffer: Tensor, tag: int, dtype: torch.dtype | None = None, what: str = "parameters"
    ) -> Pending:
        """Start to fill `buffer` (1-D, `world_size` equal slices) with every rank's own slice of it, in place.

        Slices travel in `dtype` (default: the buffer's), which must hold the values of this rank's slice exactly.
        """
        if self.world_size == 1 or buffer.numel() == 0:
            return _DONE
        wire = self._cast(buffer, dtype)
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        if self.exchanges:
            slices = self._slices(wire)
            works = _exchange(self, tag, what, lambda _: slices[self.rank], lambda rank: slices[rank])
        else:
            own = self._slices(wire)[self.rank]
            work = dist.all_gather_into_tensor(wire, own, group=self._data, async_op=True)
            works = _Works([(work, f"rank {self.rank} fetches {what}")], self._timedelta)
        if wire is buffer:
            return works
        return _Copied(self, works, wire, [(self._slices(buffer)[r], self._slices(wire)[r]) for r in others])

    def _cast(self, buffer: Tensor, dtype: torch.dtype | None) -> Tensor:
        """`buffer` itself, or a borrowed copy of it in `dtype`; for NCCL, padded to equal slices."""
        if dtype is None or buffer.is_complex():
            dtype = buffer.dtype
        padding = 0 if self.exchanges else -buffer.numel() % self.world_size
        if dtype is buffer.dtype and not padding:
            return buffer
        copy = self._scratch.take(buffer.numel() + padding, dtype, buffer.device)
        copy[buffer.numel() :].zero_()
        copy[: buffer.numel()].copy_(buffer)
        return copy

    def broadcast_(self, tensor: Tensor) -> None:
        """Overwrite `tensor` (of any dtype and strides) by that of the first rank."""
        if self.world_size == 1 or tensor.numel() == 0:
            return
        tensor = tensor.detach()
        flat = tensor.contiguous().view(-1)
        dist.broadcast(_as_bytes(flat), src=self.global_ranks[0], group=self._data)
        if flat.data_ptr() != tensor.data_ptr():
            tensor.copy_(flat.view(tensor.shape))

    def gather(self, tensor: Tensor, everywhere: bool) -> list[Tensor] | None:
        """Every rank's `tensor` (1-D, the same size everywhere), by rank; None off the first rank unless `everywhere`.

        The result is on the CPU unless there is one rank only.
        """
        if self.world_size == 1:
            return [tensor]
        local = tensor.detach().cpu().contiguous()
        found = [torch.empty_like(local) for _ in range(self.world_size)] if everywhere or self.rank == 0 else None
        views = None if found is None else [_as_bytes(one) for one in found]
        try:
            if everywhere:
                dist.all_gather(views or [], _as_bytes(local), group=self._control)
            else:
                dist.gather(_as_bytes(local), views, dst=self.global_ranks[0], group=self._control)
        except RuntimeError as error:
            raise self._without_word(error) from error
        return found

    # --- numbers ---------------------------------------------------------------------------------------------------

    def max_(self, tensor: Tensor) -> None:
        """Replace `tensor` (on the CPU) by its elementwise maximum over the ranks."""
        if self.world_size == 1:
            return
        try:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._control)
        except RuntimeError as error:
            raise self._without_word(error) from error

    def all_gather_number(self, number: float) -> list[float]:
        """Every rank's `number`, by rank."""
        return [struct.unpack("d", data)[0] for data in self.all_gather_bytes(struct.pack("d", number))]

    # --- plain data ------------------------------------------------------------------------------------------------

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """Every rank's `data`, by rank. Lengths may differ; nothing is pickled.

        Raises `RanksDisagree` on every rank where they are in different methods.
        """
        if self.world_size == 1:
            return [data]
        about = self.about.encode()[:_ABOUT_NBYTES].ljust(_ABOUT_NBYTES, b"\0")
        head = about + len(data).to_bytes(8, "little") + data[:_SHORT_NBYTES].ljust(_SHORT_NBYTES, b"\0")
        heads = self._all_gather_equal(head)
        places = [head[:_ABOUT_NBYTES].rstrip(b"\0").decode(errors="replace") for head in heads]
        for rank, place in enumerate(places):
            if place != places[0]:
                raise RanksDisagree(
                    f"rank 0 is in {places[0]} and rank {rank} in {place}: every rank must call the same methods in "
                    "the same order"
                )
        rest = [head[_ABOUT_NBYTES:] for head in heads]
        lengths = [int.from_bytes(one[:8], "little") for one in rest]
        longest = max(lengths)
        found = [one[8:] for one in rest] if longest <= _SHORT_NBYTES else self._all_gather_equal(data.ljust(longest))
        return [one[:length] for one, length in zip(found, lengths, strict=True)]

    def _all_gather_equal(self, data: bytes) -> list[bytes]:
        """Every rank's `data`, by rank; it must be of one length everywhere."""
        own = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        found = [torch.empty_like(own) for _ in range(self.world_size)]
        try:
            dist.all_gather(found, own, group=self._control)
        except RuntimeError as error:
            raise self._without_word(error) from error
        return [ctypes.string_at(one.data_ptr(), len(data)) for one in found]

    def _without_word(self, error: RuntimeError) -> RankLost:
        others = ", ".join(str(rank) for rank in range(self.world_size) if rank != self.rank)
        return _lost(f"rank {self.rank} is in {self.about} and waits for the word of rank {others}", error)

    def all_gather_json(self, value: Any) -> list[Any]:
        """Every rank's `value`, by rank; it must be JSON."""
        return [json.loads(data) for data in self.all_gather_bytes(json.dumps(value).encode())]

    def broadcast_bytes(self, data: bytes) -> bytes:
        """The first rank's `data`; what the others pass is ignored."""
        return self.all_gather_bytes(data if self.rank == 0 else b"")[0]

    def raise_together(
        self, error: BaseException | None, make: Callable[[dict[int, str]], Exception] | None = None
    ) -> None:
        """Raise on every rank if any rank has an `error`, so that none waits for one that has left.

        A rank with an error of its own raises that one. The others raise `make({rank: message})`, by default an
        exception of the failing rank's class where it is `ValueError` or `TypeError`, else `RuntimeError`, which names
        the ranks. Call it on every rank, with None where all went well.
        """
        report = None if error is None else [_kind(error), str(error)]
        failures = {r: one for r, one in enumerate(self.all_gather_json(report)) if one is not None}
        if not failures:
            return
        if error is not None:
            raise error
        if make is not None:
            raise make({rank: message for rank, (_, message) in failures.items()})
        kind, message = next(iter(failures.values()))
        ranks = ", ".join(str(rank) for rank in failures)
        raise _KINDS[kind](f"rank {ranks} failed: {message}")

    def _slices(self, buffer: Tensor) -> Sequence[Tensor]:
        """`buffer` cut into one slice for each rank, equal but for the last ones where it cannot be divided."""
        size = -(-buffer.numel() // self.world_size)
        return [buffer[rank * size : (rank + 1) * size] for rank in range(self.world_size)]


_KINDS: dict[str, type[Exception]] = {
    "RanksDisagree": RanksDisagree,
    "ValueError": ValueError,
    "TypeError": TypeError,
    "NotImplementedError": NotImplementedError,
    "RuntimeError": RuntimeError,
}


def _kind(error: BaseException) -> str:
    return next((name for name, kind in _KINDS.items() if isinstance(error, kind)), "RuntimeError")


def _as_bytes(tensor: Tensor) -> Tensor:
    # gloo sends no bool and no int16; bytes it always sends.
    return tensor.view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)


class _Works:
    """torch's handles of operations under way, each with what an error must say of it."""

    def __init__(self, works: list[tuple[Any, str]], timeout: datetime.timedelta | None) -> None:
        self._works = works
        self._timeout = timeout

    def wait(self) -> None:
        while self._works:
            work, what = self._works[-1]
            try:
                # Said here: gloo's point-to-point messages do not know of a timeout that was set after their group was
                # made.
                work.wait() if self._timeout is None else work.wait(self._timeout)
            except RuntimeError as error:
                raise _lost(what, error) from error
            self._works.pop()


def _lost(what: str, error: RuntimeError) -> RankLost:
    return RankLost(
        f"{what}: {str(error).splitlines()[0]}\nIt has failed, left or not come here in time: see its own error. Once "
        "every rank has caught one, reset() lets training go on."
    )


_DONE = _Works([], None)


def _exchange(
    group: Collectives, tag: int, what: str, sent: Callable[[int], Tensor], received: Callable[[int], Tensor]
) -> _Works:
    """Send `sent(rank)` to every other rank and receive `received(rank)` from it. See [Note: exchange on gloo].

    Every rank starts with its right neighbour, so that no rank is everybody's first.
    """
    works: list[tuple[Any, str]] = []
    size, own = group.world_size, group.rank
    for distance in range(1, size):
        target, source = (own + distance) % size, (own - distance) % size
        for start, tensor, other, told in (
            (dist.irecv, received(source), source, f"rank {own} waits for {what} from rank {source}"),
            (dist.isend, sent(target), target, f"rank {own} has {what} for rank {target}"),
        ):
            if tensor.numel() == 0:
                continue  # the last slices may be empty: the ranks at both ends know it
            try:
                works.append((start(tensor, group.global_ranks[other], group=group._data, tag=tag), told))
            except RuntimeError as error:
                raise _lost(told, error) from error
    return _Works(works, group._timedelta)


class _Copied:
    """An operation whose results are copied to where they belong: pairs of target and source.

    `borrowed` goes back when they are.
    """

    def __init__(
        self, group: Collectives, works: _Works, borrowed: Tensor | None, pairs: list[tuple[Tensor, Tensor]]
    ) -> None:
        self._scratch = group._scratch
        self._works = works
        self._pairs = pairs
        self._borrowed = borrowed

    def wait(self) -> None:
        self._works.wait()
        for target, source in self._pairs:
            target.copy_(source[: target.numel()])
        self._pairs.clear()
        if self._borrowed is not None:
            self._scratch.give_back(self._borrowed)
            self._borrowed = None


# A quarter of a MiB of fp32, so that a piece of each of two ranks fits a core's own cache.
_PIECE_NUMEL = 1 << 16


class _MeanOfSlices:
    """A reduce-scatter by exchange: what the others send is kept aside until all is there, then added by rank."""

    def __init__(
        self, group: Collectives, target: Tensor, sent: Tensor, is_borrowed: bool, tag: int, what: str
    ) -> None:
        self._rank, self._world_size, self._scratch = group.rank, group.world_size, group._scratch
        self._target = target
        self._sent, self._is_borrowed = sent, is_borrowed
        slices, numel = group._slices(sent), target.numel()
        self._arrived: Tensor | None = self._scratch.take((group.world_size - 1) * numel, sent.dtype, sent.device)
        # Row of a rank: its number, with this rank's own left out.
        rows = self._arrived.view(group.world_size - 1, numel).unbind(0)
        self._parts = [*rows[: group.rank], slices[group.rank], *rows[group.rank :]]
        self._works = _exchange(group, tag, what, lambda rank: slices[rank], lambda rank: self._parts[rank])

    def wait(self) -> None:
        if self._arrived is None:
            return
        self._works.wait()
        # Piece by piece, so that a sum is divided while it is still in the cache.
        split = (part.split(_PIECE_NUMEL) for part in (self._target, *self._parts))
        for target, *pieces in zip(*split, strict=True):
            # Added into a piece that has arrived: no further memory, but for 16-bit numbers, and what was sent stays.
            first, second, *others = pieces
            if first.itemsize == 2:
                total = first.float().add_(second)
            else:
                total = torch.add(first, second, out=second if self._rank == 0 else first)
            for piece in others:
                total += piece
            if total.dtype is target.dtype:
                torch.div(total, self._world_size, out=target)
            else:
                target.copy_(total.div_(self._world_size))
        self._scratch.give_back(self._arrived)
        if self._is_borrowed:
            self._scratch.give_back(self._sent)
        self._arrived = None
