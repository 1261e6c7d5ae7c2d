"""A step on zero gradients that a library takes to allocate state must not become ADOPT's first step.

ADOPT's v is an average without bias correction: v = 0 from such a step would be felt for 1 / (1 - β2) = 10,000 steps.
"""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from adopt_cases import same_bits
from torch import nn

from sharded_adopt import ADOPT
from sharded_adopt.adopt import has_nonzero, has_nonzero_on_device

modes = pytest.mark.parametrize("capturable", [False, True])


def param(*shape, seed=0):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def step_with(optimizer, *grads):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, grad in zip(params, grads, strict=True):
        p.grad = None if grad is None else torch.full_like(p, grad)
    optimizer.step()
    return [optimizer.state[p]["step"].item() if p in optimizer.state else None for p in params]


@modes
@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decouple": True}])
def test_a_dummy_step_makes_the_state_and_counts_for_nothing(capturable, decay):
    """Gradients as given: L2 decay makes zeros non-zero, but that is not a gradient."""
    p, q = param(4), param(4)
    guarded, plain = (
        ADOPT([p], lr=0.1, capturable=capturable, **decay),
        ADOPT([q], lr=0.1, capturable=capturable, **decay),
    )
    for _ in range(3):
        assert step_with(guarded, 0.0) == [0.0]
    assert set(guarded.state[p]) == {"step", "exp_avg", "exp_avg_sq"}
    assert same_bits(p.detach(), q.detach())
    for grad in (1.0, -2.0, 3.0):
        assert step_with(guarded, grad) == step_with(plain, grad)
    assert same_bits(p.detach(), q.detach())
    assert same_bits(guarded.state[p]["exp_avg_sq"], plain.state[q]["exp_avg_sq"])


@modes
def test_the_verdict_is_one_for_the_optimizer(capturable):
    """One gradient that is not zero makes it a real step, for the parameter whose gradient is zero too."""
    optimizer = ADOPT([{"params": [param(3)]}, {"params": [param(2, seed=1)]}], capturable=capturable)
    assert step_with(optimizer, 0.0, 0.0) == [0.0, 0.0]
    assert step_with(optimizer, 0.0, 1.0) == [1.0, 1.0]


@modes
@pytest.mark.parametrize("grad", [float("nan"), float("inf"), 1e-45])
def test_nan_inf_and_the_smallest_number_are_not_zero(capturable, grad):
    optimizer = ADOPT([param(3)], capturable=capturable)
    assert step_with(optimizer, grad) == [1.0]


@modes
def test_negative_zero_is_zero(capturable):
    assert step_with(ADOPT([param(3)], capturable=capturable), -0.0) == [0.0]


@modes
def test_once_stepped_zero_gradients_count(capturable):
    """A parameter that comes late with a zero gradient is initialised then, as the rule says."""
    optimizer = ADOPT([param(3), param(2)], capturable=capturable)
    assert step_with(optimizer, 1.0, None) == [1.0, None]
    assert step_with(optimizer, 0.0, None) == [2.0, None]
    assert step_with(optimizer, None, 0.0) == [2.0, 1.0]


@modes
def test_loaded_steps_count_as_stepped(capturable):
    optimizer = ADOPT([param(3), param(2)], capturable=capturable)
    step_with(optimizer, 1.0, 1.0)
    other = ADOPT([param(3), param(2)], capturable=capturable)
    other.load_state_dict(optimizer.state_dict())
    assert step_with(other, 0.0, 0.0) == [2.0, 2.0]
    assert step_with(copy.deepcopy(optimizer), 0.0, 0.0) == [2.0, 2.0]


@modes
def test_state_written_into_the_optimizer_counts_as_stepped(capturable):
    """DeepSpeed's universal checkpoint writes into optimizer.state instead of calling load_state_dict."""
    optimizer = ADOPT([param(3)], capturable=capturable)
    step_with(optimizer, 0.0)
    (p,) = optimizer.param_groups[0]["params"]
    optimizer.state[p]["step"].fill_(5.0)
    optimizer.state[p]["exp_avg_sq"].fill_(1.0)
    assert step_with(optimizer, 0.0) == [6.0]


def test_loading_a_dict_at_step_0_guards_again():
    optimizer = ADOPT([param(3)])
    step_with(optimizer, 0.0)
    fresh = copy.deepcopy(optimizer.state_dict())
    step_with(optimizer, 1.0)
    optimizer.load_state_dict(fresh)
    assert step_with(optimizer, 0.0) == [0.0]


