"""What the kernels compute: against the authors' published numbers, a case worked by hand, and the authors' package."""

from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch
from adopt_cases import DEFAULTS, Lists, assert_same_bits, authors_adopt, make_grads, make_lists, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sharded_adopt import ADOPT, PowerClip
from sharded_adopt.kernels import foreach
from sharded_adopt.kernels.foreach import adopt_foreach_
from sharded_adopt.kernels.reference import adopt_reference_

KERNELS = {"reference": adopt_reference_, "foreach": adopt_foreach_}
both_kernels = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)

# float64, θ = 1, lr = 0.1, g = 1, 2, -0.5, 4, 1e-3: θ after each step, then m and v. Made with the authors' package
# at 6468572, its single-tensor and foreach paths agreeing.
GOLDEN = {
    "default": ({}, (1, 0.99, 0.9859992502, 0.9692378352, 0.9541425703), 0.1509526487, 1.0016247751),
    "no clip": (
        {"clip_lambda": None},
        (1, 0.98, 0.9669992502, 0.9153030740, 0.8687665240),
        0.4653654997,
        1.0016247751,
    ),
    "decoupled decay": (
        {"decouple": True, "weight_decay": 0.1},
        (1, 0.98, 0.9661992502, 0.9397758427, 0.9152828194),
        0.1509526487,
        1.0016247751,
    ),
    "L2 decay": (
        {"weight_decay": 0.1},
        (1, 0.99, 0.9846449726, 0.9666647078, 0.9495952426),
        0.1706946525,
        1.2116535442,
    ),
    "small beta2": (
        {"beta2": 0.1, "clip_lambda": None},
        (1, 0.98, 0.9645993762, 0.8988825169, 0.8397347138),
        0.5914780316,
        1.4459509000,
    ),
}


@both_kernels
@pytest.mark.parametrize(("options", "thetas", "m", "v"), GOLDEN.values(), ids=GOLDEN)
def test_golden_values_of_the_authors_package(kernel, options, thetas, m, v):
    lists = Lists([torch.ones(1).double()], [torch.zeros(1).double()], [torch.zeros(1).double()], [torch.zeros(())])
    for grad, theta in zip((1.0, 2.0, -0.5, 4.0, 1e-3), thetas, strict=True):
        lists.run(kernel, [torch.tensor([grad], dtype=torch.float64)], **{"lr": 0.1, **options})
        assert lists.params[0].item() == pytest.approx(theta, abs=5e-11)
    assert lists.exp_avgs[0].item() == pytest.approx(m, abs=5e-11)
    assert lists.exp_avg_sqs[0].item() == pytest.approx(v, abs=5e-11)
    assert lists.steps[0].item() == 5


@both_kernels
@pytest.mark.parametrize("nesterov", [False, True])
def test_three_steps_worked_by_hand(kernel, nesterov):
    """θ = 2, lr = 1/2, β1 = 1/2, β2 = 3/4, eps = 1/8, decoupled decay 1/4, clip step: binary fractions, so exact."""
    lists = Lists([torch.tensor([2.0])], [torch.zeros(1)], [torch.zeros(1)], [torch.zeros(())])
    options = {
        "lr": 0.5,
        "beta1": 0.5,
        "beta2": 0.75,
        "eps": 0.125,
        "weight_decay": 0.25,
        "decouple": True,
        "clip_lambda": PowerClip(1.0),
        "nesterov": nesterov,
    }
    # step 0, g = 2: only v = 4
    lists.run(kernel, [torch.tensor([2.0])], **options)
    assert (lists.params[0].item(), lists.exp_avgs[0].item(), lists.exp_avg_sqs[0].item()) == (2.0, 0.0, 4.0)
    # step 1, g = -8: θ 2 - 2/8 = 1.75; n = -8 / 2 = -4, clipped to -1; m = -1/2; v = 3 + 16 = 19
    lists.run(kernel, [torch.tensor([-8.0])], **options)
    assert (lists.exp_avgs[0].item(), lists.exp_avg_sqs[0].item()) == (-0.5, 19.0)
    # plain: θ + m/2 back: 1.75 + 1/4 = 2; nesterov: along (m + n) / 2 = -3/4: 1.75 + 3/8 = 2.125
    assert lists.params[0].item() == (2.125 if nesterov else 2.0)
    assert lists.steps[0].item() == 2


