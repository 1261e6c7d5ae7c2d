"""What the signatures name and later versions will do: until then it is refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sharded_adopt.sharding.groups import Group


def refuse_unbuilt(**arguments: tuple[Any, Any]) -> None:
    """Raise `NotImplementedError` for an argument whose value is not the one that is built; each is (value, built)."""
    for name, (value, built) in arguments.items():
        if value != built:
            raise NotImplementedError(f"{name}={value!r} is not built yet: leave it at {built!r}")


def refuse_16_bit(groups: Sequence[Group]) -> None:
    """Raise `NotImplementedError` naming a 16-bit parameter."""
    for group in groups:
        for name, tensor in zip(group.names, group.params, strict=True):
            if tensor.dtype in (torch.bfloat16, torch.float16):
                raise NotImplementedError(
                    f"parameter {name!r} is {tensor.dtype}: main_params, the fp32 values that 16-bit parameters need, "
                    "are not built yet; train fp32 parameters (torch.autocast keeps 16-bit compute)"
                )
