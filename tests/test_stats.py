"""Figures of the last step: held to what the step really did to the parameters, for every kernel and option."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from adopt_cases import same_bits
from test_kernels_rule import no_host_reads
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sharded_adopt import ADOPT, ADOPTW, PowerClip
from sharded_adopt import statistics as statistics_module
from sharded_adopt.statistics import Statistics

NAMES = {"update_rms", "clipped_share", "grad_norm"}
KERNELS: dict[str, dict[str, Any]] = {"auto": {}, "reference": {"foreach": False}, "foreach": {"foreach": True}}


def make_params(
    dtype: torch.dtype = torch.float64, shapes: Any = ((7, 3), (5,), (1,), (0,), (300,))
) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)) for shape in shapes]


def give_grads(params: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    random = torch.Generator().manual_seed(10 + step)
    for param in params:
        dtype = torch.complex128 if param.is_complex() else torch.float64
        grad = torch.randn(param.shape, generator=random, dtype=dtype)
        param.grad = (grad * 10.0 ** torch.randn(param.shape, generator=random, dtype=torch.float64) * scale).to(
            param.dtype
        )


def values(figures: dict[str, Tensor]) -> dict[str, float]:
    assert set(figures) == NAMES
    assert all(value.shape == () and value.dtype is torch.float32 for value in figures.values())
    return {name: value.item() for name, value in figures.items()}


def real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def expected(params: list[nn.Parameter], state: list[dict[str, Tensor]], group: dict[str, Any]) -> dict[str, float]:
    """From the definition, one element after the other, before the step; the update is taken from the parameters."""
    updated = clipped = 0
    grad_sq = 0.0
    for param, held in zip(params, state, strict=True):
        if param.grad is None:
            continue
        grads, thetas = real(param.grad).flatten().tolist(), real(param.detach()).flatten().tolist()
        vs = real(held["exp_avg_sq"]).flatten().tolist() if held else [0.0] * len(grads)
        step = int(held["step"]) if held else 0
        for g, theta, v in zip(grads, thetas, vs, strict=True):
            grad_sq += g * g
            if step == 0 or (group["init"] == "element" and v == 0):
                continue
            g = -g if group["maximize"] else g
            g += 0.0 if group["decouple"] else group["weight_decay"] * theta
            updated += 1
            clip = group["clip_lambda"]
            clipped += clip is not None and abs(g / max(math.sqrt(v), group["eps"])) > clip(step)
    return {"updated": updated, "clipped_share": clipped / max(updated, 1), "grad_norm": math.sqrt(grad_sq)}


def take_step(params: list[nn.Parameter], optimizer: ADOPT) -> None:
    """One step whose figures are compared with what it did."""
    group = optimizer.param_groups[0]
    wanted = expected(params, [dict(optimizer.state.get(p, {})) for p in params], group)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    found = values(optimizer.stats())
    decay = group["lr"] * group["weight_decay"] if group["decouple"] else 0.0
    # A first step does not decay, so where nothing moved nothing is expected to have.
    moved = (
        [real(old * (1 - decay) - p.detach()) for old, p in zip(before, params, strict=True)]
        if wanted["updated"]
        else []
    )
    total = sum(float(one.square().sum()) for one in moved)
    rms = math.sqrt(total / max(wanted["updated"], 1)) / group["lr"]
    assert found["update_rms"] == pytest.approx(rms, rel=1e-5)
    assert found["clipped_share"] == pytest.approx(wanted["clipped_share"], rel=1e-6)
    assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-6)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"nesterov": True, "betas": (0.5, 0.9)},
    {"weight_decay": 0.3},
    {"weight_decay": 0.3, "maximize": True},
    {"weight_decay": 0.3, "decouple": True},
    {"clip_lambda": None},
    {"clip_lambda": lambda step: 0.1 * step},
    {"eps": 0.5},
]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", OPTIONS)
def test_the_figures_are_those_of_what_the_step_did(kernel, options) -> None:
    params = make_params()
    optimizer = ADOPT(params, lr=0.01, **KERNELS[kernel], **options)
    optimizer.stats()
    for step in range(5):
        give_grads(params, step)
        take_step(params, optimizer)


def test_clipped_share_is_a_share() -> None:
    params = make_params()
    optimizer = ADOPT(params, clip_lambda=PowerClip(0.0, 1e-9))
    optimizer.stats()
    for step in range(2):
        give_grads(params, step)
        optimizer.step()
    assert 0.99 < optimizer.stats()["clipped_share"] <= 1.0


@pytest.mark.parametrize("numel", [1 << 10, 64])
def test_it_does_not_matter_how_the_lists_are_cut(numel, monkeypatch) -> None:
    found = []
    for limit in (1 << 18, numel):
        monkeypatch.setattr(statistics_module, "_CPU_BLOCK_NUMEL", limit)
        params = make_params(torch.float32, shapes=((3000,), (40, 50), (3,)))
        optimizer = ADOPT(params)
        optimizer.stats()
        for step in range(3):
            give_grads(params, step)
            optimizer.step()
        found.append(values(optimizer.stats()))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_parameters_that_come_late_have_their_own_step() -> None:
    params = make_params()
    optimizer = ADOPT(params, lr=0.01, clip_lambda=PowerClip(1.0, 0.2))
    optimizer.stats()
    for step in range(6):
        give_grads(params, step)
        if step < 3:
            params[1].grad = None
        if step == 4:
            params[0].grad = None
        if step == 5:
            # a decay would move nothing of a parameter in its first step, so its figures can be told apart
            take_step([p for p in params if p.grad is not None], optimizer)
        else:
            optimizer.step()


@pytest.mark.parametrize("capturable", [False, True])
def test_elements_that_are_only_initialised_do_not_count(capturable) -> None:
    params = make_params(shapes=((6,),))
    optimizer = ADOPT(params, lr=0.01, init="element", capturable=capturable)
    optimizer.stats()
    for step in range(4):
        give_grads(params, step)
        params[0].grad[step + 1 :] = 0.0
        take_step(params, optimizer)


def test_complex_parameters_count_as_pairs() -> None:
    params = make_params(torch.complex128)
    optimizer = ADOPT(params, lr=0.01)
    optimizer.stats()
    for step in range(3):
        give_grads(params, step)
        take_step(params, optimizer)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_recording_does_not_change_a_bit_of_the_update(kernel, dtype) -> None:
    runs = []
    for record in (False, True):
        params = make_params(dtype)
        optimizer = ADOPT(params, lr=0.01, weight_decay=0.1, nesterov=True, init="element", **KERNELS[kernel])
        if record:
            optimizer.stats()
        for step in range(4):
            give_grads(params, step)
            grads = [p.grad.clone() for p in params]
            optimizer.step()
            assert all(same_bits(p.grad, g) for p, g in zip(params, grads, strict=True))
        runs.append([p.detach() for p in params] + [v for p in params for v in optimizer.state[p].values()])
    assert all(same_bits(a, b) for a, b in zip(*runs, strict=True))


def test_nothing_is_recorded_unless_asked_for_and_no_more_after_that() -> None:
    params = make_params()
    optimizer = ADOPT(params)
    give_grads(params, 0)
    optimizer.step()
    assert optimizer.statistics is None
    assert all(math.isnan(value) for value in values(optimizer.stats()).values())  # from the next step on
    optimizer.step()
    last = values(optimizer.stats(False))
    assert last["update_rms"] > 0
    assert optimizer.statistics is None
    optimizer.step()
    assert all(math.isnan(value) for value in values(optimizer.stats()).values())


def test_a_first_step_is_no_update_but_has_a_gradient() -> None:
    params = make_params()
    optimizer = ADOPTW(params)
    optimizer.stats()
    give_grads(params, 0)
    optimizer.step()
    found = values(optimizer.stats())
    assert (found["update_rms"], found["clipped_share"]) == (0.0, 0.0)
    assert found["grad_norm"] == pytest.approx(math.sqrt(sum(float(p.grad.square().sum()) for p in params)), rel=1e-6)


def test_a_dummy_step_leaves_them_as_they_were() -> None:
    params = make_params()
    optimizer = ADOPT(params)
    optimizer.stats()
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert all(math.isnan(value) for value in values(optimizer.stats()).values())


@pytest.mark.parametrize("capturable", [False, True])
def test_a_skipped_step_leaves_them_as_they_were_and_the_scale_is_taken_out(capturable) -> None:
    params, plain_params = make_params(), make_params()
    optimizer, plain = (ADOPT(p, lr=0.01, capturable=capturable) for p in (params, plain_params))
    optimizer.stats(), plain.stats()
    optimizer.grad_scale = torch.tensor(8.0)
    for step in range(3):
        give_grads(params, step, scale=8.0)
        give_grads(plain_params, step)
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
        plain.step()
    before = values(optimizer.stats())
    assert before == pytest.approx(values(plain.stats()), rel=1e-6)
    params[0].grad[0] = torch.inf
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert values(optimizer.stats()) == before


@pytest.mark.parametrize("options", [{}, {"nesterov": True, "weight_decay": 0.1, "maximize": True}])
def test_capturable_gives_the_same_without_reading_anything_on_the_host(options) -> None:
    found = []
    for capturable in (False, True):
        params = make_params(torch.float32)
        optimizer = ADOPT(params, lr=0.01, capturable=capturable, foreach=True, **options)
        optimizer.stats()
        for step in range(4):
            give_grads(params, step)
            if capturable and step:
                optimizer.found_inf = torch.zeros(())
                with no_host_reads():
                    optimizer.step()
                    optimizer.stats()
            else:
                optimizer.step()
        found.append(values(optimizer.stats()))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # dynamo's own imports
def test_a_compiled_step_records_in_its_graph() -> None:
    found = []
    for compiled in (False, True):
        params = make_params(torch.float32)
        optimizer = ADOPT(params, lr=0.01)
        optimizer.stats()
        step_it = optimizer.step
        if compiled:
            torch._dynamo.reset()
            step_it = torch.compile(lambda o=optimizer: o.step(), backend="aot_eager", fullgraph=True)
        for step in range(4):
            give_grads(params, step)
            step_it()
            found.append(values(optimizer.stats()))
    for eager, traced in zip(found[:4], found[4:], strict=True):
        assert traced == pytest.approx(eager, rel=1e-5)


def test_copies_and_loads_do_not_carry_recording() -> None:
    params = make_params()
    optimizer = ADOPT(params)
    optimizer.stats()
    give_grads(params, 0)
    optimizer.step()
    assert copy.deepcopy(optimizer).statistics is None
    assert pickle.loads(pickle.dumps(optimizer)).statistics is None
    before = values(optimizer.stats())
    optimizer.load_state_dict(optimizer.state_dict())
    assert values(optimizer.stats()) == before
    assert "statistics" not in optimizer.state_dict()


class LargestTemporary(TorchDispatchMode):
    """Watches how many elements a tensor has that some operation allocates."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in known:
                self.numel = max(self.numel, leaf.numel())
        return out


def test_temporaries_are_bounded_however_large_a_parameter_is() -> None:
    limit = statistics_module._CPU_BLOCK_NUMEL
    param = torch.zeros(5 * limit + 3)
    lists = ([param], [param + 1], [param], [param + 2], [torch.ones(())])
    group = ADOPT([nn.Parameter(param)], weight_decay=0.1, nesterov=True, init="element").param_groups[0]
    statistics = Statistics(param.device)
    with LargestTemporary() as watch:
        statistics.measure(lists, {**group, "beta1": 0.9, "grad_scale": torch.ones(())}, [])
    assert watch.numel == limit


def test_all_options_together_on_every_kernel_agree() -> None:
    found = []
    for kernel, dtype in itertools.product(KERNELS, (torch.float32, torch.bfloat16)):
        params = make_params(dtype)
        optimizer = ADOPT(params, lr=0.01, nesterov=True, init="element", state_dtype=torch.float32, **KERNELS[kernel])
        optimizer.stats()
        for step in range(4):
            give_grads(params, step)
            optimizer.step()
        found.append((dtype, values(optimizer.stats())))
    for dtype, figures in found:
        assert figures == pytest.approx(next(f for d, f in found if d is dtype), rel=1e-6)
