"""The norm of a gradient that lies in pieces on several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sharded_adopt.sharding.collectives import Collectives


def total_norm(parts: Sequence[Tensor], norm_type: float, group: Collectives) -> Tensor:
    """The norm of order `norm_type` over all `parts` of all ranks; 0 where there are none. Collective.

    Taken in double, part by part and then rank by rank: a 0-dim fp64 tensor on the CPU, equal on every rank.
    """
    norms = [
        torch.linalg.vector_norm(part, norm_type, dtype=torch.promote_types(part.dtype, torch.float64)).cpu()
        for part in parts
        if part.numel()
    ]
    everyone = group.all_gather_number(float(_combined(norms, norm_type)))
    return _combined([torch.tensor(one, dtype=torch.float64) for one in everyone], norm_type)


def check_clipping(max_norm: Any, norm_type: Any) -> tuple[dict[str, float], Exception | None]:
    """The arguments of a clip as numbers, and what is wrong with them: `ValueError`, `TypeError` or None."""
    try:
        call = {"max_norm": float(max_norm), "norm_type": float(norm_type)}
    except (TypeError, ValueError) as error:
        return {}, type(error)(f"max_norm and norm_type must be numbers, got {max_norm!r} and {norm_type!r}")
    if not call["max_norm"] >= 0:
        return call, ValueError(f"max_norm must be at least 0, got {call['max_norm']}")
    if not call["norm_type"] > 0:
        # Of pieces, these orders are not what they are of whole parameters.
        return call, ValueError(f"norm_type must be above 0, got {call['norm_type']}: 2.0, or inf for the largest")
    return call, None


def clip_factor(norm: Tensor, max_norm: float | Tensor) -> Tensor:
    """What a gradient of this `norm` must be multiplied with, as `torch.nn.utils.clip_grad_norm_` does: at most 1."""
    return torch.clamp(torch.as_tensor(max_norm, dtype=torch.float64, device="cpu") / (norm + 1e-6), max=1.0)


def _combined(norms: Sequence[Tensor], norm_type: float) -> Tensor:
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    combined: Tensor = torch.linalg.vector_norm(torch.stack(list(norms)), norm_type)
    return combined
