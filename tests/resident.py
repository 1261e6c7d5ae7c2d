"""What is really in memory: the tensors that are alive in this process."""

from __future__ import annotations

import gc

import torch
from torch import Tensor, nn


def storages() -> dict[int, int]:
    """Bytes of every tensor's memory in this process, by its address; a memory that several share counts once."""
    gc.collect()
    found: dict[int, int] = {}
    for one in gc.get_objects():
        # By type alone: asking strange objects for anything more may warn.
        if type(one) in (Tensor, nn.Parameter) and one.layout is torch.strided:
            storage = one.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found
