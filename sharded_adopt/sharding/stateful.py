"""What of a sharded optimizer goes out and comes in: torch's state dicts, and shards for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.optim
from torch import Tensor

from sharded_adopt.sharding.agreement import require_same
from sharded_adopt.sharding.collectives import Collectives
from sharded_adopt.sharding.hyperparameters import from_json, summary_of_groups, to_json
from sharded_adopt.sharding.inner import InnerOptimizer
from sharded_adopt.sharding.layout import Layout
from sharded_adopt.sharding.parameters import ShardedParameters
from sharded_adopt.sharding.state import ShardedState, by_index, require_form


class StatefulShards(torch.optim.Optimizer):
    """The half of a sharded optimizer that hands its state out and takes it in; the other half trains."""

    _collectives: Collectives
    _inner: InnerOptimizer
    _parameters: ShardedParameters
    _state: ShardedState
    _nothing_stepped: bool  # a step in which every gradient is zero may still be a host's dummy

    @property
    def layout(self) -> Layout:
        """Which rank owns which elements."""
        return self._parameters.layout

    @property
    def collectives(self) -> Collectives:
        """The ranks that share this optimizer."""
        return self._collectives

    @property
    def optimizer_class(self) -> type[torch.optim.Optimizer]:
        """The class whose rule is followed and whose state this is."""
        return self._inner.optimizer_class

    def _mirror_state(self) -> None:
        """Show the inner optimizer's state under the user's parameters."""
        for index, tensor in enumerate(self._parameters.tensors):
            self.state[tensor] = self._state.wrapped(index, self.state.get(tensor, {}))

    # --- torch's state dicts ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's shards; no collective.

        As torch's, with integer ids. Each sharded tensor is a `FlatShard` in its parameter's shape over live memory,
        which `torch.save`, `torch.load(weights_only=True)` and torch.distributed.checkpoint take.
        """
        self._inner.set_groups(self.param_groups)
        packed: dict[str, Any] = super().state_dict()
        for group, plain in zip(packed["param_groups"], self._inner.plain_groups(), strict=True):
            group.update(plain)
        return packed

    def full_state_dict(self, rank0_only: bool = True, *, main_values: bool = False) -> dict[str, Any]:
        """What the unsharded optimizer's `state_dict()` would be, on the CPU; `{}` off rank 0 if `rank0_only`.

        State lies whole in memory on the ranks that get it. With `main_values` it also holds `main_param`, the value in
        fp32 of each parameter that has one; `load_state_dict` takes it, unsharded optimizers pass it over.
        """
        self._collectives.about = "full_state_dict"
        call = {"rank0_only": bool(rank0_only), "main_values": bool(main_values)}
        require_same(self._collectives, "the call of full_state_dict", call)
        whole = self._state.gather(everywhere=not rank0_only, main_values=main_values)
        if rank0_only and self._collectives.rank != 0:
            return {}
        return {"state": whole, "param_groups": self.state_dict()["param_groups"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a whole state dict (every rank passes it), or this rank's shards of the same layout. Collective.

        Parameters are matched by their position in the groups, and must agree in number, shape and state. Nothing is
        changed unless everything fits on every rank. The caller's dictionary is left as it is.

        Raises `ValueError` on every rank naming what does not fit and both layouts.
        """
        self._collectives.about = "load_state_dict"
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        error: Exception | None = None
        cut: dict[int, dict[str, Any]] = {}
        groups: list[dict[str, Any]] = []
        try:
            require_form(state_dict)
            state_dict = self._inner.translated(state_dict)
            groups = list(state_dict["param_groups"])
            cut = self._state.check(by_index(state_dict, [len(group["params"]) for group in self.param_groups]))
            self._inner.check_groups(groups)
        except Exception as caught:
            error = caught
        self._collectives.raise_together(error)
        require_same(self._collectives, "the loaded state dict", self._state.summary(cut) | summary_of_groups(groups))
        self._state.load(cut)
        self._load_groups(groups)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _load_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Take hyperparameters in plain form, and what is known from the state: whether anything was stepped."""
        self._inner.load_groups(groups)
        for group, inner, loaded in zip(self.param_groups, self._inner.groups, groups, strict=True):
            group.update(inner)
            if "param_names" in group and "param_names" in loaded:
                group["param_names"] = list(loaded["param_names"])
        self._note_steps()
        self._mirror_state()

    def _note_steps(self) -> None:
        """See in the state whether anything was stepped."""
        steps = [self._state.of(index).get("step", 0) for index in range(len(self.layout.params))]
        self._nothing_stepped = self._inner.guards_dummy_step and not any(float(step) > 0 for step in steps)

    # --- shards, for checkpoints -----------------------------------------------------------------------------------

    def local_shards(self) -> dict[str, dict[str, Tensor]]:
        """The live memory of this rank, by parameter name; no collective.

        Under "param" and each state key a 1-D tensor of the rank's segment; counters as 0-dim tensors.
        """
        shards: dict[str, dict[str, Tensor]] = {}
        for index, spec in enumerate(self.layout.params):
            tensors = {k: torch.as_tensor(v) for k, v in self._state.of(index).items() if v is not None}
            shards[spec.name] = {"param": self._parameters.segments[index], **tensors}
        return shards

    @torch.no_grad()
    def load_shards(self, shards: Mapping[str, Mapping[str, Tensor]], groups: Sequence[Mapping[str, object]]) -> None:
        """Write what `local_shards` and `plain_groups` have given, at any world size, and gather. Collective."""
        index_of = {spec.name: index for index, spec in enumerate(self.layout.params)}
        cut: dict[int, dict[str, Any]] = {}
        for name, tensors in shards.items():
            index = index_of[name]
            self._parameters.segments[index].copy_(tensors["param"])  # main values where they are kept
            cut[index] = {key: value for key, value in tensors.items() if key != "param"}
        self._state.load(cut)
        self._load_groups([from_json(group) for group in groups])
        self._parameters.gather()

    def plain_groups(self) -> list[dict[str, object]]:
        """Each group's hyperparameters as JSON, with the names of its parameters under "params"."""
        self._inner.set_groups(self.param_groups)
        plain = [{key: to_json(key, value) for key, value in one.items()} for one in self._inner.plain_groups()]
        for number, group in enumerate(plain):
            group["params"] = [spec.name for spec in self.layout.params if spec.group == number]
        return plain

    def check_groups(self, groups: Sequence[Mapping[str, object]]) -> None:
        """Raise what `load_shards` would raise for these groups, with nothing changed."""
        self._inner.check_groups([from_json(group) for group in groups])

    def param_for(self, name: str) -> Tensor:
        """The user's parameter of that name. Raises `KeyError` where there is none."""
        for spec, tensor in zip(self.layout.params, self._parameters.tensors, strict=True):
            if spec.name == name:
                return tensor
        raise KeyError(name)
