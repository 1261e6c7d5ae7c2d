"""Runs of optax.contrib.adopt on given gradients, in a process of its own: `python optax_cases.py OUT.npz`.

jax keeps threads that a forked rank could not have, so no test imports it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np

STEPS = 60
SHAPES = {"matrix": (3, 5), "vector": (4,)}


@dataclass(frozen=True)
class Case:
    """What optax is called with, and what `ADOPT` is; chained decay comes before or after `scale_by_adopt`."""

    optax: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    decay_before: float = 0.0
    decay_after: float = 0.0
    is_cosine: bool = False
    zero_steps: int = 0


def tenth(step: Any) -> Any:
    return 0.1 + step**0.5


CASES = {
    "defaults": Case(),
    "b1, b2, eps": Case({"b1": 0.5, "b2": 0.9, "eps": 1e-2}, {"betas": (0.5, 0.9), "eps": 1e-2}),
    "b2 = 0": Case({"b2": 0.0}, {"betas": (0.9, 0.0)}),
    "nesterov": Case({"nesterov": True}, {"nesterov": True}),
    "no clipping": Case({"use_clipping": False}, {"clip_lambda": None}),
    "an exponent": Case(
        {"clip_value_fn": lambda step: 2 * step**0.5}, {"clip_lambda": {"exponent": 0.5, "scale": 2.0}}
    ),
    "a function": Case({"clip_value_fn": tenth}, {"clip_lambda": tenth}),
    # optax multiplies a bf16 momentum by b1 in bf16: exact for 0.5, for 0.9 it is 0.8984
    "mu_dtype": Case({"mu_dtype": "bfloat16", "b1": 0.5}, {"betas": (0.5, 0.9999), "state_dtype": "bfloat16, None"}),
    "mu_dtype, nesterov": Case(
        {"mu_dtype": "bfloat16", "b1": 0.5, "nesterov": True},
        {"betas": (0.5, 0.9999), "state_dtype": "bfloat16, None", "nesterov": True},
    ),
    "mu_dtype, b1 rounded": Case({"mu_dtype": "bfloat16"}, {"state_dtype": "bfloat16, None"}),
    "a schedule": Case(is_cosine=True),
    "decay before": Case(decay_before=0.1, ours={"weight_decay": 0.1}),
    "decay after": Case(decay_after=0.1, ours={"weight_decay": 0.1, "decouple": True}),
    "zeros first": Case(zero_steps=1),
}
LR = 0.05


def start(dtype: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def gradients(case: Case, dtype: str) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(1)
    drawn = [{name: random.standard_normal(shape) for name, shape in SHAPES.items()} for _ in range(STEPS)]
    return [
        {name: (grad * (0.0 if step < case.zero_steps else 1.0)).astype(dtype) for name, grad in grads.items()}
        for step, grads in enumerate(drawn)
    ]


def main(out: str) -> None:
    import jax
    import jax.numpy as jnp
    import optax

    jax.config.update("jax_enable_x64", True)
    found = {}
    for dtype in ("float32", "float64"):
        for name, case in CASES.items():
            rate = optax.cosine_decay_schedule(LR, STEPS) if case.is_cosine else LR
            transform = optax.chain(
                optax.add_decayed_weights(case.decay_before),
                optax.contrib.scale_by_adopt(**case.optax),
                optax.add_decayed_weights(case.decay_after),
                optax.scale_by_learning_rate(rate),
            )
            if not case.decay_before and not case.decay_after:
                transform = optax.contrib.adopt(rate, **case.optax)
            params = {key: jnp.asarray(value) for key, value in start(dtype).items()}
            state = transform.init(params)
            for grads in gradients(case, dtype):
                updates, state = transform.update({k: jnp.asarray(v) for k, v in grads.items()}, state, params)
                params = optax.apply_updates(params, updates)
            for key, value in params.items():
                assert value.dtype == dtype
                found[f"{dtype}/{name}/{key}"] = np.asarray(value)
    np.savez(out, **found)


if __name__ == "__main__":
    main(sys.argv[1])
