"""The optimizer inside: any elementwise torch optimizer, over this rank's segments as 1-D parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from sharded_adopt import foreign
from sharded_adopt.adopt import ADOPT
from sharded_adopt.sharding.buckets import BucketBuffer
from sharded_adopt.sharding.groups import Group
from sharded_adopt.sharding.layout import Segment
from sharded_adopt.sharding.plan import Dtype, StateCost

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
    """`optimizer_class` over this rank's segments, one instance for each bucket.

    A bucket can so be stepped as soon as its gradients are final, while others are still on the wire. Every instance
    has all parameter groups, most of them empty. State that can be made early is made at once, and lies in one flat
    tensor for each bucket, so that a step is one run over memory.
    """

    def __init__(
        self, optimizer_class: OptimizerClass, defaults: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
    ) -> None:
        self._class, self._defaults = optimizer_class, dict(defaults)
        self._buckets: list[Optimizer] = []
        self.records = False
        self._bucket_of: dict[Tensor, Optimizer] = {}
        self._flat: dict[tuple[int, str, torch.dtype], Tensor] = {}
        self._inherited: Mapping[tuple[int, str, torch.dtype], Tensor] = {}
        # Without parameters: it keeps the hyperparameters, and reads and writes them in the class's own form.
        self._template = self._make([{**group, "params": []} for group in groups])

    def _make(self, groups: Sequence[Mapping[str, Any]]) -> Optimizer:
        made = self._class([dict(group) for group in groups], **self._defaults)
        if isinstance(made, ADOPT):
            # The verdict is one for all ranks; this rank's segments alone must not take it.
            made.guard_dummy_step = False
        return made

    @property
    def optimizer_class(self) -> type[Optimizer]:
        """The class whose rule is followed and whose state is kept."""
        return type(self._template)

    @property
    def guards_dummy_step(self) -> bool:
        """Whether a first step with zero gradients must not count: ADOPT would keep v = 0 from it for 10⁴ steps."""
        return isinstance(self._template, ADOPT)

    @property
    def makes_state_early(self) -> bool:
        """Whether all state is there from the start; other classes make and replace theirs as they step."""
        return _makes_state_early(self._template)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The hyperparameters of every group as the class keeps them; without parameters."""
        return [without_params(group) for group in self._template.param_groups]

    def state_of(self, segment: Tensor) -> dict[str, Any]:
        """The live state of a segment; empty where the class has made none yet."""
        state: dict[str, Any] = self._bucket_of[segment].state[segment]
        return state

    def add_buckets(
        self,
        places: Sequence[Segment],
        segments: Sequence[Tensor],
        groups: Sequence[int],
        buffers: Sequence[BucketBuffer],
    ) -> None:
        """Take over the segments of new buckets (each with its place and the number of its group), and make state.

        State is made where the class is one that we know; another makes its own at the first step.
        """
        members: dict[int, list[int]] = {}
        for index, place in enumerate(places):
            members.setdefault(place.bucket, []).append(index)
        for bucket in sorted(members):
            of_groups: list[list[Tensor]] = [[] for _ in self._template.param_groups]
            for index in members[bucket]:
                of_groups[groups[index]].append(segments[index])
            optimizer = self._make([{**own, "params": held} for own, held in zip(self.groups, of_groups, strict=True)])
            self._buckets.append(optimizer)
            if self.records and isinstance(optimizer, ADOPT):
                optimizer.stats()
            for index in members[bucket]:
                self._bucket_of[segments[index]] = optimizer
                self._make_state(optimizer, places[index], segments[index], optimizer.param_groups[groups[index]])
                self._move_into_flat(places[index], segments[index], buffers[bucket])
        self._inherited = {}  # what is not used of it goes back

    def _make_state(self, optimizer: Optimizer, place: Segment, segment: Tensor, group: dict[str, Any]) -> None:
        if isinstance(optimizer, ADOPT):
            optimizer.element_starts[segment] = place.start
            optimizer.init_state(segment, group)
        elif type(optimizer) in (Adam, AdamW):
            optimizer.state[segment] = _adam_state(segment, group)

    def _move_into_flat(self, place: Segment, segment: Tensor, buffer: BucketBuffer) -> None:
        state = self.state_of(segment)
        for key, value in state.items():
            if not is_of_segment(value, segment):
                continue
            where = (place.bucket, key, value.dtype)
            inherited = self._inherited.get(where)
            if where not in self._flat:
                self._flat[where] = value.new_zeros(buffer.bucket.shard_numel) if inherited is None else inherited
            state[key] = self._flat[where][place.shard_start : place.shard_start + place.numel]
            if inherited is None:
                state[key].copy_(value)  # not always zeros: Adagrad's is made with its class

    def inherit(self, other: InnerOptimizer) -> None:
        """Lay state that will be made next over the memory of `other`'s of the same name and dtype, as it stands."""
        self._inherited = other._flat

    def record(self, on: bool) -> None:
        """Switch the figures of `ADOPT.stats` on or off. Raises `TypeError` for another class, which has none."""
        if not isinstance(self._template, ADOPT):
            raise TypeError(
                f"stats() are figures of ADOPT's rule, but this optimizer runs {self.optimizer_class.__name__}; "
                "clip_grad_norm_ returns the norm of the gradient"
            )
        if on == self.records:
            return
        self.records = on
        for optimizer in self._adopts():
            optimizer.stats(on)

    def clear_figures(self) -> None:
        """Forget the figures of the last step: not every bucket may take part in the next."""
        for optimizer in self._adopts():
            if optimizer.statistics is not None:
                optimizer.statistics.clear()

    def sums(self) -> Tensor:
        """This rank's sums of the last step, from which `statistics.figures` come; recording must be on."""
        return torch.stack([one.statistics.totals() for one in self._adopts() if one.statistics is not None]).sum(0)

    def _adopts(self) -> Iterator[ADOPT]:
        return (optimizer for optimizer in self._buckets if isinstance(optimizer, ADOPT))

    def add_group(self, options: Mapping[str, Any]) -> None:
        """Open a group without parameters. Raises, with nothing changed, for values that the class refuses."""
        self._template.add_param_group({"params": [], **options})
        for optimizer in self._buckets:
            optimizer.add_param_group({"params": [], **options})

    def drop_groups(self, first: int) -> None:
        """Forget the groups from number `first` on, which have no parameters yet."""
        for optimizer in (self._template, *self._buckets):
            del optimizer.param_groups[first:]

    def set_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Take over every value of the user's groups but the parameters: schedulers and users write there."""
        for theirs, *own in zip(
            map(without_params, groups),
            self._template.param_groups,
            *(optimizer.param_groups for optimizer in self._buckets),
            strict=True,
        ):
            for group in own:
                group.update(theirs)

    def plain_groups(self) -> list[dict[str, Any]]:
        """The groups as the class's own `state_dict()` writes them, without parameters."""
        return [without_params(group) for group in self._template.state_dict()["param_groups"]]

    def load_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Take groups in the form of `plain_groups`, by the class's own `load_state_dict`."""
        self._template.load_state_dict({"state": {}, "param_groups": [{**group, "params": []} for group in groups]})
        self.set_groups(self.groups)

    def check_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise what `load_groups` would raise, with nothing changed."""
        probe = self._make([{**own, "params": []} for own in self.groups])
        probe.load_state_dict({"state": {}, "param_groups": [{**group, "params": []} for group in groups]})

    def begin_anew(self, segment: Tensor) -> None:
        """Bring the state of a segment back to how it began; what the class makes as it steps is dropped."""
        own = self.state_of(segment)
        if self.makes_state_early:
            for value in own.values():
                value.zero_()
            return
        groups = self._bucket_of[segment].param_groups
        group = next(g for g in groups if any(member is segment for member in g["params"]))
        first = self._make([{**without_params(group), "params": [segment]}]).state.get(segment, {})
        for key, value in list(own.items()):
            if key not in first:
                del own[key]
            elif isinstance(value, Tensor):
                value.copy_(first[key])
            else:
                own[key] = first[key]

    def translated(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state dict of another class for the same rule in this class's own words."""
        return foreign.translate(state_dict) if isinstance(self._template, ADOPT) else state_dict

    def state_cost(self, group: int, dtype: torch.dtype, device: torch.device) -> StateCost:
        """What the class keeps for a segment of `dtype` in a group."""
        return state_cost(self._class, self._defaults, self.groups[group], dtype, device)

    def step(self, bucket: int) -> None:
        """Update every segment of `bucket` whose `.grad` is set. Hooks on steps have run for the optimizer outside."""
        _step_without_hooks(self._buckets[bucket])


