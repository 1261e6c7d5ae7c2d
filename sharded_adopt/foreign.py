"""State dicts of other ADOPT implementations, said in our words.

Read and compared with: torch-adopt 0.1.0 (the authors' package) and its first version of 2024-11-06, timm 1.0.31
(`Adopt`), pytorch_optimizer 4.1.0 (`ADOPT`). What would change the run and cannot be carried over raises
`ValueError`.
"""

from __future__ import annotations

from typing import Any

import torch


def translate(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return `state_dict` with the group keys and the step counts of `sharded_adopt.ADOPT`; the input is not changed.

    A dict that is ours already comes back equal. A clip that the other class keeps outside its state dict (the
    authors', pytorch_optimizer's) is not there to be read: the group comes back without `clip_lambda`.
    """
    state = dict(state_dict["state"])
    groups = []
    for group in state_dict["param_groups"]:
        group = dict(group)
        if "amsgrad" in group or "decoupled_weight_decay" in group:
            raise ValueError(
                "this is the state dict of torch's Adam or AdamW (its groups hold 'amsgrad'): its exp_avg averages raw "
                "gradients and its exp_avg_sq starts at zero, so ADOPT cannot load it as it is; "
                "ADOPT.from_adamw(state_dict, params=…) gives an optimizer that goes on from there"
            )
        if "clip_exp" in group:
            _from_timm(group)
        elif "weight_decouple" in group:
            _from_pytorch_optimizer(group, state)
        elif "decoupled" in group:  # the authors' first version
            group["decouple"] = group.pop("decoupled")
        groups.append(group)
    return {**state_dict, "state": state, "param_groups": groups}


def _refuse(source: str, what: str) -> ValueError:
    return ValueError(
        f"the state dict of {source} was saved with {what}, which this ADOPT does not have; going on without it would "
        "change the run. Delete the key from its param_groups to do so all the same"
    )


def _from_timm(group: dict[str, Any]) -> None:
    """timm counts `step` as we do and clips to (step - 1) ** clip_exp after counting, which is our step ** clip_exp."""
    if group.pop("caution", False):
        raise _refuse("timm's Adopt", "caution=True")
    decouple = group.pop("decoupled")
    if group.pop("corrected_weight_decay", False) and decouple and group["weight_decay"] != 0:
        raise _refuse("timm's Adopt", "corrected_weight_decay=True")
    group.pop("max_lr_snapshot", None)
    exponent = group.pop("clip_exp")
    group["clip_lambda"] = None if exponent is None else {"exponent": exponent, "scale": 1.0}
    group["decouple"] = decouple


def _from_pytorch_optimizer(group: dict[str, Any], state: dict[Any, Any]) -> None:
    """pytorch_optimizer counts steps per group; its first call, like ours, only sets exp_avg_sq.

    Its clip bound at the first update that moves anything is clip_lambda(2), ours is clip_lambda(1): it runs one ahead.
    Neither the callable nor `maximize` is in its state dict, so both stay what this optimizer was constructed with.
    """
    for key in ("cautious", "stable_adamw"):
        if group.pop(key, False):
            raise _refuse("pytorch_optimizer's ADOPT", f"{key}=True")
    decouple = group.pop("weight_decouple")
    if group.pop("fixed_decay", False) and decouple and group["weight_decay"] != 0:
        raise _refuse("pytorch_optimizer's ADOPT", "fixed_decay=True")
    step = group.pop("step", None)
    for key in group["params"]:
        if key not in state:
            continue
        if step is None:
            raise ValueError("the state dict of pytorch_optimizer's ADOPT holds state, but its group has no 'step'")
        state[key] = {"step": torch.tensor(float(step), dtype=torch.float32), **state[key]}
    group["decouple"] = decouple
