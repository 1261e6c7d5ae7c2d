"""Mistakes that public implementations of ADOPT have shipped, one test each.

The comments name who shipped it; versions are those that were read when the tests were written.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from adopt_cases import same_bits
from torch import nn

from sharded_adopt import ADOPT, PowerClip

all_kernels = pytest.mark.parametrize(
    "kernel", [{"foreach": False}, {"foreach": True}, {}], ids=["single", "foreach", "auto"]
)


def param(*values, dtype=torch.float32):
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def step_with(optimizer, *grads):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, grad in zip(params, grads, strict=True):
        p.grad = None if grad is None else torch.full_like(p, grad)
    optimizer.step()


def test_a_copy_of_an_optimizer_still_steps():
    """torch-adopt 0.1.0 keeps clip_lambda outside what torch copies: AttributeError at the next step."""
    optimizer = ADOPT([param(1.0)])
    step_with(optimizer, 1.0)
    step_with(copy.deepcopy(optimizer), 1.0)
    step_with(pickle.loads(pickle.dumps(optimizer)), 1.0)


def test_a_resumed_run_keeps_the_clip_it_was_started_with():
    """torch-adopt 0.1.0 and pytorch_optimizer leave the clip out of the state dict."""
    started = ADOPT([param(1.0)], lr=0.1, clip_lambda=None)
    step_with(started, 1.0)
    resumed = ADOPT([param(1.0)], lr=0.1)
    resumed.load_state_dict(started.state_dict())
    for optimizer in (started, resumed):
        step_with(optimizer, 100.0)
    (p,), (q,) = (o.param_groups[0]["params"] for o in (started, resumed))
    assert same_bits(p, q)
    assert p.item() == pytest.approx(1.0 - 0.1 * 0.1 * 100.0, abs=1e-6)  # not clipped


@all_kernels
def test_late_parameter_is_initialised_then(kernel):
    """Frozen at first, a module dropped out, an expert without tokens.

    torch-adopt's foreach path and timm up to 1.0.28 take the step of the list's first tensor, pytorch_optimizer the
    group's: the v of such a parameter starts at 0.
    """
    early, late, alone = param(1.0), param(1.0), param(1.0)
    optimizer = ADOPT([early, late], lr=0.1, **kernel)
    single = ADOPT([alone], lr=0.1, foreach=False)
    for _ in range(5):
        step_with(optimizer, 1.0, None)
    assert late not in optimizer.state
    for i, grad in enumerate((0.1, 0.3, -2.0, 0.5)):
        step_with(optimizer, 1.0, grad)
        step_with(single, grad)
        assert same_bits(late, alone)  # its own first step, and its own clip bounds
        assert optimizer.state[late]["step"] == i + 1
        assert same_bits(optimizer.state[late]["exp_avg_sq"], single.state[alone]["exp_avg_sq"])
    assert optimizer.state[early]["step"] == 9


@all_kernels
@pytest.mark.parametrize("capturable", [False, True])
def test_parameter_without_a_gradient_is_untouched_state_and_all(kernel, capturable):
    a, b = param(1.0, 2.0), param(3.0)
    optimizer = ADOPT([a, b], lr=0.1, weight_decay=0.1, decouple=True, capturable=capturable, **kernel)
    for grad in (1.0, 2.0, 3.0):
        step_with(optimizer, grad, grad)
    before = {k: v.clone() for k, v in optimizer.state[b].items()}
    theta = b.detach().clone()
    step_with(optimizer, 1.0, None)
    assert same_bits(b.detach(), theta)
    assert all(same_bits(v, optimizer.state[b][k]) for k, v in before.items())
    assert optimizer.state[a]["step"] == 4


@all_kernels
@pytest.mark.parametrize(("before", "after"), [(1.0, 10.0), (1.0, 0.1)])
def test_v_of_bf16_parameters_follows_the_gradient(kernel, before, after):
    """torch-adopt keeps v in bf16: after 3000 steps it stands at 4.0 instead of 26.65, or at 1.0 instead of 0.743."""
    p = param(0.0, dtype=torch.bfloat16)
    optimizer = ADOPT([p], lr=0.0, **kernel)
    step_with(optimizer, before)
    for _ in range(3000):
        step_with(optimizer, after)
    after = torch.tensor(after, dtype=torch.bfloat16).item()
    expected = after**2 + (before**2 - after**2) * 0.9999**3000
    assert optimizer.state[p]["exp_avg_sq"].item() == pytest.approx(expected, rel=1e-3)


@all_kernels
def test_a_dummy_step_does_not_use_up_the_initialisation(kernel):
    """Every ADOPT read: one step on zero gradients (DCP, torchtitan, DeepSpeed) leaves v = 0 for ever after."""
    p, q = param(1.0), param(1.0)
    dummied, plain = ADOPT([p], lr=0.1, **kernel), ADOPT([q], lr=0.1, **kernel)
    step_with(dummied, 0.0)
    for grad in (1.0, 2.0, 3.0):
        for optimizer in (dummied, plain):
            step_with(optimizer, grad)
    assert same_bits(p, q)


@all_kernels
def test_an_inf_gradient_that_was_found_does_not_kill_the_coordinate(kernel):
    """torch-adopt asserts that found_inf is None; one inf makes v = inf and the element never moves again."""
    p = param(1.0, 1.0)
    optimizer = ADOPT([p], lr=0.1, **kernel)
    step_with(optimizer, 1.0)
    optimizer.found_inf = torch.ones(())
    p.grad = torch.tensor([float("inf"), 1.0])
    optimizer.step()
    del optimizer.found_inf
    assert optimizer.state[p]["exp_avg_sq"].tolist() == [1.0, 1.0]
    step_with(optimizer, 1.0)
    assert p.tolist() == [pytest.approx(0.99)] * 2


@all_kernels
def test_v_of_the_step_before_normalises(kernel):
    """pytorch_optimizer before 3.4.0 and three other ports used the v that holds the gradient itself."""
    p = param(0.0)
    optimizer = ADOPT([p], lr=1.0, betas=(0.0, 0.0), clip_lambda=None, **kernel)
    step_with(optimizer, 2.0)
    step_with(optimizer, 6.0)
    assert p.item() == -3.0  # 6 / 2; with its own v it would be 6 / 6


@all_kernels
def test_momentum_averages_normalised_gradients_without_bias_correction(kernel):
    """HeavyBall 2.0.0 to 3.1.1 moved by the raw gradient; Levanter corrects the bias of m; v1 gave n_1 full weight."""
    p = param(0.0)
    optimizer = ADOPT([p], lr=1.0, betas=(0.5, 0.9999), clip_lambda=None, **kernel)
    step_with(optimizer, 4.0)
    step_with(optimizer, 8.0)
    assert optimizer.state[p]["exp_avg"].item() == 1.0  # (1 - 1/2) * 8 / 4
    assert p.item() == -1.0


@all_kernels
def test_first_update_is_clipped_at_one(kernel):
    """pytorch_optimizer's bound runs one ahead: 2 ** 0.25 = 1.19 at the first update."""
    p = param(0.0)
    optimizer = ADOPT([p], lr=1.0, betas=(0.0, 0.9999), **kernel)
    step_with(optimizer, 1.0)
    step_with(optimizer, 50.0)
    assert p.item() == -1.0
    step_with(optimizer, 50.0)
    assert optimizer.state[p]["exp_avg"].item() == pytest.approx(2**0.25, rel=1e-7)


