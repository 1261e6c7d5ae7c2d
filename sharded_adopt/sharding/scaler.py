"""Loss scaling over sharded gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from sharded_adopt.sharding.collectives import Collectives


class GradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` whose verdict on infinities is that of all ranks.

    An inf in one rank's gradient is, once reduced, in one other rank's shard only. This scaler unscales the shards of a
    sharded optimizer and takes the maximum of found_inf over its ranks, so that all ranks skip the same steps and their
    scales stay equal. A skipped step leaves parameters, state and step counts as they were.

    Other optimizers are handled as in torch; over `process_group`, if given, their found_inf is agreed too (then
    construction and `step` are collective over it).

    Example:
        >>> from sharded_adopt import ShardedADOPT
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer, scaler = ShardedADOPT(model.parameters()), GradScaler("cpu", init_scale=4.0)
        >>> scaler.scale(model(torch.tensor([1.0, float("inf")])).sum()).backward()
        >>> scaler.step(optimizer)
        >>> scaler.update()
        >>> scaler.get_scale(), float(optimizer.state[model.weight]["step"])
        (2.0, 0.0)
    """

    def __init__(self, device: str = "cuda", process_group: Any = None, **arguments: Any) -> None:
        super().__init__(device, **arguments)
        self._group = None if process_group is None else Collectives(process_group)

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        unscale = getattr(optimizer, "unscale_gradients_", None)
        if unscale is not None:
            return {found_inf.device: unscale(inv_scale).to(found_inf.device)}
        found: dict[torch.device, Tensor] = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        if self._group is not None:
            worst = torch.stack([one.cpu() for one in found.values()] or [torch.zeros(())]).max()
            self._group.max_(worst)
            found = {device: worst.to(device) for device in found or [found_inf.device]}
        return found

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Unscale the gradients if that has not been done, and step unless one of them, on any rank, is not finite.

        Returns what `optimizer.step` returned, or None for a skipped step. Collective for a sharded optimizer.
        """
        skip = getattr(optimizer, "skip_step", None)
        if not self._enabled or skip is None:
            return super().step(optimizer, *args, **kwargs)
        if "closure" in kwargs:
            raise RuntimeError(
                "a closure cannot be used with loss scaling: its gradients would be made after unscaling"
            )
        self._check_scale_growth_tracker("step")
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError("step() has been called for this optimizer since the last update()")
        if state["stage"] is OptState.READY:
            self.unscale_(optimizer)
        is_finite = not any(float(found) for found in state["found_inf_per_device"].values())
        result = optimizer.step(*args, **kwargs) if is_finite else skip()
        state["stage"] = OptState.STEPPED
        return result
