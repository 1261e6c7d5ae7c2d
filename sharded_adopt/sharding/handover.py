"""From a torch Adam or AdamW to sharded ADOPT: read on all ranks, and cut to this rank's segments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from torch.optim import Adam, Optimizer

from sharded_adopt.from_adamw import AdamRule, AdamSource, carry_over_, read
from sharded_adopt.sharding.agreement import require_same
from sharded_adopt.sharding.collectives import Collectives
from sharded_adopt.sharding.state import MAIN_KEY, ShardedState


def read_together(
    source: Any, params: Any, overrides: Mapping[str, Any], process_group: Any, timeout: float | None
) -> AdamSource:
    """`from_adamw.read`; what a rank cannot read is an error on every rank.

    The ranks that could read are in their engine's constructor by then: it opens its groups and exchanges errors.
    """
    try:
        return read(source, params, overrides)
    except Exception as error:
        Collectives(process_group, timeout).raise_together(error)
        raise


def cut_together(source: AdamSource, state: ShardedState, group: Collectives) -> dict[int, dict[str, Any]]:
    """This rank's part of whole moments, by the index of their parameter. Collective."""
    cut: dict[int, dict[str, Any]] = {}
    error: Exception | None = None
    try:
        cut = {
            index: {key: state.cut(index, key, value) for key, value in entries.items()}
            for index, entries in source.moments.items()
        }
    except Exception as caught:
        error = caught
    group.raise_together(error)
    require_same(group, "the state of Adam", state.summary(cut))
    return cut


def carry_over_segments_(
    moments: Mapping[int, Mapping[str, Any]], rules: Sequence[AdamRule], state: ShardedState
) -> None:
    """Write Adam's moments of this rank's segments into ADOPT's state, and main values where a dict holds some."""
    for index, entries in moments.items():
        carry_over_(entries, rules[index], state.of(index), state.places[index].start)
        if MAIN_KEY in entries:
            state.segment(index).copy_(entries[MAIN_KEY])


def refuse_other_than_adam(optimizer_class: type[Optimizer]) -> None:
    """Raise `TypeError` where a sharded optimizer does not follow Adam's rule."""
    if not issubclass(optimizer_class, Adam):
        raise TypeError(
            "from_adamw goes on from a torch.optim.Adam or AdamW, sharded or not, got a ShardedOptimizer of "
            f"{optimizer_class.__name__}"
        )


class HandedOver:
    """What a sharded optimizer has left when another goes on with its shards: every use says so."""

    def __getattr__(self, name: str) -> NoReturn:
        raise RuntimeError(
            "this optimizer has handed its shards over to the one that from_adamw returned: use that one, and drop this"
        )
