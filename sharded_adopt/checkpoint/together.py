"""Work that every rank does, and one answer for all: nobody waits for a rank that has failed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sharded_adopt.sharding.collectives import Collectives

if TYPE_CHECKING:
    import torch.distributed


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong on one rank: the name of the exception's class, and its text."""

    kind: str
    text: str


# Makes the exception that every rank raises.
Fail = Callable[[Mapping[int, Failure]], Exception]


@contextlib.contextmanager
def collectives_for(own: Collectives, process_group: torch.distributed.ProcessGroup | None) -> Iterator[Collectives]:
    """The collectives of `process_group`, closed afterwards; `own` where there is none."""
    if process_group is None:
        yield own
        return
    group = Collectives(process_group)
    try:
        yield group
    finally:
        group.close()


def outcomes(group: Collectives, work: Callable[[], Any]) -> tuple[list[Any], dict[int, Failure], Exception | None]:
    """Run `work` on every rank: what each returned (JSON), what failed where, this rank's own exception.

    Collective. A rank that cannot be reached any more is a failure of this one.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    report = None if error is None else [type(error).__name__, str(error) or repr(error)]
    try:
        answers = group.all_gather_json([result, report])
    except RuntimeError as lost:
        return [], {group.rank: Failure("RuntimeError", f"the other ranks cannot be reached: {lost}")}, lost
    failures = {rank: Failure(*report) for rank, (_, report) in enumerate(answers) if report is not None}
    return [answer for answer, _ in answers], failures, error


def on_all(group: Collectives, work: Callable[[], Any], fail: Fail) -> list[Any]:
    """Run `work` on every rank and return every rank's result (JSON). If any fails, all raise `fail`. Collective."""
    results, failures, error = outcomes(group, work)
    if failures:
        raise fail(failures) from error
    return results


def on_first(group: Collectives, work: Callable[[], Any], fail: Fail) -> Any:
    """Run `work` on the first rank and return its result (JSON) on all. If it fails, all raise `fail`. Collective."""
    return on_all(group, work if group.rank == 0 else _nothing, fail)[0]


def _nothing() -> None:
    return None


def first_difference(ours: Any, theirs: Any, where: str) -> str | None:
    """Where two pieces of plain data part, in words; None where they are equal."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        pairs = [(f"{where} {key!r}", ours.get(key), theirs.get(key)) for key in sorted({*ours, *theirs})]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = [(f"{where}[{index}]", *pair) for index, pair in enumerate(zip(ours, theirs, strict=True))]
    else:
        return None if ours == theirs else f"{where}: {str(ours)[:80]} against {str(theirs)[:80]}"
    return next((found for place, a, b in pairs if (found := first_difference(a, b, place))), None)