@both_kernels
def test_eps_clamps_the_root_and_is_not_added(kernel):
    lists = Lists([torch.zeros(3)], [torch.zeros(3)], [torch.tensor([4.0, 1e-8, 0.0])], [torch.ones(())])
    lists.run(kernel, [torch.tensor([1.0, 1.0, 0.0])], lr=1.0, beta1=0.0, eps=0.5, clip_lambda=None)
    assert lists.params[0].tolist() == [-0.5, -2.0, 0.0]


@both_kernels
def test_the_first_update_clips_at_one(kernel):
    """pytorch_optimizer's index is one ahead: its first update clips at 2 ** 0.25."""
    lists = Lists([torch.zeros(1)], [torch.zeros(1)], [torch.ones(1)], [torch.ones(())])
    lists.run(kernel, [torch.tensor([100.0])], lr=1.0, beta1=0.0)
    assert lists.params[0].item() == -1.0


@both_kernels
def test_small_one_minus_beta2_is_computed_in_double(kernel):
    """1 - float32(0.9999) is off by 1.7e-4 of itself; over 1000 steps of g = 1 that would show."""
    lists = Lists([torch.zeros(1)], [torch.zeros(1)], [torch.zeros(1)], [torch.ones(())])
    for _ in range(1000):
        lists.run(kernel, [torch.ones(1)])
    assert lists.exp_avg_sqs[0].item() == pytest.approx(1 - 0.9999**1000, rel=2e-5)


SHAPES = st.lists(
    st.one_of(
        st.just(()),
        st.tuples(st.integers(0, 70)),
        st.tuples(st.integers(1, 9), st.integers(0, 40)),
        st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 33)),
    ),
    min_size=1,
    max_size=5,
)
OPTIONS = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.0, 1e-3, 0.1, 1.7]),
        "beta1": st.sampled_from([0.0, 0.3, 0.9, 0.95]),
        "beta2": st.sampled_from([0.0, 0.1, 0.999, 0.9999]),
        "eps": st.sampled_from([1e-15, 1e-6, 1e-2]),
        "clip_lambda": st.sampled_from([None, PowerClip(0.25), PowerClip(0.5, 2.0)]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "decouple": st.booleans(),
        "maximize": st.booleans(),
    }
)


@settings(max_examples=80, deadline=None)
@given(
    shapes=SHAPES,
    options=OPTIONS,
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10_000),
)
def test_reference_equals_the_authors_package_to_the_bit(shapes, options, dtype, seed):
    lists = make_lists(shapes, dtype=dtype, seed=seed)
    theirs = [torch.nn.Parameter(p.clone()) for p in lists.params]
    named = dict(options)
    betas = (named.pop("beta1"), named.pop("beta2"))
    optimizer = authors_adopt(theirs, betas=betas, foreach=False, **named)
    for step in range(4):
        grads = make_grads(lists, seed + step)
        lists.run(adopt_reference_, grads, **options)
        for p, grad in zip(theirs, grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()
    for i, p in enumerate(theirs):
        assert same_bits(lists.params[i], p.detach())
        assert same_bits(lists.exp_avgs[i], optimizer.state[p]["exp_avg"])
        assert same_bits(lists.exp_avg_sqs[i], optimizer.state[p]["exp_avg_sq"])
        assert lists.steps[i].item() == optimizer.state[p]["step"].item() == 4


@pytest.mark.parametrize("decouple", [True, False])
def test_reference_equals_the_authors_package_on_complex_parameters(decouple):
    """To the bit, but for L2 decay: the authors add it in complex arithmetic, which rounds wd * θ before the sum."""
    generator = torch.Generator().manual_seed(3)
    ours = torch.nn.Parameter(torch.randn(5, 7, dtype=torch.complex64, generator=generator))
    theirs = torch.nn.Parameter(ours.detach().clone())
    options = {"lr": 0.1, "weight_decay": 0.1, "decouple": decouple}
    pair = [
        (ours, ADOPT([ours], foreach=False, **options)),
        (theirs, authors_adopt([theirs], foreach=False, **options)),
    ]
    for _ in range(5):
        grad = torch.randn(5, 7, dtype=torch.complex64, generator=generator)
        for p, optimizer in pair:
            p.grad = grad.clone()
            optimizer.step()
    state, expected = pair[0][1].state[ours], pair[1][1].state[theirs]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.complex64
    tolerance = {"rtol": 0, "atol": 0} if decouple else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(ours.detach(), theirs.detach(), **tolerance)
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[key], expected[key], **tolerance)


