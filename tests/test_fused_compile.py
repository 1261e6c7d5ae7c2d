"""torch.compile sees the fused step as one operator, a profiler too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_adopt import ADOPT
from sharded_adopt.kernels import native

pytestmark = [
    pytest.mark.skipif(native.load().library is None, reason=f"no fused CPU kernel: {native.load().reason}"),
    # torch's compiler imports modules of torch that use what torch deprecates
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def _batch(step: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(step))


def _graphs_of(step: Callable[[], Any]) -> tuple[Callable[[], Any], list[torch.fx.GraphModule]]:
    """`step` compiled by way of functionalised graphs, which are noted."""
    graphs: list[torch.fx.GraphModule] = []

    def note(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    return torch.compile(step, backend=note), graphs


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["float", "tensor"])
def test_a_compiled_step_is_one_operator_with_the_bits_of_the_eager_one(fused: bool | None, lr: float | Tensor) -> None:
    eager_model = _model()
    model = copy.deepcopy(eager_model)
    eager = ADOPT(eager_model.parameters(), lr=lr, fused=fused, weight_decay=0.1, decouple=True)
    optimizer = ADOPT(model.parameters(), lr=lr, fused=fused, weight_decay=0.1, decouple=True)
    step, graphs = _graphs_of(optimizer.step)
    for i in range(4):
        for one, update in ((eager_model, eager.step), (model, step)):
            one.zero_grad()
            one(_batch(i)).square().sum().backward()
            update()
    for a, b in zip(eager_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(graphs) == 1
    calls = [str(node.target) for node in graphs[0].graph.nodes if "sharded_adopt" in str(node.target)]
    assert calls == ["sharded_adopt.adopt_.default"]


def test_a_clip_that_is_code_is_traced_with_the_foreach_kernel() -> None:
    eager_model = _model()
    model = copy.deepcopy(eager_model)

    def clip(step: Any) -> Any:
        return step * 0.5

    eager = ADOPT(eager_model.parameters(), lr=0.01, clip_lambda=clip)
    optimizer = ADOPT(model.parameters(), lr=0.01, clip_lambda=clip)
    step, graphs = _graphs_of(optimizer.step)
    for i in range(3):
        for one, update in ((eager_model, eager.step), (model, step)):
            one.zero_grad()
            one(_batch(i)).square().sum().backward()
            update()
    for a, b in zip(eager_model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b)  # two kernels: torch's square root may be one unit off
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_whole_training_step_compiles() -> None:
    eager_model = _model()
    model = copy.deepcopy(eager_model)
    eager, optimizer = ADOPT(eager_model.parameters(), lr=0.01), ADOPT(model.parameters(), lr=0.01)

    def train(model: nn.Module, optimizer: ADOPT, batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(batch).square().sum()
        loss.backward()
        optimizer.step()
        return loss

    compiled = torch.compile(train, backend="aot_eager")
    for i in range(4):
        assert torch.equal(train(eager_model, eager, _batch(i)), compiled(model, optimizer, _batch(i)))
    for a, b in zip(eager_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_profiler_shows_one_operator_for_a_group() -> None:
    model = _model()
    optimizer = ADOPT(model.parameters(), lr=0.01)
    for i in range(2):
        model(_batch(i)).square().sum().backward()
        optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    names = [event.name for event in profile.events()]
    assert names.count("sharded_adopt::adopt_native_") == 1
    assert not [name for name in names if name.startswith("aten::")], "nothing else runs"


def test_the_operator_meets_torch_s_rules() -> None:
    params, exp_avgs = [torch.randn(5), torch.randn(3)], [torch.zeros(5), torch.zeros(3)]
    arguments = (
        params,
        [torch.ones(5), torch.ones(3)],
        exp_avgs,
        [torch.ones(5), torch.ones(3)],
        [torch.ones(()), torch.ones(())],
    )
    options = {
        "beta1": 0.9,
        "beta2": 0.99,
        "lr": 0.1,
        "lr_tensor": None,
        "clip_exponent": 0.25,
        "clip_scale": 1.0,
        "weight_decay": 0.0,
        "decouple": False,
        "eps": 1e-6,
        "maximize": False,
        "nesterov": False,
        "init": "parameter",
        "capturable": False,
        "grad_scale": None,
        "found_inf": None,
        "offsets": None,
        "step_increment": None,
    }
    results = torch.library.opcheck(torch.ops.sharded_adopt.adopt_.default, arguments, options)
    assert set(results.values()) == {"SUCCESS"}
