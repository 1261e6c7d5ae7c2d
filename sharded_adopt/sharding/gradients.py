"""Where the averaged gradient comes from, as the optimizer sees it, and the source that only reads `param.grad`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sharded_adopt.sharding.buckets import BucketBuffer, flatten_in_memory_order
from sharded_adopt.sharding.collectives import Collectives
from sharded_adopt.sharding.layout import Layout, ParamSpec, Segment


@dataclass(frozen=True, slots=True)
class Verdict:
    """What all ranks know of a round after the exchange: equal on every rank.

    `present`: the indices of the parameters that had a gradient on some rank. `any_nonzero`: whether some element of
    some gradient was not zero; None where nobody asked. `digests_agree`: whether all ranks gave the same digest.
    """

    present: frozenset[int]
    any_nonzero: bool | None
    digests_agree: bool


class GradientSource(Protocol):
    """Where the optimizer gets this rank's part of the averaged gradient from."""

    def agree(self, ask_nonzero: bool, problem: Exception | None, digest: bytes) -> Verdict:
        """Start what is not reduced yet and agree on the round. Collective.

        `problem` is what this rank found wrong before; every rank then raises. `digest`: a few bytes that should be the
        same on all ranks. A bucket's gradients are final only once it is finished.
        """

    def finish(self, bucket: int) -> None:
        """Wait for the averaged gradients of a bucket. After `agree`."""

    def finish_all(self) -> None:
        """Wait for all of them."""

    def segment_grad(self, segment: Segment) -> Tensor:
        """The averaged gradient of `segment`: 1-D, a view, valid once its bucket is finished if it is present."""

    def grads(self, verdict: Verdict) -> list[Tensor]:
        """The tensors on this rank that a factor must multiply to scale the gradient."""

    def drop(self, set_to_none: bool) -> None:
        """The user has set every `param.grad` to None, or to zero."""

    def close_round(self) -> None:
        """A step has used the gradients."""

    def add(self, layout: Layout, params: Sequence[Tensor], buffers: Sequence[BucketBuffer]) -> None:
        """Take over the parameters and buckets that came behind the known ones."""

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Within it, backward only accumulates on this rank."""

    def abandon(self) -> None:
        """Forget the round and what is under way; not a collective."""


class GivenGradients:
    """Gradients that somebody else has averaged already (DDP): every rank holds all of them in `param.grad`."""

    def __init__(self, group: Collectives) -> None:
        self._group = group
        self._params: Sequence[Tensor] = ()
        self._specs: Sequence[ParamSpec] = ()
        self._segments: tuple[Segment, ...] = ()

    def add(self, layout: Layout, params: Sequence[Tensor], buffers: Sequence[BucketBuffer]) -> None:
        """Take over all parameters."""
        self._params, self._specs = list(params), layout.params
        self._segments = layout.segments(self._group.rank)

    def agree(self, ask_nonzero: bool, problem: Exception | None, digest: bytes) -> Verdict:
        """Agree on which parameters have a gradient.

        Raises on every rank: `TypeError` for a sparse gradient, `RuntimeError` where a gradient is there on some ranks
        only.
        """
        error = problem
        have = torch.tensor([p.grad is not None for p in self._params], dtype=torch.uint8)
        nonzero = torch.zeros(1, dtype=torch.uint8)
        for spec, param in zip(self._specs, self._params, strict=True):
            if param.grad is not None and param.grad.layout is not torch.strided:
                error = error or TypeError(
                    f"expected a dense gradient of {spec.name!r}, got layout {param.grad.layout}"
                )
        if ask_nonzero and error is None:
            owned = (self.segment_grad(s) for s in self._segments if self._params[s.param].grad is not None)
            nonzero[0] = any(bool(grad.any()) for grad in owned)
        failed = torch.tensor([error is not None], dtype=torch.uint8)
        parts = [have, 1 - have, nonzero, failed, both_ends(digest)]
        message = torch.cat(parts)
        self._group.max_(message)
        have, lack, nonzero, failed, ends = message.split([part.numel() for part in parts])
        disputed = torch.nonzero(have & lack).flatten().tolist()
        if disputed and not failed:
            names = [self._specs[i].name for i in disputed]
            error = RuntimeError(
                f"with reduce_gradients=False every rank must hold the same averaged gradients, but {names} have one "
                "on some ranks only: average them first (DistributedDataParallel does), or let this optimizer do it"
            )
        if failed or disputed:
            self._group.raise_together(error)
        present = frozenset(torch.nonzero(have).flatten().tolist())
        return Verdict(present, bool(nonzero) if ask_nonzero else None, are_one(ends))

    def segment_grad(self, segment: Segment) -> Tensor:
        """The part of `param.grad` that this rank owns, 1-D."""
        grad = self._params[segment.param].grad
        assert grad is not None
        return flatten_in_memory_order(grad, self._specs[segment.param])[segment.start : segment.stop]

    def grads(self, verdict: Verdict) -> list[Tensor]:
        """Every present gradient, whole."""
        present = (p.grad for i, p in enumerate(self._params) if i in verdict.present)
        return [grad for grad in present if grad is not None and grad.numel()]

    def finish(self, bucket: int) -> None:
        """Nothing to wait for."""

    def finish_all(self) -> None:
        """Nothing to wait for."""

    def drop(self, set_to_none: bool) -> None:
        """Nothing is kept beside `param.grad`."""

    def close_round(self) -> None:
        """Nothing to forget."""

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Nothing to hold back: whoever averages the gradients has its own."""
        yield

    def abandon(self) -> None:
        """Drop all gradients."""
        for param in self._params:
            param.grad = None


def sparse_gradient(name: str, grad: Tensor) -> TypeError:
    """The error for a gradient that no flat buffer can take."""
    return TypeError(
        f"expected a dense gradient of {name!r}, got layout {grad.layout}: "
        "an embedding makes it dense with sparse=False"
    )


def both_ends(digest: bytes) -> Tensor:
    """`digest` and its complement as numbers: the maxima of both tell whether all ranks gave the same."""
    numbers = torch.tensor(list(digest), dtype=torch.uint8)
    return torch.cat([numbers, 255 - numbers])


def are_one(ends: Tensor) -> bool:
    """Whether the maxima of `both_ends` over the ranks come from one digest."""
    largest, complement_of_smallest = ends.chunk(2)
    return bool((largest + complement_of_smallest == 255).all())