# (parameter, gradient, exp_avg, exp_avg_sq); the arithmetic is the same operations in the same dtype, so bits must
# agree.
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = {
    "fp32": (F32, F32, F32, F32),
    "fp64": (F64, F64, F64, F64),
    "bf16 with fp32 state": (BF16, BF16, F32, F32),
    "fp16 with fp32 state": (F16, F16, F32, F32),
    "bf16 with bf16 state": (BF16, BF16, BF16, BF16),
    "fp16 with fp16 state": (F16, F16, F16, F16),
    "fp32 with bf16 gradients": (F32, BF16, F32, F32),
    "fp32 with bf16 exp_avg_sq": (F32, F32, F32, BF16),
    "fp64 with fp32 state": (F64, F64, F32, F32),
}


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@settings(max_examples=15, deadline=None)
@given(
    shapes=SHAPES,
    options=OPTIONS,
    nesterov=st.booleans(),
    init=st.sampled_from(["parameter", "element"]),
    seed=st.integers(0, 10_000),
)
def test_foreach_equals_reference_to_the_bit_with_mixed_steps(
    dtypes, capturable, shapes, options, nesterov, init, seed
):
    param, grad, exp_avg, exp_avg_sq = dtypes
    lists = make_lists(shapes, dtype=param, exp_avg_dtype=exp_avg, exp_avg_sq_dtype=exp_avg_sq, seed=seed)
    for i in range(0, len(shapes), 2):  # every other one is late
        lists.steps[i] += 3
        lists.exp_avg_sqs[i] += 0.5
    other = lists.clone()
    offsets = [seed * 1_000_003 + 7 * i for i in range(len(shapes))]
    for step in range(3):
        grads = make_grads(lists, seed + step, dtype=grad)
        extra = {"nesterov": nesterov, "init": init, "capturable": capturable, "offsets": offsets}
        lists.run(adopt_reference_, grads, **options, **extra)
        other.run(adopt_foreach_, grads, **options, **extra)
        assert_same_bits(lists, other)


@pytest.mark.parametrize("exp_avg_sq_dtype", [F32, BF16])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_foreach_does_not_depend_on_blocks_cuts_or_threads(threads, exp_avg_sq_dtype, monkeypatch):
    """Tensors longer than a block are cut; the pieces must come out as the whole would, rounding bits included."""
    lists = make_lists([(70_001,), (3, 1000), (5,), (40_000,)], exp_avg_sq_dtype=exp_avg_sq_dtype)
    whole, cut = lists.clone(), lists.clone()
    monkeypatch.setattr(foreach, "_CPU_BLOCK_NUMEL", 1000)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for step in range(3):
            grads = make_grads(lists, step)
            whole.run(adopt_reference_, grads, weight_decay=0.1)
            cut.run(adopt_foreach_, grads, weight_decay=0.1)
    finally:
        torch.set_num_threads(before)
    assert_same_bits(whole, cut)