@all_kernels
@pytest.mark.parametrize("decay", [{"weight_decay": 0.5, "decouple": True}, {"weight_decay": 0.5}])
def test_nothing_moves_at_the_first_step_not_even_by_decay(kernel, decay):
    """pytorch_optimizer, optax chains and lucidrains decay at step 0 too."""
    p = param(1.0)
    optimizer = ADOPT([p], lr=0.1, **decay, **kernel)
    step_with(optimizer, 2.0)
    assert p.item() == 1.0
    # L2 decay is part of the gradient, and so of the first v
    assert optimizer.state[p]["exp_avg_sq"].item() == (4.0 if decay.get("decouple") else 6.25)


@all_kernels
def test_eps_is_a_lower_clamp(kernel):
    """adv_optm and Levanter add it."""
    p = param(0.0)
    optimizer = ADOPT([p], lr=1.0, betas=(0.0, 0.9999), eps=0.5, clip_lambda=None, **kernel)
    step_with(optimizer, 2.0)
    step_with(optimizer, 2.0)
    assert p.item() == -1.0  # 2 / max(2, 1/2), not 2 / 2.5


def test_bound_grows_with_the_fourth_root_by_default():
    """timm's default exponent is 0.333, HeavyBall has no clip."""
    assert ADOPT([param(0.0)]).param_groups[0]["clip_lambda"] == PowerClip(0.25, 1.0)


@all_kernels
def test_gradients_are_not_edited_by_decay_or_maximize(kernel):
    """pytorch_optimizer applies both to p.grad in place."""
    p = param(1.0, 2.0)
    optimizer = ADOPT([p], weight_decay=0.5, maximize=True, **kernel)
    for _ in range(3):
        step_with(optimizer, 3.0)
        assert p.grad.tolist() == [3.0, 3.0]
