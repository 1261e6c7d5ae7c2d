"""What a torch Adam or AdamW holds, said in ADOPT's words: how training goes on where it stands.

Adam divides the average of gradients by a root, ADOPT averages gradients that were divided before. With Adam's moments
after `step` updates, and the bias that its own step takes out of them,

    m̂ = m / (1 - β1^step)    v̂ = v / (1 - β2^step)         v is max_exp_avg_sq with amsgrad
    exp_avg <- m̂ / (√v̂ + eps)    exp_avg_sq <- v̂    step <- step

ADOPT's next update is β1 of the step that Adam has just taken and 1 - β1 of the new gradient over √v̂: neither the
direction nor the size jumps. The hyperparameters stay as they are, β2 and eps included, and the clip bound is that of
a run of `step` updates. What is measured at the switch: docs/from-adamw.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from sharded_adopt.dtensor import local_tensor
from sharded_adopt.kernels import fused_is_available
from sharded_adopt.kernels.working import store_exp_avg_sq_

# What a group of Adam's holds that ADOPT's does not, or chooses for itself.
_ADAMS_OWN = ("amsgrad", "decoupled_weight_decay", "foreach", "fused")
# What a group of ours has from Adam, and a later group would get too.
_FROM_ADAM = ("lr", "betas", "eps", "weight_decay", "decouple", "maximize", "capturable", "differentiable", "fused")


@dataclass(frozen=True, slots=True)
class AdamRule:
    """What one group's moments were made with."""

    beta1: float
    beta2: float
    eps: float
    amsgrad: bool


@dataclass(frozen=True, slots=True)
class AdamSource:
    """An Adam or AdamW as ADOPT reads it.

    `groups`: ADOPT's groups, parameters included; `defaults`: what a later group gets. `rules`: one for each group.
    `moments`: Adam's state by the position of its parameter, counted over all groups; no entry for one without state.
    """

    groups: list[dict[str, Any]]
    defaults: dict[str, Any]
    rules: list[AdamRule]
    moments: dict[int, Mapping[str, Any]]

    def rule_of_each(self) -> list[AdamRule]:
        """The rule of every parameter, by its position."""
        return [rule for rule, group in zip(self.rules, self.groups, strict=True) for _ in group["params"]]


def read(source: Any, params: Any = None, overrides: Mapping[str, Any] | None = None) -> AdamSource:
    """Read a live Adam or AdamW, or its state dict with the parameters that it belongs to; nothing is changed.

    `params` are for a state dict: tensors, `(name, tensor)` pairs or groups of either, in the groups and the order of
    the dict. `overrides` replace hyperparameters in every group. Raises `TypeError` for another optimizer and
    `ValueError` for a dict that is not Adam's, or does not fit.
    """
    overrides = dict(overrides or {})
    if isinstance(source, Mapping):
        if params is None:
            raise ValueError("a state dict holds no parameters: give them too, from_adamw(state_dict, params=…)")
        return _read_state_dict(source, params, overrides)
    if params is not None:
        raise ValueError("params belong to a state dict; an optimizer has its own, leave them out")
    if isinstance(getattr(source, "optimizer_class", None), type):
        raise TypeError(
            f"{_kind(source)} holds shards of {source.optimizer_class.__name__}'s state, and only a sharded ADOPT goes "
            "on with these: call ShardedADOPT.from_adamw(optimizer)"
        )
    if not isinstance(source, Adam):
        raise TypeError(
            f"from_adamw goes on from a torch.optim.Adam or AdamW, or from its state dict, got {_kind(source)}; "
            "what wraps one usually holds it as .optimizer or .optim"
        )
    return read_live(
        source, [moments for group in source.param_groups for moments in _states(source, group)], overrides
    )


def read_live(optimizer: Optimizer, moments: Sequence[Mapping[str, Any]], overrides: Mapping[str, Any]) -> AdamSource:
    """The same from an optimizer's own groups and the state of each of its parameters, in order."""
    return AdamSource(
        [_adopt_group(group, overrides) for group in optimizer.param_groups],
        _adopt_group(optimizer.defaults, overrides),
        [_rule(group) for group in optimizer.param_groups],
        {position: entries for position, entries in enumerate(moments) if entries},
    )


def carry_over_(moments: Mapping[str, Any], rule: AdamRule, state: Mapping[str, Tensor], start: int = 0) -> None:
    """Write Adam's `moments` of one parameter into ADOPT's `state` of it, which may lie in the same memory.

    `moments`: `step`, `exp_avg`, `exp_avg_sq` and, with amsgrad, `max_exp_avg_sq`, in the shape of those in `state`.
    The arithmetic is fp32, or fp64 where one of them is. `start` is the index of the first element in the whole
    parameter (for the rounding of a 16-bit exp_avg_sq). Before Adam's first step there is nothing to carry over: the
    parameter starts at step 0.
    """
    step = float(moments["step"])
    tensors = [state["exp_avg"], state["exp_avg_sq"], moments["exp_avg"], moments[_divisor(rule)]]
    exp_avg, exp_avg_sq, m, v = (torch.view_as_real(t) if t.is_complex() else t for t in map(local_tensor, tensors))
    if step < 1:
        for tensor in (exp_avg, exp_avg_sq, state["step"]):
            tensor.zero_()
        return
    dtype = torch.float64 if torch.float64 in (t.dtype for t in (exp_avg, exp_avg_sq, m, v)) else torch.float32
    unbiased_sq = v.to(dtype) / (1 - rule.beta2**step)
    unbiased = m.to(dtype) / (1 - rule.beta1**step)
    exp_avg.copy_(unbiased.div_(unbiased_sq.sqrt().add_(rule.eps)))
    store_exp_avg_sq_(exp_avg_sq, unbiased_sq, step=int(step), start=start)
    state["step"].fill_(step)