@both_kernels
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_result_does_not_depend_on_where_a_parameter_is_cut(kernel, dtype):
    """What the sharded engine relies on: pieces with their offsets come out as the whole, rounding bits included."""
    whole = make_lists([(1037,)], dtype=dtype, exp_avg_sq_dtype=BF16)
    bounds = [0, 1, 17, 18, 500, 1037]
    cuts = list(itertools.pairwise(bounds))
    pieces = Lists(
        [whole.params[0][a:b].clone() for a, b in cuts],
        [whole.exp_avgs[0][a:b].clone() for a, b in cuts],
        [whole.exp_avg_sqs[0][a:b].clone() for a, b in cuts],
        [torch.zeros(()) for _ in cuts],
    )
    for step in range(5):
        grads = make_grads(whole, step)
        whole.run(kernel, grads)
        pieces.run(kernel, [grads[0][a:b].clone() for a, b in cuts], offsets=[a for a, _ in cuts])
    assert same_bits(torch.cat(pieces.params), whole.params[0])
    assert same_bits(torch.cat(pieces.exp_avgs), whole.exp_avgs[0])
    assert same_bits(torch.cat(pieces.exp_avg_sqs), whole.exp_avg_sqs[0])


@both_kernels
def test_layouts_that_are_not_contiguous_give_the_same_values(kernel):
    plain = make_lists([(4, 6, 5, 3)], exp_avg_sq_dtype=BF16)
    nhwc = torch.channels_last
    last = Lists(*([t.clone(memory_format=nhwc) if t.ndim == 4 else t.clone() for t in ts] for ts in plain.lists()))
    for step in range(4):
        grads = make_grads(plain, step)
        plain.run(kernel, grads)
        last.run(kernel, [grads[0].clone(memory_format=nhwc) if step % 2 else grads[0]])
    assert_same_bits(plain, last)


@both_kernels
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decouple": True}])
def test_capturable_reads_nothing_on_the_host_and_agrees_with_the_branches(kernel, nesterov, decay):
    """Named tolerance: with a tensor lr, lr * m is rounded before it is subtracted; the host lr is one fused step.

    That is at most one unit in the last place of θ or lr * m a step; six steps of size 0.1 on |θ| < 4 give 2e-6.
    """
    shapes = [(3, 4), (), (0,), (257,)]
    eager = make_lists(shapes)
    device = eager.clone()
    for step in range(6):
        grads = make_grads(eager, step)
        options = {"nesterov": nesterov, **decay}
        eager.run(kernel, grads, lr=0.1, **options)
        with no_host_reads():
            device.run(kernel, grads, lr=torch.tensor(0.1, dtype=F64), capturable=True, **options)
    for mine, theirs in zip(device.params, eager.params, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6)
    # m sees θ only through L2 decay, v too
    rtol = 1e-5 if decay.get("weight_decay") and not decay.get("decouple") else 0
    for mine, theirs in zip(device.exp_avgs + device.exp_avg_sqs, eager.exp_avgs + eager.exp_avg_sqs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=rtol * 1e-2)
    assert [s.item() for s in device.steps] == [6.0] * 4


