"""ADOPT as a `torch.optim.Optimizer`, and `adopt`, its functional form.

    for each parameter, with its own `step` counted from 0 and g its gradient:
        g  <- g + weight_decay * θ            if weight_decay and not decouple
        if step == 0:  v <- g²; step <- 1; nothing else changes
        θ  <- θ - lr * weight_decay * θ       if weight_decay and decouple
        n  <- clamp(g / max(√v, eps), -c, c)  v of the step before, c = clip_lambda(step)
        m  <- m + (1 - β1)(n - m);  θ <- θ - lr * m;  v <- β2 v + (1 - β2) g²;  step <- step + 1

Source: Taniguchi et al., NeurIPS 2024, arXiv 2411.02853, in the form of the authors' package torch-adopt 0.1.0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from sharded_adopt import from_adamw, options
from sharded_adopt.clipping import PowerClip, as_clip
from sharded_adopt.dtensor import any_over_meshes, element_start, is_dtensor, local_grad, local_tensor, part_of
from sharded_adopt.functional import adopt, run_kernel
from sharded_adopt.gathering import Gathered, Memory
from sharded_adopt.kernels import Kernels, NotDenseError, looks_at_gradients
from sharded_adopt.kernels.verdict import has_nonzero, has_nonzero_on_device
from sharded_adopt.loading import checked_group, pack_groups, reveal_state, unpack
from sharded_adopt.options import StateDtype
from sharded_adopt.statistics import Statistics, figures

__all__ = ["ADOPT", "ADOPTW", "adopt", "has_nonzero", "has_nonzero_on_device"]


class ADOPT(Optimizer):
    """Adam that converges with any β2: v of the step before normalises the gradient, and momentum comes after.

    The arguments are torch's, with these of its own:

    * `betas`, `eps`: `eps` is a lower clamp of √v, it is not added.
    * `clip_lambda`: the bound of the normalised gradient: a `PowerClip`, None, an exponent, `{"exponent": …, "scale":
      …}`, or any callable of `step`. Only a callable is not saved in the state dict.
    * `decouple`: decay the weights as AdamW does (`ADOPTW`); by default decay is added to the gradient, as the
      authors do.
    * `nesterov`: step along an average of `exp_avg` and the normalised gradient.
    * `state_dtype`: a dtype, or a pair for (exp_avg, exp_avg_sq). None is the parameter's dtype, and fp32 for 16-bit
      parameters. A 16-bit exp_avg_sq is rounded stochastically: to nearest it would never change at β2 = 0.9999.
    * `init`: "parameter" starts a parameter at its first gradient, as the authors do. "element" starts each element
      at its first gradient that is not zero: for embedding rows that are not in the first batch, and for zero-filled
      gradients.
    * `foreach`, `fused`: which kernel; None is the fastest that supports the call.

    State of a parameter, made at the first `step()` in which it has a gradient: `step` (0-dim, fp32, on the CPU
    unless capturable or fused), `exp_avg`, `exp_avg_sq` (its shape). A step in which every gradient is zero while
    nothing has been stepped is taken for a library's dummy step: it makes the state and counts for nothing.

    Raises `ValueError` that names the argument and the value for what cannot be.

    >>> param = torch.nn.Parameter(torch.ones(1))
    >>> optimizer = ADOPT([param], lr=0.1)
    >>> for grad in (1.0, 2.0):
    ...     param.grad = torch.tensor([grad])
    ...     optimizer.step()
    >>> round(param.item(), 6)
    0.99
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler hands over its scale instead of changing the gradients

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Sequence[float] = (0.9, 0.9999),
        eps: float = 1e-6,
        clip_lambda: Any = PowerClip(0.25),  # noqa: B008 - it is frozen
        weight_decay: float = 0.0,
        decouple: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        nesterov: bool = False,
        state_dtype: StateDtype = None,
        init: str = "parameter",
    ) -> None:
        # Where a 1-D parameter starts in the parameter that it was cut from, in elements; 0 for what is not listed.
        self.element_starts: dict[Tensor, int] = {}
        # False where somebody above (the sharded engine) decides over all ranks what a dummy step is.
        self.guard_dummy_step = True
        # The host knows of a parameter that has been stepped: there is no dummy step any more.
        self._is_stepped = False
        # Where figures of each step are kept, if anybody wants them.
        self.statistics: Statistics | None = None
        self._kernels = Kernels()
        self._memory: Memory | None = None
        defaults = options.checked(
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "clip_lambda": clip_lambda,
                "weight_decay": weight_decay,
                "decouple": decouple,
                "foreach": foreach,
                "maximize": maximize,
                "capturable": capturable,
                "differentiable": differentiable,
                "fused": fused,
                "nesterov": nesterov,
                "state_dtype": state_dtype,
                "init": init,
            }
        )
        super().__init__(params, defaults)
        self.register_state_dict_post_hook(pack_groups)

    @classmethod
    def from_adamw(
        cls, optimizer: Optimizer | Mapping[str, Any], params: ParamsT | None = None, **overrides: Any
    ) -> ADOPT:
        """Return an ADOPT that goes on where a torch Adam or AdamW stands, so that nothing jumps at the switch.

        `optimizer` is live, or its state dict with `params` in the same groups and order. It is only read. Each
        parameter gets exp_avg = m̂ / (√v̂ + eps), exp_avg_sq = v̂ and Adam's `step`; one without state starts afresh.
        The groups keep lr, betas, eps, weight decay (coupled of Adam, decoupled of AdamW), `maximize`, `capturable`,
        `differentiable`, names, and what schedulers have put there. `overrides`, arguments of this class, win in every
        group: an `lr` is also what a scheduler scales from then on. The kind of the decay follows Adam in `ADOPTW` too:
        pass `decouple=True` to turn an Adam's into AdamW's. A later group gets the defaults of the live optimizer, and
        those of the first group where there is a state dict only. Make schedulers and hooks anew, for the new
        optimizer: docs/from-adamw.md.

        Raises `TypeError` for another optimizer, `ValueError` for a state dict that is not Adam's or does not fit.
        """
        source = from_adamw.read(optimizer, params, overrides)
        made = cls(source.groups, **source.defaults)
        members = [(param, group) for group in made.param_groups for param in group["params"]]
        for position, rule in enumerate(source.rule_of_each()):
            if moments := source.moments.get(position):
                param, group = members[position]
                made.init_state(param, group)
                from_adamw.carry_over_(moments, rule, made.state[param], element_start(param))
        made._note_stepped()
        return made

    def stats(self, record: bool = True) -> dict[str, Tensor]:
        """Return figures of the last step: 0-dim fp32 tensors on the first parameter's device, never read on the host.

        The first call switches recording on, `stats(False)` off again; figures are NaN until a step was recorded.
        Recording costs a few passes over the gradients and the state, and no bit of the update.

        * `update_rms`: the RMS, over the elements that moved, of what was taken from them over `lr`: of exp_avg, or of
          what `nesterov` makes of it, decay excluded. AdamW's is mostly between 0.2 and 1. 0 where nothing moved, as in
          a first step.
        * `clipped_share`: of the elements that moved, how many had their normalised gradient clipped.
        * `grad_norm`: the norm of all gradients of the step, `grad_scale` taken out, after any clipping.

        A step that `found_inf` skips leaves them as they were. With DTensors they are of the whole parameters, and
        the call is a collective on their meshes.
        """
        if self.statistics is None:
            self.statistics = Statistics(
                local_tensor(next(param for group in self.param_groups for param in group["params"])).device
            )
        found = figures(self.statistics.totals())
        self.statistics = self.statistics if record else None
        return found

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does. Its options are checked; a parameter that is in the optimizer already is named."""
        if isinstance(param_group, dict) and not isinstance(param_group["params"], set):
            param_group.update(checked_group({**self.defaults, **param_group}))
            params = param_group["params"]
            param_group["params"] = [params] if isinstance(params, Tensor) else list(params)
            self._check_params(param_group)
        super().add_param_group(param_group)  # refuses what is neither a dict nor ordered

    def _check_params(self, param_group: dict[str, Any]) -> None:
        seen = {id(param) for group in self.param_groups for param in group["params"]}
        for index, entry in enumerate(param_group["params"]):
            name, param = entry if isinstance(entry, tuple) else (f"number {index} of the group", entry)
            if not isinstance(param, Tensor):
                continue  # torch says what is wrong with it
            _, exp_avg_sq_dtype = options.state_dtypes(param, param_group["state_dtype"])
            if param_group["differentiable"] and exp_avg_sq_dtype.itemsize == 2:
                raise ValueError(f"differentiable=True needs a wider exp_avg_sq than state_dtype={exp_avg_sq_dtype}")
            if id(param) in seen:
                raise ValueError(
                    f"parameter {name} (shape {tuple(param.shape)}) is in the optimizer already; list it once"
                )
            seen.add(id(param))

    def init_state(self, param: Tensor, group: dict[str, Any] | None = None) -> None:
        """Make `state[param]` where it is missing, all 0: `step`, `exp_avg`, `exp_avg_sq`; `group` saves a search."""
        state = self.state[param]
        if state:
            return
        if group is None:
            group = next(g for g in self.param_groups if any(p is param for p in g["params"]))
        exp_avg_dtype, exp_avg_sq_dtype = options.state_dtypes(param, group["state_dtype"])
        state["step"] = torch.zeros((), dtype=torch.float32, device=options.step_device(param, group))
        state["exp_avg"] = torch.zeros_like(param, dtype=exp_avg_dtype, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(param, dtype=exp_avg_sq_dtype, memory_format=torch.preserve_format)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what `closure`, called first with autograd on, returned.

        `grad_scale` and `found_inf`, which `torch.amp.GradScaler` sets on the optimizer, are honoured. Raises
        `RuntimeError` for a gradient that is not dense, before anything is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            try:
                self._update()
            except NotDenseError:
                self._memory = None
                self._gather()  # says which parameter it is
                raise
        return loss

    def _update(self) -> None:
        self._refuse_capture_unless_capturable()
        found_inf = _scalar(self, "found_inf")
        calls, every_step = self._gather()
        counts = self._counts(calls, every_step, found_inf)
        if counts is False:
            return
        if self.statistics is not None:
            self.statistics.begin()
        for call in calls:
            if not call.params:
                continue
            group = call.group
            beta1, beta2 = group["betas"]
            lists = call.params, call.grads, call.exp_avgs, call.exp_avg_sqs, call.steps
            rule = {
                "capturable": group["capturable"],
                "grad_scale": _scalar(self, "grad_scale"),
                "found_inf": found_inf,
                "beta1": beta1,
                "beta2": beta2,
                "lr": group["lr"],
                "clip_lambda": as_clip(group["clip_lambda"]),
                "weight_decay": group["weight_decay"],
                "decouple": group["decouple"],
                "eps": group["eps"],
                "maximize": group["maximize"],
                "nesterov": group["nesterov"],
                "init": group["init"],
                "offsets": call.offsets,
                "step_increment": None if counts is True else counts,
            }
            if self.statistics is not None:
                self.statistics.measure(lists, rule, call.parts)
            run_kernel(
                self._kernels,
                *lists,
                foreach=group["foreach"],
                fused=group["fused"],
                has_complex=call.has_complex,
                differentiable=group["differentiable"],
                **rule,
            )
        if self.statistics is not None:
            self.statistics.end(found_inf)

    def _refuse_capture_unless_capturable(self) -> None:
        """A CUDA graph would record the steps and clip bounds of this call as constants and repeat them for ever."""
        if torch.compiler.is_compiling() or not torch.cuda.is_initialized():
            return
        if torch.cuda.is_current_stream_capturing() and not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError(
                "step() is being captured into a CUDA graph; construct the optimizer with capturable=True"
            )

    def _gather(self) -> tuple[list[Gathered], list[Tensor]]:
        """Return what there is to update, one call a group, and the steps of all parameters that have state."""
        if self._memory is not None and self._is_decided() and not torch.compiler.is_compiling():
            remembered = self._memory.again(self.param_groups, self.state)
            if remembered is not None:
                return remembered, []  # nobody asks for the steps any more
        calls: list[Gathered] = []
        every_step: list[Tensor] = []
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            exp_avgs: list[Tensor] = []
            exp_avg_sqs: list[Tensor] = []
            steps: list[Tensor] = []
            has_complex = self._init_group(group, params, grads, exp_avgs, exp_avg_sqs, steps, every_step)
            offsets = self._offsets(params, exp_avg_sqs)
            parts = [part_of(param) for param in params] if any(map(is_dtensor, params)) else []
            grads = [local_grad(param, grad) for param, grad in zip(params, grads, strict=True)]
            params, exp_avgs, exp_avg_sqs = (
                [local_tensor(t) for t in each] for each in (params, exp_avgs, exp_avg_sqs)
            )
            calls.append(Gathered(group, params, grads, exp_avgs, exp_avg_sqs, steps, has_complex, offsets, parts))
        if not torch.compiler.is_compiling():
            self._memory = Memory.of(calls, self.state, looks_at_gradients(p.device for c in calls for p in c.params))
        return calls, every_step

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        steps: list[Tensor],
        every_step: list[Tensor],
    ) -> bool:
        """Fill the lists with what has a gradient, making its state, and `every_step` with all steps there are.

        Returns whether a parameter is complex. torch.compile knows an optimizer's method of this name: it runs it as
        it is instead of tracing it.
        """
        has_complex = False
        for index, param in enumerate(group["params"]):
            grad = param.grad
            if grad is not None:
                if grad.layout != torch.strided:
                    raise RuntimeError(
                        "ADOPT needs dense gradients, that of parameter "
                        f"{options.parameter_name(group, index)} is {grad.layout}; "
                        "use sparse=False, or torch.optim.SparseAdam for this parameter"
                    )
                self.init_state(param, group)
                state = self.state[param]
                has_complex |= param.is_complex()
                params.append(param)
                grads.append(grad)
                exp_avgs.append(state["exp_avg"])
                exp_avg_sqs.append(state["exp_avg_sq"])
                steps.append(state["step"])
            if state := self.state.get(param):
                every_step.append(state["step"])
        return has_complex

    def _is_decided(self) -> bool:
        """Whether this cannot be a dummy step, or somebody else has seen to it."""
        return self._is_stepped or not self.guard_dummy_step

    def _counts(self, calls: list[Gathered], every_step: list[Tensor], found_inf: Tensor | None) -> bool | Tensor:
        """Return whether this step counts, or is a library's dummy step on zero gradients.

        That is a 0-dim tensor of 1.0 or 0.0 where capturable or compiled. Once the host knows of a parameter with
        `step` above 0 nothing is looked at any more.
        """
        if self._is_decided():
            return True
        grads = [grad for call in calls for grad in call.grads]
        all_params = [param for group in self.param_groups for param in group["params"]]
        if torch.compiler.is_compiling() or any(group["capturable"] for group in self.param_groups):
            device = local_tensor(all_params[0]).device
            flag = has_nonzero_on_device([*grads, *every_step], device)
            return any_over_meshes(flag, all_params).to(torch.float32)
        counts = has_nonzero(grads) or has_nonzero(every_step)
        if any(is_dtensor(param) for param in all_params):
            counts = bool(any_over_meshes(torch.tensor(counts), all_params))
        self._is_stepped = counts and (found_inf is None or not found_inf.item())
        return counts

    def _offsets(self, params: list[Tensor], exp_avg_sqs: list[Tensor]) -> list[int] | None:
        """Where each parameter starts in the one that it was cut from; only stochastic rounding asks for it."""
        if all(exp_avg_sq.itemsize > 2 for exp_avg_sq in exp_avg_sqs):
            return None
        return [self.element_starts.get(param, 0) + element_start(param) for param in params]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, of the authors' ADOPT, timm's or pytorch_optimizer's.

        The loaded options win over those constructed; what the dict does not hold stays. State keeps the dtype that
        `state_dtype` gives (torch would cast it to the parameter's), and is copied. Raises `ValueError`, with nothing
        changed, where the dict does not fit or holds what cannot be carried over.
        """
        # Registered last, so that the user's own hooks have seen and adapted the dict before.
        handle = self.register_load_state_dict_pre_hook(unpack)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        own = {"element_starts": self.element_starts, "guard_dummy_step": self.guard_dummy_step}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over an unpickled state, or a loaded one: `torch.optim.Optimizer.load_state_dict` ends here."""
        reveal_state(state)
        super().__setstate__(state)
        for group in self.param_groups:  # an old pickle may lack what has been added since
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        if "_is_stepped" not in self.__dict__:  # new from a pickle or a deepcopy, which carry no hooks
            self.register_state_dict_post_hook(pack_groups)
            self.statistics = None
        # What was remembered of the state that is replaced would keep it alive until the next step.
        self._kernels = Kernels()
        self._memory = None
        self._note_stepped()

    def _note_stepped(self) -> None:
        """See in the state whether anything was stepped."""
        self._is_stepped = has_nonzero(s["step"] for p, s in self.state.items() if isinstance(p, Tensor) and s)


class ADOPTW(ADOPT):
    """ADOPT with the weight decay of AdamW: decoupled from the gradient, 0.01 unless given."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Sequence[float] = (0.9, 0.9999),
        eps: float = 1e-6,
        clip_lambda: Any = PowerClip(0.25),  # noqa: B008 - it is frozen
        weight_decay: float = 1e-2,
        decouple: bool = True,
        **keywords: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, clip_lambda, weight_decay, decouple, **keywords)


def _scalar(optimizer: Optimizer, name: str) -> Tensor | None:
    """`grad_scale` or `found_inf` as GradScaler leaves it on the optimizer; without any gradient it is a plain 0."""
    value = getattr(optimizer, name, None)
    return value if isinstance(value, Tensor) or value is None else torch.tensor(float(value))
