"""ADOPT as a torch.optim.Optimizer: arguments, groups, hooks, state, and what each step touches."""

from __future__ import annotations

import copy
import doctest
import importlib
import inspect
import math
import pickle

import pytest
import torch
from adopt_cases import same_bits
from torch import nn

import sharded_adopt
from sharded_adopt import ADOPT, ADOPTW, PowerClip, adopt

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def param(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def steps(optimizer, params, count, seed=0):
    """`count` steps with the same gradients every time it is called with the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def test_defaults_are_the_papers():
    signature = inspect.signature(ADOPT)
    assert [n for n, p in signature.parameters.items() if p.kind is not p.KEYWORD_ONLY] == [
        "params", "lr", "betas", "eps", "clip_lambda", "weight_decay", "decouple",
    ]  # fmt: skip
    group = ADOPT([param(1)]).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-3, (0.9, 0.9999), 1e-6, 0.0)
    assert group["clip_lambda"] == PowerClip(0.25)
    assert not group["decouple"]


def test_adoptw_is_adopt_with_the_decay_of_adamw():
    group = ADOPTW([param(1)]).param_groups[0]
    assert group["decouple"]
    assert group["weight_decay"] == 0.01
    assert ADOPTW([param(1)], weight_decay=0.3, nesterov=True).param_groups[0]["weight_decay"] == 0.3
    one, other = param(5), param(5)
    steps(ADOPTW([one], lr=0.1), [one], 4)
    steps(ADOPT([other], lr=0.1, decouple=True, weight_decay=0.01), [other], 4)
    assert same_bits(one, other)


def test_public_names_come_from_the_package():
    assert sharded_adopt.ADOPT is ADOPT
    assert sharded_adopt.adopt is adopt


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1e-3),
        ("lr", math.nan),
        ("lr", math.inf),
        ("lr", True),
        ("lr", "1e-3"),
        ("lr", None),
        ("lr", torch.ones(2)),
        ("lr", torch.tensor(-1.0)),
        ("lr", torch.tensor(1)),
        ("betas", (0.9,)),
        ("betas", (0.9, 0.99, 0.999)),
        ("betas", 0.9),
        ("betas", "ab"),
        ("betas", (1.0, 0.999)),
        ("betas", (0.9, 1.0)),
        ("betas", (-0.1, 0.999)),
        ("betas", (0.9, math.nan)),
        ("betas", (0.9, True)),
        ("eps", -1e-8),
        ("eps", math.nan),
        ("eps", None),
        ("clip_lambda", "step**0.25"),
        ("clip_lambda", -0.25),
        ("weight_decay", -0.1),
        ("weight_decay", math.inf),
        ("decouple", 1),
        ("maximize", "yes"),
        ("capturable", None),
        ("differentiable", 0),
        ("nesterov", 2),
        ("foreach", 1),
        ("fused", "yes"),
        ("init", "row"),
        ("init", None),
        ("state_dtype", torch.int32),
        ("state_dtype", "float32"),
        ("state_dtype", torch.complex64),
        ("state_dtype", (torch.float32,)),
        ("state_dtype", (torch.float32, torch.bool)),
    ],
)
@pytest.mark.parametrize("where", ["constructor", "group", "add_param_group"])
def test_bad_value_is_an_error_that_names_the_argument_and_the_value(name, value, where):
    optimizer = ADOPT([param(2)])
    bad = {name: value}
    attempts = {
        "constructor": lambda: ADOPT([param(2)], **bad),
        "group": lambda: ADOPT([{"params": [param(2)], **bad}]),
        "add_param_group": lambda: optimizer.add_param_group({"params": [param(2)], **bad}),
    }
    with pytest.raises(ValueError, match=name) as error:
        attempts[where]()
    shown = [value.item()] if isinstance(value, torch.Tensor) and value.numel() == 1 else [value]
    if name == "betas" and isinstance(value, tuple):  # the whole, or the one that is wrong
        shown += value
    assert any(repr(part) in str(error.value) for part in shown)
    assert len(optimizer.param_groups) == 1


def test_contradictions_are_refused():
    for options in ({"foreach": True, "fused": True}, {"foreach": True, "differentiable": True}):
        with pytest.raises(ValueError, match="foreach=True"):
            ADOPT([param(2)], **options)
    with pytest.raises(ValueError, match="differentiable"):
        ADOPT([param(2)], fused=True, differentiable=True)


def test_no_parameters_a_parameter_twice_and_other_things_are_refused():
    with pytest.raises(ValueError, match="empty parameter list"):
        ADOPT([])
    with pytest.raises(TypeError, match="iterable"):
        ADOPT(torch.ones(2))
    with pytest.raises(TypeError, match="ordered"):
        ADOPT([{"params": {param(2)}}])
    with pytest.raises(TypeError, match="Tensors"):
        ADOPT(["weight"])
    p = param(2, 3)
    with pytest.raises(ValueError, match=r"number 0 of the group \(shape \(2, 3\)\) is in the optimizer already"):
        ADOPT([{"params": [p]}, {"params": [p]}])
    with pytest.raises(ValueError, match="parameter tied "):
        ADOPT([("weight", p), ("tied", p)])


def test_betas_may_be_a_list_and_numbers_may_be_integers():
    group = ADOPT([param(2)], lr=1, betas=[0, 0.5], eps=0, weight_decay=0).param_groups[0]
    assert group["betas"] == (0.0, 0.5)
    assert group["lr"] == 1.0


@pytest.mark.parametrize("clip", [0.25, {"exponent": 0.25, "scale": 1.0}, {"exponent": 0.25}])
def test_clip_as_a_json_config_writes_it(clip):
    assert ADOPT([param(2)], clip_lambda=clip).param_groups[0]["clip_lambda"] == PowerClip(0.25)


def test_groups_step_with_their_own_values_and_edits_count_at_the_next_step():
    a, b, alone = param(4), param(4), param(4)
    optimizer = ADOPT([{"params": [a], "lr": 0.5, "clip_lambda": None}, {"params": [b]}], lr=0.1)
    single = ADOPT([alone], lr=0.5, clip_lambda=None)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.1]
    steps(optimizer, [a], 3)
    steps(single, [alone], 3)
    assert same_bits(a, alone)
    for o, g in ((optimizer, 0), (single, 0)):
        o.param_groups[g].update(lr=0.01, betas=[0.5, 0.9], clip_lambda=0.5, weight_decay=0.1, decouple=True)
    steps(optimizer, [a], 2, seed=1)
    steps(single, [alone], 2, seed=1)
    assert same_bits(a, alone)
    assert b.grad is None
    assert b not in optimizer.state


def test_group_added_later_starts_at_step_0():
    a, b = param(3), param(3, seed=1)
    optimizer = ADOPT([a])
    steps(optimizer, [a], 3)
    optimizer.add_param_group({"params": b, "lr": 0.5})
    before = b.detach().clone()
    steps(optimizer, [a, b], 1)
    assert optimizer.state[b]["step"] == 1
    assert optimizer.state[a]["step"] == 4
    assert same_bits(b, before)


def test_named_parameters_keep_their_names_and_errors_use_them():
    model = nn.Sequential(nn.Linear(2, 3), nn.Embedding(4, 2, sparse=True))
    optimizer = ADOPT(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.weight"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["0.weight", "0.bias", "1.weight"]
    model[1](torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"1\.weight.*sparse"):
        optimizer.step()


@pytest.mark.parametrize("foreach", [False, True, None])
def test_sparse_gradient_is_refused_before_anything_changes(foreach):
    dense, sparse = param(3), param(4, 2)
    optimizer = ADOPT([dense, sparse], lr=1.0, foreach=foreach)
    steps(optimizer, [dense], 2)
    before = dense.detach().clone()
    sparse.grad = torch.eye(4, 2).to_sparse()
    with pytest.raises(RuntimeError, match=r"number 1 of its group \(shape \(4, 2\)\)"):
        optimizer.step()
    assert same_bits(dense, before)
    assert optimizer.state[dense]["step"] == 2


@pytest.mark.parametrize("foreach", [False, True, None])
def test_gradient_that_turns_sparse_later_is_refused_too(foreach):
    p = param(4, 2)
    optimizer = ADOPT([("table", p)], lr=1.0, foreach=foreach)
    steps(optimizer, [p], 3)
    before = p.detach().clone()
    p.grad = torch.eye(4, 2).to_sparse()
    with pytest.raises(RuntimeError, match="table"):
        optimizer.step()
    assert same_bits(p, before)


def test_closure_runs_with_autograd_and_its_value_comes_back():
    p = param(3)
    optimizer = ADOPT([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(50)]
    assert losses[-1] < losses[0]
    assert optimizer.step() is None


def test_step_hooks_fire_once_each():
    p = param(3)
    optimizer = ADOPTW([p])
    seen = []
    optimizer.register_step_pre_hook(lambda *a: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *a: seen.append("post"))
    steps(optimizer, [p], 2)
    assert seen == ["pre", "post"] * 2


def test_a_step_never_writes_gradients():
    p = param(5)
    for options in ({"maximize": True, "weight_decay": 0.1}, {"foreach": True, "weight_decay": 0.1, "maximize": True}):
        optimizer = ADOPT([p], **options)
        for _ in range(3):
            grad = torch.randn(5)
            p.grad = grad.clone()
            optimizer.step()
            assert same_bits(p.grad, grad)


def test_maximize_goes_the_other_way():
    one, other = param(5), nn.Parameter(-param(5).detach())
    up, down = ADOPT([one], lr=0.1, maximize=True), ADOPT([other], lr=0.1)
    steps(up, [one], 4)
    steps(down, [other], 4)
    assert same_bits(one.detach(), -other.detach())


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("capturable", [False, True])
def test_empty_and_0_dim_parameters_step(foreach, capturable):
    params = [param(0), param(), param(2, 0, 3), param(3)]
    optimizer = ADOPT(params, lr=0.1, foreach=foreach, capturable=capturable)
    steps(optimizer, params, 3)
    assert [optimizer.state[p]["step"].item() for p in params] == [3.0] * 4
    assert [optimizer.state[p]["exp_avg"].shape for p in params] == [p.shape for p in params]


@pytest.mark.parametrize("foreach", [False, True])
def test_complex_parameters_step_as_pairs_of_real_ones(foreach):
    real = param(4, 2)
    pair = nn.Parameter(torch.view_as_complex(real.detach().clone()))
    options = {"lr": 0.1, "weight_decay": 0.1, "foreach": foreach, "nesterov": True, "init": "element"}
    optimizers = ADOPT([real], **options), ADOPT([pair], **options)
    for step in range(5):
        grad = torch.randn(4, 2, generator=torch.Generator().manual_seed(step))
        real.grad, pair.grad = grad, torch.view_as_complex(grad.clone())
        for optimizer in optimizers:
            optimizer.step()
    assert same_bits(torch.view_as_real(pair.detach()), real.detach())
    conjugate = torch.view_as_complex(torch.randn(4, 2)).conj()
    pair.grad = conjugate  # a lazy conjugation has no real view
    optimizers[1].step()


def test_mixed_real_and_complex_parameters_share_a_group():
    params = [param(3), nn.Parameter(torch.randn(3, dtype=torch.complex64)), param(2, dtype=BF16)]
    optimizer = ADOPT(params, lr=0.1)
    steps(optimizer, params, 3)
    assert [optimizer.state[p]["exp_avg"].dtype for p in params] == [F32, torch.complex64, F32]


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "expected"),
    [
        (F32, None, (F32, F32)),
        (F64, None, (F64, F64)),
        (BF16, None, (F32, F32)),
        (F16, None, (F32, F32)),
        (BF16, BF16, (BF16, BF16)),
        (F32, (F32, BF16), (F32, BF16)),
        (F32, (BF16, None), (BF16, F32)),
        (BF16, (None, F16), (F32, F16)),
        (F64, F32, (F32, F32)),
        (F32, F64, (F64, F64)),
        (torch.complex64, None, (torch.complex64, torch.complex64)),
    ],
)
@pytest.mark.parametrize("foreach", [False, True])
def test_state_has_the_dtypes_that_were_asked_for(dtype, state_dtype, expected, foreach):
    p = param(6, dtype=dtype)
    optimizer = ADOPT([p], state_dtype=state_dtype, foreach=foreach)
    steps(optimizer, [p], 3)
    state = optimizer.state[p]
    assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == expected
    assert p.dtype == dtype
    assert state["step"].dtype == F32
    assert state["step"].shape == ()
    assert list(state) == ["step", "exp_avg", "exp_avg_sq"]


def test_state_dtype_with_a_complex_parameter_is_refused():
    with pytest.raises(ValueError, match="complex"):
        ADOPT([nn.Parameter(torch.ones(2, dtype=torch.complex64))], state_dtype=F32)


def test_state_keeps_the_layout_of_its_parameter():
    p = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    optimizer = ADOPT([p])
    steps(optimizer, [p], 1)
    assert optimizer.state[p]["exp_avg_sq"].stride() == p.stride()


def test_state_is_made_at_the_first_step_or_by_init_state():
    a, b = param(3), param(4, dtype=BF16)
    optimizer = ADOPT([a, b])
    assert not optimizer.state
    optimizer.init_state(b)
    assert {k: v.dtype for k, v in optimizer.state[b].items()} == {"step": F32, "exp_avg": F32, "exp_avg_sq": F32}
    kept = optimizer.state[b]["exp_avg"]
    optimizer.init_state(b)
    assert optimizer.state[b]["exp_avg"] is kept
    with pytest.raises(StopIteration):
        optimizer.init_state(param(1))


def test_parameters_swapped_before_the_first_step_are_the_ones_that_count():
    """DeepSpeed puts flat fp32 copies into the groups of a finished optimizer."""
    original, swapped = param(3, dtype=BF16), param(3)
    optimizer = ADOPT([original], lr=0.1)
    optimizer.param_groups[0]["params"] = [swapped]
    steps(optimizer, [swapped], 2)
    assert list(optimizer.state) == [swapped]


def test_schedulers_drive_lr_and_cycle_betas():
    p = param(3)
    optimizer = ADOPT([p], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2.0, total_steps=10)
    lrs, beta1s = [], []
    for _ in range(9):
        p.grad = torch.ones(3)
        optimizer.step()
        scheduler.step()
        lrs.append(optimizer.param_groups[0]["lr"])
        beta1s.append(optimizer.param_groups[0]["betas"][0])
    assert max(lrs) > 1.9
    assert min(beta1s) < 0.86 < max(beta1s)


@pytest.mark.parametrize("foreach", [False, True])
def test_schedulers_move_a_tensor_lr_in_place(foreach):
    p, q = param(3), param(3)
    tensor, number = ADOPT([p], lr=torch.tensor(0.5), foreach=foreach), ADOPT([q], lr=0.5, foreach=foreach)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5) for o in (tensor, number)]
    kept = tensor.param_groups[0]["lr"]
    for seed in range(6):
        steps(tensor, [p], 1, seed)
        steps(number, [q], 1, seed)
        for scheduler in schedulers:
            scheduler.step()
    assert tensor.param_groups[0]["lr"] is kept
    assert same_bits(p, q)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_the_optimizer_goes_on_as_the_original(duplicate):
    p, q = param(5), param(5, dtype=BF16, seed=1)
    optimizer = ADOPT([p, q], lr=0.1, clip_lambda=PowerClip(0.5, 2.0), state_dtype=(F32, BF16))
    optimizer.element_starts[q] = 12345
    optimizer.guard_dummy_step = False
    steps(optimizer, [p, q], 3)
    other = duplicate(optimizer)
    p2, q2 = other.param_groups[0]["params"]
    assert p2 is not p
    assert list(other.element_starts.items()) == [(q2, 12345)]
    assert other.guard_dummy_step is False
    steps(optimizer, [p, q], 3, seed=7)
    steps(other, [p2, q2], 3, seed=7)
    assert same_bits(p, p2)
    assert same_bits(q, q2)
    assert same_bits(optimizer.state[q]["exp_avg_sq"], other.state[q2]["exp_avg_sq"])
    assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    with pytest.raises(ValueError, match="lr"):
        other.add_param_group({"params": [param(1)], "lr": -1})


def test_a_copy_made_before_the_first_step_still_guards_against_a_dummy_step():
    p = param(3)
    other = copy.deepcopy(ADOPT([p]))
    (q,) = other.param_groups[0]["params"]
    q.grad = torch.zeros(3)
    other.step()
    assert other.state[q]["step"] == 0


def test_element_starts_make_a_cut_parameter_round_as_the_whole():
    whole = param(64)
    pieces = [nn.Parameter(t.clone()) for t in whole.detach().split(20)]
    optimizers = ADOPT([whole], state_dtype=BF16), ADOPT(pieces, state_dtype=BF16)
    for i, piece in enumerate(pieces):
        optimizers[1].element_starts[piece] = 20 * i
    for step in range(5):
        whole.grad = torch.randn(64, generator=torch.Generator().manual_seed(step))
        for piece, grad in zip(pieces, whole.grad.split(20), strict=True):
            piece.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    joined = torch.cat([optimizers[1].state[p]["exp_avg_sq"] for p in pieces])
    assert same_bits(joined, optimizers[0].state[whole]["exp_avg_sq"])
    assert same_bits(torch.cat([p.detach() for p in pieces]), whole.detach())


def test_differentiable_gives_the_derivative_through_the_steps():
    """d(θ after 4 steps)/d(lr scale of the gradients' weight), against finite differences in fp64."""

    def run(weight):
        p = torch.ones(3, dtype=F64).clone().requires_grad_()
        theta = p.clone()
        optimizer = ADOPT([theta], lr=0.1, differentiable=True, clip_lambda=None)
        for step in range(4):
            theta.grad = weight * (theta - torch.arange(3.0, dtype=F64)) * (1 + step)
            optimizer.step()
        return theta.square().sum()

    weight = torch.tensor([0.3, 0.5, 0.7], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (weight,), eps=1e-6, atol=1e-6)


def test_differentiable_has_no_nan_where_a_gradient_is_zero():
    weight = torch.ones(2, requires_grad=True)
    theta = torch.ones(2).requires_grad_().clone()
    optimizer = ADOPT([theta], lr=0.1, differentiable=True)
    for _ in range(3):
        theta.grad = weight * torch.tensor([0.0, 1.0])
        optimizer.step()
    theta.sum().backward()
    assert weight.grad.isfinite().all()


def test_differentiable_learns_the_learning_rate():
    lr = torch.tensor(0.1, requires_grad=True)
    theta = torch.ones(2).requires_grad_().clone()
    optimizer = ADOPT([theta], lr=lr, differentiable=True, weight_decay=0.1, decouple=True)
    for _ in range(3):
        theta.grad = torch.tensor([1.0, -1.0])
        optimizer.step()
    theta.sum().backward()
    assert lr.grad.isfinite()
    assert lr.grad != 0


def functional_lists():
    p = param(4).detach()
    return [p], [torch.ones(4)], [torch.zeros(4)], [torch.zeros(4)], [torch.zeros(())]


FUNCTIONAL = {
    "beta1": 0.9,
    "beta2": 0.9999,
    "lr": 0.1,
    "clip_lambda": 0.25,
    "weight_decay": 0.0,
    "decouple": False,
    "eps": 1e-6,
    "maximize": False,
}


@pytest.mark.parametrize("foreach", [False, True, None])
def test_functional_form_does_what_the_class_does(foreach):
    p = param(4)
    steps(ADOPT([p], lr=0.1), [p], 3)
    lists = functional_lists()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        grads = [torch.randn(4, generator=generator)]
        adopt(lists[0], grads, *lists[2:], foreach=foreach, **FUNCTIONAL)
    assert same_bits(lists[0][0], p.detach())


def test_functional_form_takes_complex_tensors_without_being_told():
    p, state = torch.ones(2, dtype=torch.complex64), [torch.zeros(2, dtype=torch.complex64) for _ in range(2)]
    for _ in range(2):
        adopt([p], [torch.full((2,), 1 + 2j)], [state[0]], [state[1]], [torch.ones(())], **FUNCTIONAL)
    assert p.is_complex()
    assert state[1].abs().min() > 0


def test_functional_form_refuses_lists_that_do_not_fit():
    lists = functional_lists()
    with pytest.raises(ValueError, match="one entry a parameter"):
        adopt(lists[0], [], *lists[2:], **FUNCTIONAL)
    with pytest.raises(ValueError, match="one entry a parameter"):
        adopt(*lists, **FUNCTIONAL, offsets=[1, 2])
    with pytest.raises(ValueError, match="state_steps"):
        adopt(*lists[:4], [0], **FUNCTIONAL)
    with pytest.raises(ValueError, match="init"):
        adopt(*lists, **FUNCTIONAL, init="row")
    with pytest.raises(ValueError, match="clip_lambda"):
        adopt(*lists, **{**FUNCTIONAL, "clip_lambda": "step"})
    adopt([], [], [], [], [], **FUNCTIONAL)


def test_functional_form_needs_no_no_grad_around_it():
    p = param(4)
    lists = functional_lists()
    for _ in range(2):
        adopt([p], *lists[1:], **FUNCTIONAL)
    assert p.is_leaf
    assert p.requires_grad


def test_capture_into_a_cuda_graph_needs_capturable(monkeypatch):
    """There is no GPU in the tests: torch is made to say that it is capturing."""
    p = param(2)
    optimizer = ADOPT([p])
    p.grad = torch.ones(2)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="capturable=True"):
        optimizer.step()
    optimizer.param_groups[0]["capturable"] = True
    optimizer.step()


def test_differentiable_with_a_16_bit_exp_avg_sq_is_refused():
    with pytest.raises(ValueError, match="differentiable"):
        ADOPT([param(2)], differentiable=True, state_dtype=BF16)


@pytest.mark.parametrize("name", ["adopt", "clipping"])
def test_examples_in_docstrings_run(name):
    results = doctest.testmod(importlib.import_module(f"sharded_adopt.{name}"))
    assert results.attempted > 0
    assert results.failed == 0


def test_repr_shows_the_clip():
    assert "clip_lambda: PowerClip(exponent=0.25, scale=1.0)" in repr(ADOPT([param(1)]))


def test_training_reaches_the_optimum_of_a_quadratic():
    p = param(20)
    optimizer = ADOPT([p], lr=0.02)
    target = torch.linspace(-1, 1, 20)
    for _ in range(400):
        optimizer.zero_grad()
        (p - target).square().sum().backward()
        optimizer.step()
    assert (p - target).abs().max() < 0.05