class no_host_reads:
    """Make every read of a tensor on the host an error."""

    def __enter__(self):
        class Guard(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
                    raise AssertionError("a tensor was read on the host")
                return func(*args, **(kwargs or {}))

        self._guard = Guard()
        self._guard.__enter__()

    def __exit__(self, *error):
        self._guard.__exit__(*error)


def test_the_guard_against_host_reads_catches_one():
    with pytest.raises(AssertionError, match="host"), no_host_reads():
        torch.ones(()).item()


@both_kernels
@pytest.mark.parametrize("capturable", [False, True])
def test_tensor_lr_takes_the_step_of_its_value(kernel, capturable):
    plain = make_lists([(33,), (2, 2)])
    tensor = plain.clone()
    lr = torch.tensor([0.25])  # a power of two: lr * m is exact, so that the bits must agree
    for step in range(4):
        grads = make_grads(plain, step)
        plain.run(kernel, grads, lr=0.25, weight_decay=0.5, decouple=True, capturable=capturable)
        tensor.run(kernel, grads, lr=lr, weight_decay=0.5, decouple=True, capturable=capturable)
    assert_same_bits(plain, tensor)


@both_kernels
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_found_inf_changes_nothing_at_all(kernel, capturable, dtype):
    lists = make_lists([(33,), (), (2, 3)], dtype=dtype)
    lists.run(kernel, make_grads(lists, 0), capturable=capturable)
    before = lists.clone()
    bad = [torch.full_like(p, math.inf) for p in lists.params]
    options = {"weight_decay": 0.1, "decouple": True, "capturable": capturable}
    lists.run(kernel, bad, found_inf=torch.ones(()), **options)
    assert_same_bits(lists, before)
    fresh = make_lists([(5,)], dtype=dtype)
    untouched = fresh.clone()
    fresh.run(kernel, [torch.full((5,), math.nan).to(dtype)], found_inf=torch.tensor([2.0]), **options)
    assert_same_bits(fresh, untouched)


@both_kernels
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_grad_scale_divides_the_gradients_and_leaves_them_as_they_are(kernel, capturable, maximize):
    plain = make_lists([(65,), (4,)])
    scaled = plain.clone()
    options = {"maximize": maximize, "weight_decay": 0.1, "capturable": capturable}
    for step in range(3):
        grads = make_grads(plain, step)
        plain.run(kernel, grads, **options)
        big = [grad * 1024.0 for grad in grads]
        kept = [grad.clone() for grad in big]
        scaled.run(kernel, big, grad_scale=torch.tensor(1024.0), found_inf=torch.zeros(()), **options)
        assert all(same_bits(a, b) for a, b in zip(big, kept, strict=True))
    assert_same_bits(plain, scaled)


@both_kernels
def test_fp16_gradient_times_scale_is_unscaled_in_fp32(kernel):
    """6e-8 is the smallest fp16 number; divided by the scale in fp16 it would be 0 and v with it."""
    lists = make_lists([(1,)], dtype=F16, exp_avg_dtype=F32)
    lists.run(kernel, [torch.tensor([2.0**-24], dtype=F16)], grad_scale=torch.tensor(2.0**10))
    assert lists.exp_avg_sqs[0].item() == 2.0**-68


@both_kernels
def test_step_increment_is_added_in_place_of_one(kernel):
    lists = make_lists([(3,), (4,)])
    grads = make_grads(lists, 0)
    lists.run(kernel, grads, step_increment=torch.zeros(()))
    assert [s.item() for s in lists.steps] == [0.0, 0.0]
    lists.run(kernel, grads, step_increment=torch.ones(()), capturable=True)
    assert [s.item() for s in lists.steps] == [1.0, 1.0]


@both_kernels
@pytest.mark.parametrize("capturable", [False, True])
def test_sixteen_bit_parameters_are_rounded_once_from_fp32_arithmetic(kernel, capturable):
    half = make_lists([(129,)], dtype=BF16, exp_avg_dtype=F32)
    for step in range(4):
        wide = Lists([half.params[0].float()], *([t.clone() for t in ts] for ts in half.lists()[1:]))
        grads = make_grads(half, step)
        options = {"weight_decay": 0.1, "lr": 0.3, "capturable": capturable}
        half.run(kernel, grads, **options)
        wide.run(kernel, [grads[0].float()], **options)
        assert same_bits(half.params[0], wide.params[0].to(BF16))
        assert same_bits(half.exp_avgs[0], wide.exp_avgs[0])
        assert same_bits(half.exp_avg_sqs[0], wide.exp_avg_sqs[0])


@both_kernels
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.1, "decouple": True}])
def test_element_init_starts_each_element_at_its_first_gradient(kernel, capturable, decay):
    """Rows not in the first batches: each column is what a parameter of its own, first stepped then, would be."""
    late = [0, 2, 5]  # the step at which each element gets its first gradient
    together = Lists([torch.ones(3)], [torch.zeros(3)], [torch.zeros(3)], [torch.zeros(())])
    # A constant bound: the element's own step would give another bound than the parameter's.
    options = {"lr": 0.25, "clip_lambda": PowerClip(0.0, 1.5), "capturable": capturable, **decay}
    alone = [Lists([torch.ones(1)], [torch.zeros(1)], [torch.zeros(1)], [torch.zeros(())]) for _ in late]
    for step in range(8):
        grad = make_grads(together, step)[0] + 0.01
        grad = torch.where(torch.tensor(late) <= step, grad, torch.zeros(3))
        together.run(kernel, [grad], init="element", **options)
        for i, first in enumerate(late):
            if step >= first:
                alone[i].run(kernel, [grad[i : i + 1]], **options)
            else:
                assert together.params[0][i].item() == 1.0  # not even decay
    for column in range(3):
        for name in ("params", "exp_avgs", "exp_avg_sqs"):
            assert same_bits(getattr(together, name)[0][column : column + 1], getattr(alone[column], name)[0])


