"""The sharded optimizer: its face to the user, and the order of events.

What happens in a room of its own is only called from here: gradients (`reducer`), parameters (`parameters`), the
state out and in (`stateful`), the optimizer inside (`inner`).
"""

from __future__ import annotations

import contextlib
import inspect
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.optim
from torch import Tensor, nn

from sharded_adopt.adopt import ADOPT
from sharded_adopt.from_adamw import AdamSource, read_live
from sharded_adopt.sharding.agreement import require_same, require_same_layout
from sharded_adopt.sharding.arguments import check_arguments
from sharded_adopt.sharding.collectives import Collectives
from sharded_adopt.sharding.gradients import GivenGradients, GradientSource, Verdict
from sharded_adopt.sharding.groups import Group, param_specs, plain_dtype, read_groups, refuse_missing
from sharded_adopt.sharding.handover import (
    HandedOver,
    carry_over_segments_,
    cut_together,
    read_together,
    refuse_other_than_adam,
)
from sharded_adopt.sharding.hyperparameters import comparable, summary_of_groups
from sharded_adopt.sharding.inner import InnerOptimizer, OptimizerClass, read_defaults, refuse_not_elementwise
from sharded_adopt.sharding.layout import Layout
from sharded_adopt.sharding.norm import check_clipping, clip_factor, total_norm
from sharded_adopt.sharding.parameters import ShardedParameters, broadcast_buffers
from sharded_adopt.sharding.plan import EngineOptions, MemoryPlan, StateCost, plan_memory
from sharded_adopt.sharding.reducer import GradientReducer, refuse_taken
from sharded_adopt.sharding.state import ShardedState
from sharded_adopt.sharding.stateful import StatefulShards
from sharded_adopt.sharding.watch import ModuleWatch, module_of
from sharded_adopt.statistics import figures


