"""The optimizer inside: any elementwise torch optimizer, over this rank's segments as 1-D parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from sharded_adopt import foreign
from sharded_adopt.adopt import ADOPT
from sharded_adopt.sharding.buckets import BucketBuffer
from sharded_adopt.sharding.groups import Group
from sharded_adopt.sharding.layout import Layout, Segment

OptimizerClass = Callable[..., Optimizer]

# What each of these does with a tensor as a whole, so that a piece of it would get another update.
_NOT_ELEMENTWISE = {
    "Adafactor": "factors the second moment over rows and columns",
    "LBFGS": "searches along a direction of all parameters",
    "Muon": "orthogonalises whole matrices",
    "Shampoo": "preconditions whole matrices",
    "SOAP": "preconditions whole matrices",
    "SparseAdam": "takes sparse gradients only",
    "LAMB": "scales by the norm of whole tensors",
    "LARS": "scales by the norm of whole tensors",
}


def refuse_not_elementwise(optimizer_class: Any) -> None:
    """Raise `TypeError` for what is no optimizer class, or one that is known to need whole tensors."""
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise TypeError(f"optimizer_class must be a subclass of torch.optim.Optimizer, got {optimizer_class!r}")
    for base in optimizer_class.__mro__:
        if reason := _NOT_ELEMENTWISE.get(base.__name__):
            raise TypeError(
                f"{optimizer_class.__name__} cannot be sharded by elements: it {reason}; keep its parameters in an "
                "optimizer of their own beside this one"
            )


def read_defaults(
    optimizer_class: OptimizerClass, groups: Sequence[Group], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """The optimizer's default of every hyperparameter.

    A throw-away instance over one element a group tells them, and raises for bad values before anything is allocated.
    """
    probe = [
        {"params": [torch.zeros(1, dtype=g.params[0].dtype, device=g.params[0].device)], **g.options}
        for g in groups
        if g.params
    ]
    return dict(optimizer_class(probe, **defaults).defaults)


class InnerOptimizer:
    """`optimizer_class` over segments.

    State that can be made early is made at once, and lies in one flat tensor for each bucket, so that a step is one run
    over memory. `segments` are tensors of the user's memory; `step` writes them in place.
    """

    def __init__(
        self, optimizer_class: OptimizerClass, defaults: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
    ) -> None:
        self.optimizer = optimizer_class([dict(group) for group in groups], **defaults)
        self._flat: dict[tuple[int, str, torch.dtype], Tensor] = {}
        if isinstance(self.optimizer, ADOPT):
            # The verdict is one for all ranks; this rank's segments alone must not take it.
            self.optimizer.guard_dummy_step = False

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """Its state, by segment tensor."""
        return self.optimizer.state

    @property
    def guards_dummy_step(self) -> bool:
        """Whether a first step with zero gradients must not count: ADOPT would keep v = 0 from it for 10⁴ steps."""
        return isinstance(self.optimizer, ADOPT)

    def make_state(
        self, segments: Sequence[Segment], tensors: Sequence[Tensor], buffers: Sequence[BucketBuffer]
    ) -> None:
        """Allocate the state of `tensors`, the segments' memory, where the optimizer class is one that we know."""
        group_of = {tensor: group for group in self.optimizer.param_groups for tensor in group["params"]}
        for segment, tensor in zip(segments, tensors, strict=True):
            if isinstance(self.optimizer, ADOPT):
                self.optimizer.element_starts[tensor] = segment.start
                self.optimizer.init_state(tensor)
            elif type(self.optimizer) in (Adam, AdamW):
                self.state[tensor] = _adam_state(tensor, group_of[tensor])
            self._move_into_flat(segment, tensor, buffers[segment.bucket])

    def _move_into_flat(self, segment: Segment, tensor: Tensor, buffer: BucketBuffer) -> None:
        state = self.state.get(tensor, {})
        for key, value in state.items():
            if not is_of_segment(value, tensor):
                continue
            place = (segment.bucket, key, value.dtype)
            if place not in self._flat:
                self._flat[place] = torch.zeros(buffer.bucket.shard_numel, dtype=value.dtype, device=value.device)
            state[key] = self._flat[place][segment.shard_start : segment.shard_start + segment.numel]

    def set_params(self, number: int, segments: list[Tensor]) -> None:
        """Make `segments` the parameters of group `number`, which had none."""
        self.optimizer.param_groups[number]["params"] = segments

    def add_group(self, options: Mapping[str, Any]) -> None:
        """Open a group without parameters. Raises, with nothing changed, for values that the optimizer refuses."""
        self.optimizer.add_param_group({"params": [], **options})

    def drop_groups(self, first: int) -> None:
        """Forget the groups from number `first` on, which have no parameters yet."""
        del self.optimizer.param_groups[first:]

    def set_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Take over every value of the user's groups but the parameters: schedulers and users write there."""
        for own, theirs in zip(self.optimizer.param_groups, groups, strict=True):
            for key, value in theirs.items():
                if key not in ("params", "param_names"):
                    own[key] = value

    def plain_groups(self) -> list[dict[str, Any]]:
        """The groups as the optimizer's own `state_dict()` writes them, without parameters."""
        groups = self.optimizer.state_dict()["param_groups"]
        return [{k: v for k, v in group.items() if k not in ("params", "param_names")} for group in groups]

    def translated(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state dict of another class for the same rule in this optimizer's own words."""
        return foreign.translate(state_dict) if isinstance(self.optimizer, ADOPT) else state_dict

    def load_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Take groups in the form of `plain_groups`, by the optimizer's own `load_state_dict`; its state stays."""
        ids = iter(range(len(self.state) + sum(len(g["params"]) for g in self.optimizer.param_groups)))
        loaded = [
            {**group, "params": [next(ids) for _ in own["params"]]}
            for group, own in zip(groups, self.optimizer.param_groups, strict=True)
        ]
        state = self.optimizer.state
        self.optimizer.load_state_dict({"state": {}, "param_groups": loaded})
        self.optimizer.state = state  # type: ignore[misc, unused-ignore]

    def state_nbytes_per_element(self, layout: Layout) -> dict[str, int]:
        """For each dtype of parameters, the bytes of state that lie in flat tensors for one element."""
        nbytes = dict.fromkeys((bucket.key.dtype for bucket in layout.buckets), 0)
        first = {bucket.key.dtype: index for index, bucket in reversed(list(enumerate(layout.buckets)))}
        for (index, _, dtype), _flat in self._flat.items():
            key = layout.buckets[index].key.dtype
            if first[key] == index:
                nbytes[key] += dtype.itemsize
        return nbytes

    def step(self) -> None:
        """Update every segment whose `.grad` is set; the hooks on steps have run for the optimizer outside."""
        step = type(self.optimizer).step
        getattr(step, "__wrapped__", step)(self.optimizer)


def is_of_segment(value: Any, tensor: Tensor) -> bool:
    """Whether a state entry has one element for each of the segment's, as moments have and counters have not."""
    return isinstance(value, Tensor) and value.shape == tensor.shape


def _adam_state(tensor: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """What torch's Adam and AdamW make at their first step (torch/optim/adam.py:_init_group)."""
    on_device = group["capturable"] or group["fused"]
    # The kernels of fused Adam count in fp32; the others in the default dtype.
    dtype = torch.float32 if group["fused"] or torch.get_default_dtype() != torch.float64 else torch.float64
    state: dict[str, Any] = {"step": torch.zeros((), dtype=dtype, device=tensor.device if on_device else "cpu")}
    names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
    state.update({name: torch.zeros_like(tensor) for name in names})
    return state
