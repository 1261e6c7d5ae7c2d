"""The norm of a gradient that lies in pieces on several ranks."""

from __future__ import annotations

from collections.abc import Sequence

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


def clip_factor(norm: Tensor, max_norm: float | Tensor) -> Tensor:
    """What a gradient of this `norm` must be multiplied with, as `torch.nn.utils.clip_grad_norm_` does: at most 1."""
    return torch.clamp(torch.as_tensor(max_norm, dtype=torch.float64, device="cpu") / (norm + 1e-6), max=1.0)


def _combined(norms: Sequence[Tensor], norm_type: float) -> Tensor:
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    combined: Tensor = torch.linalg.vector_norm(torch.stack(list(norms)), norm_type)
    return combined
