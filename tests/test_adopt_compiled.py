"""ADOPT without host reads: capturable, and the whole step as one graph under torch.compile."""

from __future__ import annotations

import contextlib

import pytest
import torch
from adopt_cases import same_bits
from test_kernels_rule import no_host_reads
from torch import nn

from sharded_adopt import ADOPT

# dynamo's own imports call deprecated torch.jit functions
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def train(step_of, count=4, *, dummy=False, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    optimizer = ADOPT(model.parameters(), lr=0.1, **options)
    step = step_of(optimizer)
    for i in range(count):
        optimizer.zero_grad()
        model(torch.randn(8, 4).to(dtype)).square().mean().backward()
        if dummy and i == 0:
            for p in model.parameters():
                p.grad.zero_()
        with forbid_recompiles() if i >= 2 else contextlib.nullcontext():
            step()
    return [(p.detach(), *optimizer.state[p].values()) for p in model.parameters()]


@contextlib.contextmanager
def forbid_recompiles():
    torch._dynamo.config.error_on_recompile = True
    try:
        yield
    finally:
        torch._dynamo.config.error_on_recompile = False


def eager(optimizer):
    return optimizer.step


def compiled(optimizer):
    torch._dynamo.reset()
    # "aot_eager" traces all of it and runs it with torch's kernels: no C++ compiler is needed, and bits can be compared
    return torch.compile(lambda: optimizer.step(), backend="aot_eager", fullgraph=True)


def guarded(optimizer):
    def step():
        with no_host_reads():
            optimizer.step()

    return step


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"foreach": True, "dummy": True, "state_dtype": (torch.float32, torch.bfloat16)},
        {
            "foreach": True,
            "dtype": torch.bfloat16,
            "init": "element",
            "nesterov": True,
            "weight_decay": 0.1,
            "decouple": True,
        },
    ],
    ids=["auto", "dummy first, bf16 exp_avg_sq", "all options"],
)
def test_compiled_step_is_one_graph_without_recompiles_and_equals_eager_to_the_bit(options):
    for mine, theirs in zip(train(compiled, **options), train(eager, **options), strict=True):
        assert all(same_bits(a, b) for a, b in zip(mine, theirs, strict=True))


def test_compiled_reference_kernel_is_one_graph_and_agrees():
    """Named tolerance: dynamo takes addcmul_ apart, so that (1 - β2) g² is rounded before it is added to v."""
    options = {"foreach": False, "dummy": True}
    for mine, theirs in zip(train(compiled, **options), train(eager, **options), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dummy": True},
        {"clip_lambda": None, "maximize": True},
        {"state_dtype": torch.bfloat16},
        {"dtype": torch.float16, "init": "element", "nesterov": True, "weight_decay": 0.1},
    ],
)
def test_capturable_step_reads_nothing_on_the_host_and_equals_the_branches_to_the_bit(foreach, options):
    for mine, theirs in zip(
        train(guarded, capturable=True, foreach=foreach, **options),
        train(eager, foreach=foreach, **options),
        strict=True,
    ):
        assert all(same_bits(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("foreach", [False, True])
def test_capturable_step_with_found_inf_reads_nothing_on_the_host(foreach):
    p = nn.Parameter(torch.ones(3))
    optimizer = ADOPT([p], capturable=True, foreach=foreach)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.zeros(())
    p.grad = torch.ones(3)
    with no_host_reads():
        optimizer.step()
        optimizer.found_inf.fill_(1.0)
        optimizer.step()
    assert optimizer.state[p]["step"] == 1
    assert optimizer.state[p]["exp_avg_sq"].tolist() == [1 / 16] * 3


def test_a_custom_clip_that_computes_on_tensors_compiles():
    def clip(step):
        return (
            torch.minimum(step**0.25, torch.full_like(step, 1.5))
            if isinstance(step, torch.Tensor)
            else min(step**0.25, 1.5)
        )

    options = {"clip_lambda": clip, "foreach": True}
    for mine, theirs in zip(train(compiled, **options), train(eager, **options), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