@both_kernels
def test_element_init_leaves_a_zero_gradient_row_for_later(kernel):
    lists = Lists([torch.ones(2)], [torch.zeros(2)], [torch.zeros(2)], [torch.zeros(())])
    for _ in range(3):
        lists.run(kernel, [torch.tensor([1.0, 0.0])], init="element", weight_decay=0.5, decouple=True)
    assert lists.params[0][1].item() == 1.0
    lists.run(kernel, [torch.tensor([1.0, 3.0])], init="element", weight_decay=0.5, decouple=True)
    assert (lists.params[0][1].item(), lists.exp_avgs[0][1].item(), lists.exp_avg_sqs[0][1].item()) == (1.0, 0.0, 9.0)


@both_kernels
@pytest.mark.parametrize("capturable", [False, True])
def test_nan_and_inf_go_where_the_rule_takes_them(kernel, capturable):
    lists = Lists([torch.ones(3)], [torch.zeros(3)], [torch.ones(3)], [torch.ones(())])
    lists.run(kernel, [torch.tensor([math.nan, math.inf, 1.0])], capturable=capturable)
    theta, m, v = (t[0].tolist() for t in (lists.params, lists.exp_avgs, lists.exp_avg_sqs))
    assert math.isnan(theta[0])
    assert math.isnan(m[0])
    assert math.isnan(v[0])
    assert (m[1], v[1]) == (pytest.approx(0.1), math.inf)  # the clip holds, v does not
    assert math.isfinite(theta[2])


@both_kernels
def test_custom_clip_sees_each_parameters_own_step_as_an_int(kernel):
    seen = []

    def clip(step):
        seen.append(step)
        return float(step)

    lists = make_lists([(3,), (3,), (3,)])
    for step, start in zip(lists.steps, (1, 5, 9), strict=True):
        step += start
    for v in lists.exp_avg_sqs:
        v += 1.0
    lists.run(kernel, [torch.full((3,), 100.0)] * 3, clip_lambda=clip, beta1=0.0)
    assert seen == [1, 5, 9]
    assert all(type(step) is int for step in seen)
    assert [m[0].item() for m in lists.exp_avgs] == [1.0, 5.0, 9.0]


@both_kernels
def test_custom_clip_may_give_tensors(kernel):
    plain = make_lists([(33,), (5,)])
    tensors = plain.clone()
    for step in range(4):
        grads = make_grads(plain, step)
        plain.run(kernel, grads)
        tensors.run(kernel, grads, clip_lambda=lambda step: torch.tensor(step**0.25, dtype=F64))
    assert_same_bits(plain, tensors)


def test_foreach_refuses_to_be_differentiated():
    with pytest.raises(ValueError, match="foreach"):
        make_lists([(3,)]).run(adopt_foreach_, [torch.ones(3)], differentiable=True)


def test_foreach_holds_two_blocks_of_temporary_memory_whatever_the_size():
    """The authors' foreach path holds two copies of all parameters; ours two blocks of 2^18 elements."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if "_foreach" in func.__name__ and not func.__name__.split(".")[0].endswith("_") and out is not None:
                largest = max(largest, sum(t.numel() for t in out))
            return out

    lists = make_lists([(1_000_000,), (300_000,), (1000, 700)])
    lists.run(adopt_foreach_, make_grads(lists, 0))
    grads = make_grads(lists, 1)
    with Watch():
        lists.run(adopt_foreach_, grads)
    assert 0 < largest <= foreach._CPU_BLOCK_NUMEL


def test_defaults_of_the_cases_name_every_argument_of_a_kernel():
    for kernel in KERNELS.values():
        named = {n for n, p in inspect.signature(kernel).parameters.items() if p.kind is p.KEYWORD_ONLY}
        assert named == {*DEFAULTS, "step_increment"}