def test_after_the_first_real_step_gradients_are_not_looked_at(monkeypatch):
    """The check costs a read of the gradients and of the host; it must be gone as soon as it is decided."""
    optimizer = ADOPT([param(3)])
    step_with(optimizer, 1.0)
    stepped = optimizer.state_dict()
    loaded = ADOPT([param(3)])
    loaded.load_state_dict(stepped)

    def forbidden(*args):
        raise AssertionError("looked")

    module = sys.modules["sharded_adopt.adopt"]  # the package's attribute of this name is the function
    monkeypatch.setattr(module, "has_nonzero", forbidden)
    monkeypatch.setattr(module, "has_nonzero_on_device", forbidden)
    step_with(optimizer, 0.0)
    step_with(loaded, 0.0)
    with pytest.raises(AssertionError, match="looked"):
        step_with(ADOPT([param(3)]), 1.0)


def test_an_engine_above_may_switch_the_guard_off():
    optimizer = ADOPT([param(3)])
    optimizer.guard_dummy_step = False
    assert step_with(optimizer, 0.0) == [1.0]


@modes
def test_a_first_step_with_found_inf_decides_nothing(capturable):
    optimizer = ADOPT([param(3)], capturable=capturable)
    optimizer.found_inf = torch.ones(())
    assert step_with(optimizer, float("inf")) == [0.0]
    del optimizer.found_inf
    assert step_with(optimizer, 0.0) == [0.0]
    assert step_with(optimizer, 1.0) == [1.0]


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_dcp_asks_a_fresh_optimizer_for_its_state_without_using_up_the_first_step(tensor_lr):
    """torch.distributed.checkpoint.state_dict takes a step with zero gradients and lr 0 to make state appear."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def make():
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, ADOPT(model.parameters(), lr=torch.tensor(0.1) if tensor_lr else 0.1)

    def train(model, optimizer, seed):
        for i in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed + i))).square().sum().backward()
            optimizer.step()
        optimizer.zero_grad()

    asked, plain = make(), make()
    state_dict = get_optimizer_state_dict(*asked)
    assert {v["step"].item() for v in state_dict["state"].values()} == {0.0}
    train(*asked, 0)
    train(*plain, 0)
    for p, q in zip(asked[0].parameters(), plain[0].parameters(), strict=True):
        assert same_bits(p, q)
        assert same_bits(asked[1].state[p]["exp_avg_sq"], plain[1].state[q]["exp_avg_sq"])

    for flatten in (False, True):  # flattened, every option is a key of its own
        options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        saved = copy.deepcopy(get_optimizer_state_dict(*asked, options=options))
        model, optimizer = make()
        model.load_state_dict(asked[0].state_dict())
        set_optimizer_state_dict(model, optimizer, saved, options=options)
        twin = copy.deepcopy(asked)
        train(model, optimizer, 7)
        train(*twin, 7)
        for p, q in zip(model.parameters(), twin[0].parameters(), strict=True):
            assert same_bits(p, q)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # saving from one process is what is meant
def test_dcp_saves_and_loads_through_files(tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = nn.Linear(3, 2)
    optimizer = ADOPT(model.parameters(), lr=0.1, clip_lambda={"exponent": 0.5, "scale": 2.0})
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path, no_dist=True)
    optimizer.zero_grad()
    other = ADOPT(model.parameters(), lr=0.5)
    loaded = {"optimizer": get_optimizer_state_dict(model, other)}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(model, other, loaded["optimizer"])
    assert other.param_groups[0]["clip_lambda"] == optimizer.param_groups[0]["clip_lambda"]
    assert other.param_groups[0]["lr"] == 0.1
    for p in model.parameters():
        assert all(same_bits(v, other.state[p][k]) for k, v in optimizer.state[p].items())


def test_has_nonzero_on_host_and_device_agree():
    zero, one = torch.zeros(3, 2), torch.tensor([0.0, 2.0])
    cases = [
        [],
        [zero],
        [one],
        [zero, one],
        [torch.zeros(0)],
        [zero.bfloat16()],
        [torch.tensor(1j)],
        [zero.to(torch.cfloat)],
    ]
    for grads in cases:
        on_device = has_nonzero_on_device(grads, torch.device("cpu"))
        assert on_device.shape == ()
        assert has_nonzero(grads) == on_device.item() == any(bool((g != 0).any()) for g in grads)