class ShardedOptimizer(StatefulShards):
    """Run any elementwise torch optimizer with its state split evenly over the ranks (ZeRO-1, ZeRO-2).

    Each rank owns an equal slice of every bucket of parameters, averages the gradients of that slice over the ranks
    while backward runs, updates it, and fetches the others' slices. The result is that of one process on the averaged
    gradient.

    Args:
        params: tensors, `(name, tensor)` pairs, or groups of either. They become views of flat buffers; identity,
            strides and tying are kept.
        optimizer_class: an elementwise `torch.optim.Optimizer`. It sees this rank's segments as 1-D parameters.
        process_group: the ranks (default: all; one process where torch.distributed is not initialised).
        module: its buffers are broadcast from the first rank, its names are used for unnamed parameters, and a
            trainable parameter of it that no group holds is an error.
        shard_gradients: free each bucket's gradients once it is reduced (ZeRO-2). This rank keeps its slice of the
            mean, `param.grad` is None from then on, and gradients can be dropped by this optimizer's `zero_grad` only.
        reduce_gradients: True replaces DistributedDataParallel: parameters are broadcast now and gradients averaged in
            backward. False stands beside it: `param.grad` must hold the averaged gradient.
        main_params: what 16-bit parameters are updated in. "auto" and "fp32": in fp32 values that their owner keeps
            (4/W bytes a parameter), of which they are the rounding. "none": in place.
        reduce_dtype: what gradients travel in (default: their own dtype). 16-bit ones are added in fp32.
        gather_dtype: what wider parameters are fetched in (default: their own dtype). All ranks, the owner too, then
            hold them rounded to it, and the owner keeps the unrounded main values.
        bucket_cap_mb: the size of a bucket in MiB; a larger parameter fills one alone.
        overlap_grad_reduce: start to reduce a bucket as soon as backward has filled it.
        timeout: seconds that any exchange may take (default: torch.distributed's).
        **defaults: the arguments of `optimizer_class`.

    Construction, `step`, `synchronize_gradients`, `clip_grad_norm_`, `add_param_group`, `full_state_dict`,
    `load_state_dict` and `reset` are collective: every rank calls them, in the same order.

    After synchronisation (`step`, `synchronize_gradients`, `clip_grad_norm_`) `param.grad` is a view of its bucket, in
    which this rank's segment is the mean and the rest unspecified. So torch's `clip_grad_norm_` is right only with
    `reduce_gradients=False`; use this class's.

    Raises `ValueError`, `TypeError` or `RanksDisagree` (a `ValueError`) on every rank if any rank was given something
    wrong or different, and `NotImplementedError` for arguments that are not built yet.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = ShardedOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1)
        >>> model(torch.ones(3)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.layout.segments(rank=0)[0].numel  # alone, this rank owns all three weights
        3
    """

    def __init__(
        self,
        params: Any,
        optimizer_class: OptimizerClass = ADOPT,
        process_group: Any = None,
        *,
        module: nn.Module | None = None,
        mesh: Any = None,
        sharding: str = "full",
        shard_gradients: bool = False,
        reduce_gradients: bool = True,
        bucket_cap_mb: float = 25.0,
        overlap_grad_reduce: bool = True,
        overlap_param_gather: bool = False,
        reduce_dtype: torch.dtype | None = None,
        gather_dtype: torch.dtype | None = None,
        main_params: str = "auto",
        timeout: float | None = None,
        **defaults: Any,
    ) -> None:
        self._built = False
        self._is_halfway = False  # some buckets may be updated and others not
        self._reduces = reduce_gradients
        self._keeps_gradients = reduce_gradients and not shard_gradients
        self._collectives = Collectives(process_group, timeout)
        watched = module_of(params) if module is None else module  # before `params` is used up
        groups: tuple[Group, ...] = ()
        error: Exception | None = None
        try:
            check_arguments(
                mesh=mesh,
                sharding=sharding,
                shard_gradients=shard_gradients,
                reduce_gradients=reduce_gradients,
                bucket_cap_mb=bucket_cap_mb,
                overlap_param_gather=overlap_param_gather,
                reduce_dtype=reduce_dtype,
                gather_dtype=gather_dtype,
                main_params=main_params,
            )
            refuse_not_elementwise(optimizer_class)
            groups = read_groups(params, module)
            if module is not None and reduce_gradients:
                refuse_missing(module, groups)
            own_defaults = read_defaults(optimizer_class, groups, defaults)
            self._refuse_taken(groups, shard_gradients)
            super().__init__([group.as_param_group() for group in groups], own_defaults)
        except Exception as caught:
            error = caught
        self._collectives.raise_together(error)

        self._bucket_cap_nbytes = max(1, int(bucket_cap_mb * 2**20))
        self._inner = InnerOptimizer(optimizer_class, defaults, [group.options for group in groups])
        self._plan_options = EngineOptions(
            shards_gradients=shard_gradients,
            reduces_gradients=reduce_gradients,
            keeps_main=main_params != "none",
            reduce_dtype=plain_dtype(reduce_dtype),
            gather_dtype=plain_dtype(gather_dtype),
            overlaps=overlap_grad_reduce,
            exchanges=self._collectives.exchanges,
        )
        self._parameters = ShardedParameters(
            self._collectives, keeps_main=main_params != "none", wire_dtype=gather_dtype
        )
        self._gradients: GradientSource = (
            GradientReducer(self._collectives, overlap_grad_reduce, shard_gradients, reduce_dtype)
            if reduce_gradients
            else GivenGradients(self._collectives)
        )
        # Until something has been stepped, a step in which every gradient is zero may be a host's dummy.
        self._nothing_stepped = self._inner.guards_dummy_step
        self._watch = ModuleWatch(watched, owns_all=module is not None and reduce_gradients)
        self._take_over(groups, self._agreed_layout(groups))
        self._built = True
        if module is not None and reduce_gradients:
            broadcast_buffers(module, self._collectives)

    def _refuse_taken(self, groups: Sequence[Group], frees: bool) -> None:
        if self._reduces:
            for group in groups:
                refuse_taken(group.params, group.names, frees)

    def _agreed_layout(self, groups: Sequence[Group]) -> Layout:
        """Lay out groups that are in `param_groups` already, the same on every rank. Collective."""
        first_group = len(self.param_groups) - len(groups)
        layout = self.layout.extended(param_specs(groups, first_group), self._bucket_cap_nbytes)
        require_same_layout(self._collectives, layout, [comparable(group) for group in self.param_groups])
        return layout

    def _take_over(self, groups: Sequence[Group], layout: Layout) -> None:
        """Bind the parameters of `groups`, the last of `layout`, and make their state. Collective."""
        known = len(self._parameters.tensors)
        tensors = [tensor for group in groups for tensor in group.params]
        self._parameters.add(layout, tensors, with_grads=self._keeps_gradients, broadcast=self._reduces)
        self._watch.hold(tensors, [spec.name for spec in layout.params[known:]])
        self._gradients.add(layout, self._parameters.tensors, self._parameters.buffers)
        self._make_state(known)

    def _make_state(self, known: int = 0) -> None:
        """Give the parameters from index `known` on to the inner optimizer, and see the state anew."""
        layout = self.layout
        self._inner.set_groups(self.param_groups)
        self._inner.add_buckets(
            layout.segments(self._collectives.rank)[known:],
            self._parameters.segments[known:],
            [spec.group for spec in layout.params[known:]],
            self._parameters.buffers,
        )
        self._state = ShardedState(self._collectives, self._inner, layout, self._parameters)
        self._mirror_state()

    # --- training --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Average what is not averaged yet, update this rank's shard, and fetch the others'. Collective.

        `closure`, if given, is called once with gradients enabled, and its result returned. A rank without a batch
        calls `step()` too: its gradients count as zero. A parameter without a gradient on any rank is left alone,
        state and all.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._inner.set_groups(self.param_groups)
        verdict = self._agree("step")
        is_dummy = self._nothing_stepped and verdict.any_nonzero is False
        if verdict.present and not is_dummy:
            self._nothing_stepped = False
            self._update(verdict)
        else:
            self._gradients.finish_all()
        self._gradients.close_round()
        return loss

    def _update(self, verdict: Verdict) -> None:
        """Bucket by bucket: wait for its gradients, step its segments, send them off; then wait for the others'."""
        under_way = []
        self._is_halfway = True
        if self._inner.records:
            self._inner.clear_figures()
        for bucket, members in enumerate(self._state.members):
            self._gradients.finish(bucket)
            present = [index for index in members if index in verdict.present]
            for index in present:
                segment = self._parameters.segments[index]
                segment.grad = self._gradients.segment_grad(self._state.places[index]).to(segment.dtype)
            if present:
                self._parameters.refresh_main(bucket)
                self._inner.step(bucket)
                self._parameters.round_main(bucket)
                under_way.append(self._parameters.gather_bucket(bucket))
            for index in present:
                # A view: kept, it would keep a gradient alive that the user drops.
                self._parameters.segments[index].grad = None
        for pending in under_way:
            pending.wait()
        self._is_halfway = False
        self._parameters.mark_written(verdict.present)
        if not self._inner.makes_state_early:
            self._mirror_state()

    def synchronize_gradients(self) -> Verdict:
        """Make the gradients final: this rank's segment of every `param.grad` is then the mean. Collective.

        `step` does it by itself; call it to read or edit gradients before. Raises on every rank what went wrong with a
        gradient on any.
        """
        return self._synchronize("synchronize_gradients")

    def _synchronize(
        self, about: str, call: Mapping[str, float] | None = None, problem: Exception | None = None
    ) -> Verdict:
        verdict = self._agree(about, call, problem)
        self._gradients.finish_all()
        return verdict

    def _agree(self, about: str, call: Mapping[str, float] | None = None, problem: Exception | None = None) -> Verdict:
        """Exchange what happened since the last step; see that all ranks are in `about`, with equal hyperparameters.

        `call`: arguments that must be the same everywhere. `problem`: what this rank was called with wrong.
        """
        self._collectives.about = about
        problem = problem or self._watch.problem() or self._parameters.rebind()
        words = repr((about, call, summary_of_groups(self.param_groups)))
        digest = zlib.crc32(words.encode()).to_bytes(4, "big")
        verdict = self._gradients.agree(self._nothing_stepped, problem, digest)
        if not verdict.digests_agree:
            require_same_layout(self._collectives, self.layout, [comparable(group) for group in self.param_groups])
            require_same(self._collectives, f"the call of {about}", dict(call or {}))
        return verdict

    @torch.no_grad()
    def clip_grad_norm_(
        self, max_norm: float | Tensor, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
        """Scale the averaged gradient so that its norm is at most `max_norm`, and return the norm before. Collective.

        The norm is that of all gradients of all parameter groups, as `torch.nn.utils.clip_grad_norm_` gives it: a 0-dim
        fp32 tensor (fp64 for fp64 gradients). It is taken in double, rank by rank. Gradients are scaled in place.

        Raises on every rank: `RuntimeError` for a norm that is not finite with `error_if_nonfinite`, `ValueError` for
        arguments that cannot be or that differ by rank. `norm_type` must be above 0; `inf` is the largest element.
        """
        call, problem = check_clipping(max_norm, norm_type)
        norm_type = float(norm_type)
        verdict = self._synchronize("clip_grad_norm_", call, problem)
        parts = [self._gradients.segment_grad(place) for place in self._state.places if place.param in verdict.present]
        total = total_norm(parts, norm_type, self._collectives)
        if error_if_nonfinite and not bool(torch.isfinite(total)):
            raise RuntimeError(
                f"the total norm of order {norm_type} of the gradients is {float(total)}, so they cannot be clipped; "
                "pass error_if_nonfinite=False to scale by it all the same"
            )
        factor = clip_factor(total, max_norm)
        for grad in self._gradients.grads(verdict):
            grad.mul_(factor.to(device=grad.device, dtype=grad.real.dtype if grad.is_complex() else grad.dtype))
        first = self._parameters.tensors[0]
        is_double = all(tensor.dtype in (torch.float64, torch.complex128) for tensor in self._parameters.tensors)
        return total.to(device=first.device, dtype=torch.float64 if is_double else torch.float32)

    @torch.no_grad()
    def stats(self, record: bool = True) -> dict[str, Tensor]:
        """Return the figures of the last step over all ranks, as `ADOPT.stats` describes them. Collective.

        Recording, which the first call switches on and `stats(False)` off, sends nothing and reads nothing on the host.
        The call adds up four numbers a rank, on the CPU where there are several. Equal on every rank. Raises
        `TypeError` where the optimizer inside is not ADOPT.
        """
        self._collectives.about = "stats"
        self._inner.record(True)
        sums = self._inner.sums()
        self._inner.record(record)
        parts = self._collectives.gather(sums, everywhere=True)
        assert parts is not None
        return figures(torch.stack(parts).sum(0).to(sums.device))

    @torch.no_grad()
    def unscale_gradients_(self, inv_scale: Tensor) -> Tensor:
        """Multiply the averaged gradient by `inv_scale`; return 1.0 if any of it on any rank is not finite, else 0.0.

        For `sharded_adopt.GradScaler`. Collective. The result is a 0-dim fp32 tensor on the CPU, equal on every rank.
        """
        if any(tensor.dtype is torch.float16 for tensor in self._parameters.tensors):
            raise ValueError(
                "fp16 gradients cannot be unscaled in place, they would vanish: keep fp32 or bf16 parameters, and "
                "compute in fp16 with torch.autocast"
            )
        verdict = self._synchronize("unscale_gradients_", {"inv_scale": float(inv_scale)})
        found_inf = torch.zeros(())
        for grad in self._gradients.grads(verdict):
            grad.mul_(inv_scale.to(device=grad.device))
            # The sum of zeros is zero, and of anything with an inf or a NaN in it is not.
            found_inf = torch.maximum(found_inf, (~torch.isfinite((grad * 0).sum())).float().cpu())
        return torch.tensor(max(self._collectives.all_gather_number(float(found_inf))))

    def skip_step(self) -> None:
        """Use up the gradients without a step: parameters, state and step counts stay. Not a collective."""
        self._gradients.close_round()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of this round, as torch does; with `shard_gradients` also what has been reduced of it."""
        super().zero_grad(set_to_none)
        self._gradients.drop(set_to_none)

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Within it, backward accumulates gradients on this rank only; the next backward outside reduces the sum."""
        return self._gradients.no_sync()

    def reset(self) -> None:
        """Go on after an error that was caught on every rank: new groups, no gradients left, whole parameters.

        Collective. Parameters and state are those of before the step in which the error came. Raises `RuntimeError` on
        every rank if any was already updating them: a checkpoint must be loaded then, and can be.
        """
        self._collectives.about = "reset"
        self._collectives.reopen()
        self._gradients.abandon()
        error = None
        if self._is_halfway:
            self._is_halfway = False
            error = RuntimeError(
                "step() was left while parameters were being updated: some are from before it, some from after it. "
                "Load a checkpoint into model and optimizer before going on"
            )
        self._collectives.raise_together(error)
        self._parameters.refresh_all_main()
        self._parameters.gather()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Shard another group of parameters; what is there stays where it is. Collective after construction."""
        if not self._built:
            super().add_param_group(param_group)
            return
        self._collectives.about = "add_param_group"
        error: Exception | None = None
        groups: tuple[Group, ...] = ()
        before = len(self.param_groups)
        try:
            if not isinstance(param_group, dict):
                raise TypeError(f"expected a group like {{'params': [...]}}, got {type(param_group).__name__}")
            groups = read_groups([param_group], None, first_index=len(self.layout.params))
            known = {id(t): spec.name for t, spec in zip(self._parameters.tensors, self.layout.params, strict=True)}
            for name, tensor in zip(groups[0].names, groups[0].params, strict=True):
                if id(tensor) in known:
                    raise ValueError(f"parameter {name!r} is in this optimizer already, as {known[id(tensor)]!r}")
            self._refuse_taken(groups, self._reduces and not self._keeps_gradients)
            super().add_param_group(groups[0].as_param_group())
            self._inner.add_group(groups[0].options)
        except Exception as caught:
            error = caught
        try:
            self._collectives.raise_together(error)
            layout = self._agreed_layout(groups)
        except Exception:
            del self.param_groups[before:]
            self._inner.drop_groups(before)
            raise
        self._take_over(groups, layout)

    # --- coming from AdamW -----------------------------------------------------------------------------------------

    @classmethod
    def from_adamw(cls, optimizer: Any, params: Any = None, **arguments: Any) -> ShardedOptimizer:
        """Return a sharded ADOPT that goes on where a torch Adam or AdamW stands. Collective.

        `optimizer`: a live one (alone or under DDP; every rank passes its own), a state dict of one, whole or this
        rank's shards of the same layout, with its `params`; or a `ShardedOptimizer` around one. The result is what
        `ADOPT.from_adamw` gives, which says more, cut to this rank's segments. `arguments` are ADOPT's, which win in
        every group, and the engine's.

        A `ShardedOptimizer` hands over its engine: parameters, gradients and process groups stay as they are, its
        state is converted where it lies, nothing is sent but checks. It cannot be used afterwards, and the engine's
        arguments cannot be given.
        """
        engine_names = set(inspect.signature(ShardedOptimizer.__init__).parameters) - {"self", "params", "defaults"}
        engine = {name: value for name, value in arguments.items() if name in engine_names}
        overrides = {name: value for name, value in arguments.items() if name not in engine_names}
        if isinstance(optimizer, ShardedOptimizer):
            return cls._over_engine_of(optimizer, params, engine, overrides)
        group, timeout = engine.get("process_group"), engine.get("timeout")
        source = read_together(optimizer, params, overrides, group, timeout)
        made = cls(source.groups, **engine, **source.defaults)
        made._go_on_from(source, cut_together(source, made._state, made._collectives))
        return made

    @classmethod
    def _over_engine_of(
        cls, old: ShardedOptimizer, params: Any, engine: Mapping[str, Any], overrides: Mapping[str, Any]
    ) -> ShardedOptimizer:
        """Put ADOPT into the engine of `old` in the place of its Adam. Collective."""
        error: Exception | None = None
        try:
            refuse_other_than_adam(old.optimizer_class)
            if engine or params is not None:
                given = sorted(engine) + ["params"] * (params is not None)
                raise ValueError(f"the engine of a ShardedOptimizer is kept with its parameters: leave out {given}")
            moments = [old._state.of(index) for index in range(len(old.layout.params))]
            source = read_live(old, moments, overrides)
            groups = read_groups(source.groups, None)
            inner = InnerOptimizer(ADOPT, source.defaults, [group.options for group in groups])
            made = cls.__new__(cls)
            vars(made).update({name: value for name, value in vars(old).items() if name.startswith("_")})
            made._built = False
            torch.optim.Optimizer.__init__(made, source.groups, read_defaults(ADOPT, groups, source.defaults))
        except Exception as caught:
            error = caught
        old._collectives.raise_together(error)
        require_same_layout(old._collectives, old.layout, [comparable(group) for group in made.param_groups])
        inner.inherit(old._inner)
        made._inner = inner
        made._make_state()
        made._built = True
        made._go_on_from(source, source.moments)
        vars(old).update(_gradients=HandedOver(), _inner=HandedOver(), _state=HandedOver())
        return made

    def _go_on_from(self, source: AdamSource, moments: Mapping[int, Mapping[str, Any]]) -> None:
        carry_over_segments_(moments, source.rule_of_each(), self._state)
        self._note_steps()
        self._mirror_state()

    # --- what others ask -------------------------------------------------------------------------------------------

    @property
    def reduces_gradients(self) -> bool:
        """Whether this optimizer averages the gradients; False where somebody else, such as DDP, does."""
        return self._reduces

    def memory_plan(self) -> MemoryPlan:
        """Bytes that this optimizer holds on this rank, and sends in a step."""
        costs: dict[tuple[int, str], StateCost] = {}
        for spec, segment in zip(self.layout.params, self._parameters.segments, strict=True):
            if (spec.group, spec.key.dtype) not in costs:
                cost = self._inner.state_cost(spec.group, segment.dtype, segment.device)
                costs[spec.group, spec.key.dtype] = cost
        return plan_memory(self.layout, costs, self._plan_options, self._collectives.rank)

    # --- refusals --------------------------------------------------------------------------------------------------

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # torch.amp.GradScaler asks this first thing in step(). Reduced here, an inf is seen by its owner only, and the
        # ranks would skip different steps.
        if self._built and self._reduces:
            raise RuntimeError(
                "torch.amp.GradScaler cannot see an inf in another rank's shard: use it with reduce_gradients=False"
            )
        return False

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TypeError("a sharded optimizer belongs to its ranks and cannot be copied: copy its full_state_dict()")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a sharded optimizer belongs to its ranks and cannot be pickled: save its state_dict()")


class ShardedADOPT(ShardedOptimizer):
    """`ShardedOptimizer` with `optimizer_class=ADOPT`; it takes the arguments of both.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = ShardedADOPT(model.named_parameters(), lr=1e-3, weight_decay=0.1, decouple=True)
        >>> optimizer.state_dict()["param_groups"][0]["clip_lambda"]
        {'exponent': 0.25, 'scale': 1.0}
    """

    def __init__(self, params: Any, process_group: Any = None, **arguments: Any) -> None:
        super().__init__(params, ADOPT, process_group, **arguments)
