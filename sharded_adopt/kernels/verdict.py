"""Whether gradients hold anything: what tells a real first step from a dummy one.

Checkpoint libraries make an optimizer allocate its state by a step on zero gradients. ADOPT's first step is the one
that sets exp_avg_sq, and a zero from there would mislead it for 1 / (1 - β2) steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def has_nonzero(grads: Iterable[Tensor]) -> bool:
    """Return whether any element of any gradient differs from 0 (NaN does). Reads on the host, up to the first such."""
    return any(bool(grad.any()) for grad in grads)


def has_nonzero_on_device(grads: Sequence[Tensor], device: torch.device) -> Tensor:
    """The same without reading anything on the host: a 0-dim bool tensor on `device`."""
    if not grads:
        return torch.zeros((), dtype=torch.bool, device=device)
    return torch.stack([grad.any().to(device) for grad in grads]).any()
