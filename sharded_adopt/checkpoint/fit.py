"""Whether a checkpoint fits an optimizer and a model, said in full before anything is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from sharded_adopt.checkpoint import dtypes
from sharded_adopt.checkpoint.contents import Checkpointable, model_rest, rule_name
from sharded_adopt.checkpoint.errors import CheckpointMismatch
from sharded_adopt.checkpoint.manifest import Manifest
from sharded_adopt.checkpoint.records import PARAM_KEY, StoredParam
from sharded_adopt.sharding.layout import ParamSpec

_SHOWN = 50  # names a list shows; the exception's attributes have all


@dataclass(slots=True)
class Fit:
    """How a checkpoint compares with what it is to be loaded into.

    `missing`: names that are here and not in the checkpoint. `unexpected`: the other way round. `of_model`: those of
    either that are the model's and not the optimizer's. `misshapen`: a line for each thing that both have, but not
    alike. `groups`: hyperparameters for each group that is here, as `load_shards`
    takes them.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    of_model: list[str] = field(default_factory=list)
    groups: list[dict[str, object]] = field(default_factory=list)

    def require(self, strict: bool) -> None:
        """Raise `CheckpointMismatch`, listing everything, unless it fits; not `strict`, names may differ."""
        if not self.misshapen and not (strict and (self.missing or self.unexpected)):
            return
        model = set(self.of_model)
        parts = [
            f"{title}:{_listed([f'{line} (beside the optimizer)' if line in model else line for line in lines])}"
            for title, lines in (
                ("here, but not in the checkpoint", self.missing),
                ("in the checkpoint, but not here", self.unexpected),
                ("not alike", self.misshapen),
            )
            if lines
        ]
        advice = "" if self.misshapen else "\nstrict=False loads the names that both have"
        raise CheckpointMismatch(
            "the checkpoint does not fit, nothing was changed\n" + "\n".join(parts) + advice,
            missing=self.missing,
            unexpected=self.unexpected,
            misshapen=self.misshapen,
        )


def compare(
    manifest: Manifest, optimizer: Checkpointable, model: nn.Module | None, own: Mapping[str, Mapping[str, Tensor]]
) -> Fit:
    """Hold `manifest` against `optimizer`, whose `local_shards()` are `own`, and `model`. Nothing is changed."""
    fit = Fit()
    rule = rule_name(optimizer)
    if rule is not None and manifest.optimizer is not None and rule != manifest.optimizer:
        fit.misshapen.append(f"the optimizer: state of {manifest.optimizer} in the checkpoint, {rule} here")
    stored = {param.name: param for param in manifest.params}
    specs = {spec.name: spec for spec in optimizer.layout.params}
    fit.missing += [name for name in specs if name not in stored]
    fit.unexpected += [name for name in stored if name not in specs]
    for name, spec in specs.items():
        if name in stored:
            dtype = dtypes.dtype_name(optimizer.param_for(name).dtype)
            fit.misshapen += _differences(stored[name], spec, dtype, own[name])
    _compare_model(fit, manifest, optimizer, model)
    _match_groups(fit, manifest, optimizer)
    return fit


def _differences(stored: StoredParam, spec: ParamSpec, dtype: str, own: Mapping[str, Tensor]) -> list[str]:
    if (stored.shape, stored.dtype) != (spec.shape, dtype):
        return [_unlike(stored.name, stored.shape, stored.dtype, spec.shape, dtype)]
    present = {key: dtypes.dtype_name(tensor.dtype) for key, tensor in own.items()}
    told = {**stored.tensors, **{key: of for key, (of, _) in stored.scalars.items()}}
    # An optimizer that makes its state at the first step has none to compare before it.
    if len(present) > 1 and len(told) > 1 and set(present) != set(told):
        return [f"{stored.name}: state {_states(told)} in the checkpoint, {_states(present)} here"]
    return [
        f"{stored.name}: {key} is {told[key]} in the checkpoint, {present[key]} here"
        for key in sorted(told)
        if present.get(key, told[key]) != told[key]
    ]


def _states(keys: Mapping[str, str]) -> str:
    return ", ".join(sorted(set(keys) - {PARAM_KEY})) or "none"


def _unlike(name: str, shape: Sequence[int], dtype: str, own_shape: Sequence[int], own_dtype: str) -> str:
    return f"{name}: {dtype} {list(shape)} in the checkpoint, {own_dtype} {list(own_shape)} here"


def _compare_model(fit: Fit, manifest: Manifest, optimizer: Checkpointable, model: nn.Module | None) -> None:
    tensors, values = ({}, {}) if model is None else model_rest(model, optimizer)
    stored = {tensor.name: tensor for tensor in manifest.model_tensors}
    here, there = {*tensors, *values}, {*stored, *manifest.model_values}
    fit.missing += sorted(here - there)
    fit.unexpected += sorted(there - here)
    fit.of_model += sorted(here ^ there)
    for name in sorted(here & there):
        if (name in tensors) != (name in stored):
            fit.misshapen.append(f"{name}: a tensor in the {'model' if name in tensors else 'checkpoint'} only")
        elif name in tensors:
            one, shape, dtype = stored[name], tuple(tensors[name].shape), dtypes.dtype_name(tensors[name].dtype)
            if (one.shape, one.dtype) != (shape, dtype):
                fit.misshapen.append(_unlike(name, one.shape, one.dtype, shape, dtype))


def _match_groups(fit: Fit, manifest: Manifest, optimizer: Checkpointable) -> None:
    """Find for each group that is here the hyperparameters that its parameters had: groups may come in another order.

    A group none of whose parameters is in the checkpoint keeps its own.
    """
    stored_of = {name: number for number, group in enumerate(manifest.groups) for name in group.params}
    for number, plain in enumerate(optimizer.plain_groups()):
        names = cast("list[str]", plain["params"])
        found = [manifest.groups[index] for index in dict.fromkeys(stored_of[n] for n in names if n in stored_of)]
        values = dict(found[0].hyperparameters) if found else {}
        for other in found[1:]:
            if other.hyperparameters != values:
                differ = [key for key in values if other.hyperparameters.get(key) != values[key]]
                fit.misshapen.append(
                    f"group {number}: its parameters are of groups with different {', '.join(differ)} in the checkpoint"
                )
        fit.misshapen += [
            f"group {number}: {key} is {str(value)[:40]} in the checkpoint, {str(plain[key])[:40]} here"
            for key, value in values.items()
            if key in plain and not _same_kind(value, plain[key])
        ]
        fit.groups.append({**plain, **values, "params": names})
    if not fit.misshapen:
        try:
            optimizer.check_groups(fit.groups)
        except Exception as error:  # whatever a hyperparameter from a file may provoke
            fit.misshapen.append(f"the hyperparameters in the checkpoint: {error}")


def _same_kind(value: Any, own: Any) -> bool:
    """Whether `value` may stand where `own` stands: a number for a number, a pair for a pair; None goes with all."""
    if value is None or own is None:
        return True
    if isinstance(value, list) or isinstance(own, list):
        pair = isinstance(value, list) and isinstance(own, list) and len(value) == len(own)
        return pair and all(_same_kind(one, other) for one, other in zip(value, own, strict=True))
    return isinstance(value, str) == isinstance(own, str)


def _listed(lines: Sequence[str]) -> str:
    more = f"\n  and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return "".join(f"\n  {line}" for line in lines[:_SHOWN]) + more