def _divisor(rule: AdamRule) -> str:
    return "max_exp_avg_sq" if rule.amsgrad else "exp_avg_sq"


def _kind(source: Any) -> str:
    return f"{type(source).__module__}.{type(source).__qualname__}"


def _states(optimizer: Optimizer, group: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    return (optimizer.state.get(param, {}) for param in group["params"])


def _rule(group: Mapping[str, Any]) -> AdamRule:
    beta1, beta2 = group["betas"]
    return AdamRule(float(beta1), float(beta2), float(group["eps"]), bool(group["amsgrad"]))


def _adopt_group(group: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A group of Adam's (or its defaults) as one of ADOPT's; what schedulers and users put there stays."""
    mine = {key: value for key, value in group.items() if key not in _ADAMS_OWN}
    if isinstance(mine["lr"], Tensor):
        mine["lr"] = mine["lr"].detach().clone()  # a scheduler of Adam's must not move ours
    mine["betas"] = tuple(float(beta) for beta in group["betas"])
    mine["decouple"] = bool(group["decoupled_weight_decay"])
    if "param_names" in mine:
        mine["param_names"] = list(mine["param_names"])
    if group.get("fused") and fused_is_available():
        mine["fused"] = True
    mine.update(overrides)
    if "lr" in overrides and "initial_lr" in mine:  # what schedulers scale
        mine["initial_lr"] = mine["lr"].detach().clone() if isinstance(mine["lr"], Tensor) else mine["lr"]
    return mine


def _read_state_dict(state_dict: Mapping[str, Any], params: Any, overrides: Mapping[str, Any]) -> AdamSource:
    if not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(
            "expected the state dict of a torch Adam or AdamW, with 'state' and 'param_groups', got the keys "
            f"{sorted(map(str, state_dict))}"
        )
    saved = [_with_decay_rule(group, overrides) for group in state_dict["param_groups"]]
    members = [_members(group) for group in _as_groups(params)]
    counts, expected = [len(group) for group in members], [len(group["params"]) for group in saved]
    if counts != expected:
        raise ValueError(
            f"the state dict has parameter groups of {expected} parameters, params has {counts}: give the parameters "
            "in the groups and the order that Adam had them in"
        )
    groups = []
    for theirs, named in zip(saved, members, strict=True):
        group = _adopt_group(theirs, overrides)
        saved_names = group.pop("param_names", None)
        for (name, _), saved_name in zip(named, saved_names or [name for name, _ in named], strict=True):
            if name is not None and name != saved_name:
                raise ValueError(
                    f"params holds {name!r} where the state dict holds {saved_name!r}: give the parameters in the "
                    "order that Adam had them in"
                )
        names = [name for name, _ in named] if saved_names is None else saved_names
        group["params"] = [tensor for _, tensor in named]
        if all(name is not None for name in names):
            group["param_names"] = list(names)
        groups.append(group)
    positions = {key: position for position, key in enumerate(key for group in saved for key in group["params"])}
    moments = {positions[key]: entries for key, entries in state_dict["state"].items() if entries}
    tensors = [tensor for group in groups for tensor in group["params"]]
    rules = [_rule(group) for group in saved for _ in group["params"]]
    for position, entries in moments.items():
        _check_moments(entries, rules[position], tensors[position], position)
    return AdamSource(groups, _defaults_of(groups, overrides), [_rule(group) for group in saved], moments)


def _defaults_of(groups: Sequence[Mapping[str, Any]], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What a later group gets where the defaults were not saved: as the first one, before schedulers moved its lr."""
    defaults = {key: group[key] for group in groups[:1] for key in _FROM_ADAM if key in group}
    for group in groups[:1]:
        defaults["lr"] = group.get("initial_lr", group["lr"])
    return {**defaults, **overrides}


def _with_decay_rule(group: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A saved group of Adam's that says how its weights decay."""
    if "amsgrad" not in group or "betas" not in group or "clip_lambda" in group:
        raise ValueError(
            "this is not the state dict of a torch Adam or AdamW, whose groups hold 'betas' and 'amsgrad': got "
            f"{sorted(map(str, group))}"
        )
    if "decoupled_weight_decay" in group:
        return dict(group)
    if group["weight_decay"] != 0 and "decouple" not in overrides:  # torch before 2.7
        raise ValueError(
            "the state dict does not say whether it is Adam's or AdamW's, and its weights decay: pass decouple=True "
            "for AdamW, decouple=False for Adam"
        )
    return {**group, "decoupled_weight_decay": bool(overrides.get("decouple", False))}


def _as_groups(params: Any) -> list[Any]:
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of tensors, pairs or groups, got one tensor: pass [tensor]")
    listed = list(params)
    return listed if listed and isinstance(listed[0], Mapping) else [{"params": listed}]


def _members(group: Mapping[str, Any]) -> list[tuple[str | None, Tensor]]:
    """The parameters of a group, each with its name or None."""
    listed = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    names = group.get("param_names", [None] * len(listed))
    return [one if isinstance(one, tuple) else (name, one) for one, name in zip(listed, names, strict=True)]


def _check_moments(entries: Mapping[str, Any], rule: AdamRule, param: Tensor, position: int) -> None:
    """Raise `ValueError` for what is not Adam's state of this parameter."""
    for key in ("step", "exp_avg", "exp_avg_sq", _divisor(rule)):
        value = entries.get(key)
        fits = isinstance(value, Tensor) and value.shape == param.shape and value.is_complex() == param.is_complex()
        if value is None or not (fits or key == "step"):
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"Adam's state of parameter {position} (shape {tuple(param.shape)}): expected {key!r} in its shape, "
                f"got {found}"
            )
