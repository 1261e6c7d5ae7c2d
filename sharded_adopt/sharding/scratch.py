"""Memory that is borrowed and given back within a step."""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """Flat tensors to borrow: memory that is used again costs no page faults.

    As many stay as were ever out at one time, all of a kind as large as the largest that was announced for it. A
    borrowed tensor holds anything.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._announced: dict[tuple[torch.dtype, torch.device], int] = {}

    def announce(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        """Say that `numel` elements will be taken: sizes that grow from one to the next would be allocated anew."""
        self._announced[dtype, device] = max(numel, self._announced.get((dtype, device), 0))

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A 1-D tensor of `numel` elements."""
        for position, one in enumerate(self._free):
            whole = one._base if one._base is not None else one
            if whole.numel() >= numel and whole.dtype is dtype and whole.device == device:
                del self._free[position]
                return whole[:numel]
        # Too small for this: let them go rather than keep both.
        self._free = [one for one in self._free if one.dtype is not dtype or one.device != device]
        whole = torch.empty(max(numel, self._announced.get((dtype, device), 0)), dtype=dtype, device=device)
        return whole[:numel]

    def give_back(self, tensor: Tensor) -> None:
        """Return a tensor that `take` has given; nothing may use it any more."""
        self._free.append(tensor)
