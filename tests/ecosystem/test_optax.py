"""The trajectories of optax.contrib.adopt and ours, argument by argument."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys

import numpy as np
import optax_cases
import pytest
import torch
from optax_cases import CASES, LR, STEPS, Case, gradients, start

from sharded_adopt import ADOPT

if importlib.util.find_spec("optax") is None:
    pytest.skip("optax is not installed: make ecosystem", allow_module_level=True)

# Named tolerances. In fp64 both do the same arithmetic in another order. In fp32 jax rounds β2 before it takes 1-β2,
# which moves v by up to 1.7e-4 of what a gradient adds.
TOLERANCE = {"float64": 1e-12, "float32": 5e-6}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    out = tmp_path_factory.mktemp("optax") / "trajectories.npz"
    ran = subprocess.run(
        [sys.executable, optax_cases.__file__, str(out)], capture_output=True, text=True, timeout=200, check=False
    )
    assert ran.returncode == 0, ran.stderr
    with np.load(out) as found:
        return dict(found)


def ours(case: Case, dtype: str, first: dict[str, np.ndarray] | None = None) -> tuple[dict[str, np.ndarray], ADOPT]:
    params = {key: torch.from_numpy((first or start(dtype))[key].copy()).requires_grad_() for key in start(dtype)}
    options = dict(case.ours)
    if "state_dtype" in options:
        options["state_dtype"] = (torch.bfloat16, None)
    optimizer = ADOPT(params.values(), lr=LR, **options)
    for step, grads in enumerate(gradients(case, dtype)):
        if case.is_cosine:
            optimizer.param_groups[0]["lr"] = LR * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        for key, param in params.items():
            param.grad = torch.from_numpy(grads[key])
        optimizer.step()
    return {key: param.detach().numpy() for key, param in params.items()}, optimizer


DIFFERENT = ("decay after", "zeros first", "mu_dtype, b1 rounded")
SAME = [name for name in CASES if name not in DIFFERENT]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", SAME)
def test_the_same_arguments_give_the_same_trajectory(name: str, dtype: str, theirs: dict[str, np.ndarray]) -> None:
    for key, param in ours(CASES[name], dtype)[0].items():
        np.testing.assert_allclose(param, theirs[f"{dtype}/{name}/{key}"], rtol=0, atol=TOLERANCE[dtype])


def test_chained_decay_also_acts_at_count_0_where_ours_does_not(theirs: dict[str, np.ndarray]) -> None:
    """One decay more: ours from a start that is decayed once is theirs."""
    name, case = "decay after", CASES["decay after"]
    decayed = {key: value * (1 - LR * 0.1) for key, value in start("float64").items()}
    for key, param in ours(case, "float64", decayed)[0].items():
        np.testing.assert_allclose(param, theirs[f"float64/{name}/{key}"], rtol=0, atol=TOLERANCE["float64"])
    for key, param in ours(case, "float64")[0].items():
        assert np.abs(param - theirs[f"float64/{name}/{key}"]).max() > 1e-4


def test_a_16_bit_momentum_decays_by_a_rounded_b1_there(theirs: dict[str, np.ndarray]) -> None:
    """optax multiplies in bf16, by 0.8984 for b1 = 0.9; ours decays in fp32 and rounds once."""
    name, case = "mu_dtype, b1 rounded", CASES["mu_dtype, b1 rounded"]
    for key, param in ours(case, "float32")[0].items():
        # The factor moves the mean of m by 1.6 %, and the parameters have travelled up to LR * STEPS * 0.5.
        np.testing.assert_allclose(param, theirs[f"float32/{name}/{key}"], rtol=0, atol=0.016 * LR * STEPS * 0.5)
        assert np.abs(param - theirs[f"float32/{name}/{key}"]).max() > 1e-3


def test_zero_gradients_in_the_first_step_count_there_and_not_here(theirs: dict[str, np.ndarray]) -> None:
    """optax starts v at 0 and moves in the second step; ours takes the second step for the first."""
    found, optimizer = ours(CASES["zeros first"], "float64")
    assert [state["step"].item() for state in optimizer.state.values()] == [STEPS - 1.0] * 2
    for key, param in found.items():
        assert np.abs(param - theirs[f"float64/zeros first/{key}"]).max() > 1e-2