def _makes_state_early(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, ADOPT) or type(optimizer) in (Adam, AdamW)


def _step_without_hooks(optimizer: Optimizer) -> None:
    step = type(optimizer).step
    getattr(step, "__wrapped__", step)(optimizer)


def state_cost(
    optimizer_class: OptimizerClass,
    defaults: Mapping[str, Any],
    options: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
) -> StateCost:
    """What `optimizer_class` keeps for a parameter of `dtype`, seen in one step of two elements with no gradient."""
    probe = torch.zeros(2, dtype=dtype, device=device)
    probe.grad = torch.zeros_like(probe)
    optimizer = optimizer_class([{**options, "params": [probe]}], **defaults)
    made = set(optimizer.state[probe])  # Adagrad's is there as soon as it knows its parameters
    _step_without_hooks(optimizer)
    flat: dict[str, Dtype] = {}
    loose: dict[str, Dtype] = {}
    counters = 0
    for key, value in optimizer.state[probe].items():
        if is_of_segment(value, probe):
            where = flat if key in made or _makes_state_early(optimizer) else loose
            where[key] = Dtype(str(value.dtype).removeprefix("torch."), value.itemsize)
        elif isinstance(value, Tensor):
            counters += value.nbytes
    return StateCost(flat, loose, counters)


def without_params(group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a parameter group."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


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
