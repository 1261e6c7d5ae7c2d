"""What ADOPT remembers between steps of small tensors never goes stale and holds nothing that was given back."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from sharded_adopt import ADOPT

Change = Callable[[ADOPT, list[Parameter]], None]


def _build() -> tuple[ADOPT, list[Parameter]]:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(n, generator=generator)) for n in (5, 70, 3, 40, 9)]
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.1, "weight_decay": 0.1}]
    return ADOPT(groups, lr=0.01), params


def _replace_a_moment(optimizer: ADOPT, params: list[Parameter]) -> None:
    optimizer.state[params[1]]["exp_avg"] = optimizer.state[params[1]]["exp_avg"] + 1


def _replace_a_step(optimizer: ADOPT, params: list[Parameter]) -> None:
    optimizer.state[params[4]]["step"] = torch.tensor(100.0)


def _replace_a_state(optimizer: ADOPT, params: list[Parameter]) -> None:
    optimizer.state[params[2]] = {k: v.clone() * 2 for k, v in optimizer.state[params[2]].items()}


def _forget_a_state(optimizer: ADOPT, params: list[Parameter]) -> None:
    del optimizer.state[params[3]]


def _forget_all(optimizer: ADOPT, params: list[Parameter]) -> None:
    optimizer.state.clear()


def _swap_storage(optimizer: ADOPT, params: list[Parameter]) -> None:
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data * 2


def _load(optimizer: ADOPT, params: list[Parameter]) -> None:
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][0]["exp_avg"] += 1
    optimizer.load_state_dict(state_dict)


def _exchange_a_parameter(optimizer: ADOPT, params: list[Parameter]) -> None:
    old, new = params[0], Parameter(params[0].detach() * 3)
    optimizer.param_groups[0]["params"][0] = params[0] = new
    optimizer.state[new] = optimizer.state.pop(old)


def _add_a_group(optimizer: ADOPT, params: list[Parameter]) -> None:
    params.append(Parameter(torch.ones(4)))
    optimizer.add_param_group({"params": [params[-1]]})


def _edit_options(optimizer: ADOPT, params: list[Parameter]) -> None:
    optimizer.param_groups[0].update(lr=0.5, betas=(0.5, 0.9), clip_lambda=None, maximize=True, weight_decay=0.3)


def _reorder(optimizer: ADOPT, params: list[Parameter]) -> None:
    optimizer.param_groups[0]["params"].reverse()


CHANGES = [
    _replace_a_moment,
    _replace_a_step,
    _replace_a_state,
    _forget_a_state,
    _forget_all,
    _swap_storage,
    _load,
    _exchange_a_parameter,
    _add_a_group,
    _edit_options,
    _reorder,
]


def _set_grads(params: list[Parameter], step: int, without: int | None) -> None:
    generator = torch.Generator().manual_seed(step)
    for i, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator)
        param.grad = None if i == without else grad


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_optimizer_is_noticed(change: Change) -> None:
    results = []
    for forgetful in (False, True):
        optimizer, params = _build()
        for step in range(6):
            if step == 3:
                assert optimizer._memory is not None, "the change must meet a memory to mean anything"
                change(optimizer, params)
            if forgetful:
                optimizer._memory = None
                optimizer._kernels = type(optimizer._kernels)()
            _set_grads(params, step, without=None)
            optimizer.step()
        results.append([*params, *(value for param in params for value in optimizer.state[param].values())])
    assert all(map(torch.equal, *results))


def test_a_gradient_that_comes_or_goes_is_noticed() -> None:
    results = []
    for forgetful in (False, True):
        optimizer, params = _build()
        for step, without in enumerate([None, None, 1, 1, 4, None, 0, None]):
            if forgetful:
                optimizer._memory = None
            _set_grads(params, step, without)
            optimizer.step()
        results.append([*params, *(optimizer.state[param]["step"] for param in params)])
    assert all(map(torch.equal, *results))
    assert [step.item() for step in results[0][5:]] == [7, 6, 8, 8, 7]


def test_loading_frees_the_state_that_it_replaces() -> None:
    optimizer, params = _build()
    for step in range(3):
        _set_grads(params, step, without=None)
        optimizer.step()
    old = [weakref.ref(value) for state in optimizer.state.values() for value in state.values()]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    gc.collect()
    assert [value() for value in old] == [None] * len(old)


def test_state_of_large_tensors_is_freed_as_soon_as_it_is_dropped() -> None:
    # as frameworks do that move the state away between phases of training
    param = Parameter(torch.ones(200_000))
    optimizer = ADOPT([param])
    for _ in range(3):
        param.grad = torch.ones(200_000)
        optimizer.step()
    old = weakref.ref(optimizer.state[param]["exp_avg"].untyped_storage())
    optimizer.state[param]["exp_avg"] = optimizer.state[param]["exp_avg"].clone()
    gc.collect()
    assert old() is None


def test_zero_grad_frees_the_gradients() -> None:
    optimizer, params = _build()
    for step in range(3):
        _set_grads(params, step, without=None)
        optimizer.step()
    grads: list[weakref.ref[Tensor]] = [weakref.ref(param.grad) for param in params if param.grad is not None]
    optimizer.zero_grad()
    gc.collect()
    assert [grad() for grad in grads] == [None] * 5


@pytest.mark.parametrize("foreach", [None, False, True])
def test_a_gradient_that_turns_sparse_is_refused_before_anything_changes(foreach: bool | None) -> None:
    params = [Parameter(torch.ones(4, 2)) for _ in range(3)]
    for groups in ([{"params": params}], [{"params": params[:2]}, {"params": params[2:]}]):
        optimizer = ADOPT(groups, lr=1.0, foreach=foreach)
        for _ in range(3):
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
        before = [param.detach().clone() for param in params]
        params[2].grad = torch.eye(4, 2).to_sparse()
        with pytest.raises(RuntimeError, match="that of parameter number"):
            optimizer.step()
        assert all(map(torch.equal, params, before))
        assert [optimizer.state[param]["step"].item() for param in params] == [3, 3, 3]


def test_a_gradient_that_turns_sparse_among_several_dtypes_is_refused_before_anything_moves():
    params = [torch.nn.Parameter(torch.ones(4, 2, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)]
    optimizer = ADOPT(params, lr=0.1)
    for _ in range(3):
        for p in params:
            p.grad = torch.full_like(p, 0.5)
        optimizer.step()
    before = [t.clone() for p in params for t in (p.detach(), *optimizer.state[p].values())]
    params[0].grad = torch.full_like(params[0], 0.25)
    params[1].grad = torch.full((4, 2), 0.25).to_sparse()
    with pytest.raises(RuntimeError, match="dense gradients"):
        optimizer.step()
    after = [t for p in params for t in (p.detach(), *optimizer.state[p].values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
