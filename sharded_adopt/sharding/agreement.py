"""What all ranks must have been given alike, and the error that names the first thing that differs."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from sharded_adopt.sharding.collectives import Collectives, RanksDisagree
from sharded_adopt.sharding.layout import Layout, first_difference


def require_same_layout(group: Collectives, layout: Layout, groups: list[dict[str, str]]) -> None:
    """Raise `RanksDisagree` on every rank unless parameters, buckets and hyperparameters are the same on all.

    `groups`: each parameter group's hyperparameters in words. A hash is exchanged; only where it differs the rest
    follows, to find the first difference. Collective.
    """
    if _all_equal(group, {"layout": layout.fingerprint(), "groups": groups}):
        return
    everyone = group.all_gather_json({"layout": layout.to_json(), "groups": groups})
    first = Layout.from_json(everyone[0]["layout"])
    for rank, other in enumerate(everyone):
        difference = first_difference(first, Layout.from_json(other["layout"]))
        difference = difference or _first_difference_of_groups(everyone[0]["groups"], other["groups"])
        if difference is not None:
            raise RanksDisagree(
                f"the optimizer is not the same on all ranks. Rank 0 against rank {rank}: {difference}. "
                "Every rank must pass the same parameters in the same order and the same hyperparameters"
            )


def require_same(group: Collectives, what: str, mine: dict[str, Any]) -> None:
    """Raise `RanksDisagree` on every rank unless `mine` (JSON) is the same on all; `what` names it. Collective."""
    if _all_equal(group, mine):
        return
    everyone = group.all_gather_json(mine)
    for rank, other in enumerate(everyone):
        for key in sorted({*everyone[0], *other}):
            a, b = everyone[0].get(key), other.get(key)
            if a != b:
                raise RanksDisagree(
                    f"{what} is not the same on all ranks. {key}: {a!r} on rank 0, {b!r} on rank {rank}"
                )


def _all_equal(group: Collectives, value: Any) -> bool:
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
    return len(set(group.all_gather_bytes(digest))) == 1


def _first_difference_of_groups(ours: list[dict[str, str]], theirs: list[dict[str, str]]) -> str | None:
    if len(ours) != len(theirs):
        return f"{len(ours)} parameter groups against {len(theirs)}"
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for key in sorted({*a, *b}):
            if a.get(key) != b.get(key):
                return f"parameter group {number}: {key} {a.get(key)} against {b.get(key)}"
    return None
