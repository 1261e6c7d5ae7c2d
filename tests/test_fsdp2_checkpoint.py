"""ADOPT on `fully_shard`ed modules, saved by torch.distributed.checkpoint and taken up at another world size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sharded_adopt import ADOPT

STEPS, SAVED = 8, 4
OPTIONS: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.1, "decouple": True, "nesterov": True}
CLIP = {"clip_lambda": {"exponent": 0.5, "scale": 2.0}}


def make_model() -> nn.Sequential:
    """Odd sizes: 7 and 3 rows do not halve, and of the single row of the last layer rank 1 owns nothing."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1))


def shard(model: nn.Module, mesh_shape: tuple[int, ...]) -> nn.Module:
    """Over one dimension, or replicated over the first and sharded over the second (HSDP)."""
    names = ("replicate", "shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        batch = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(batch).square().mean().backward()  # the same batch on each rank: the mean over 2 or 4 is exact
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters, then the state of each."""
    params = list(model.parameters())
    return [whole(p) for p in params] + [whole(optimizer.state[p][k]) for p in params for k in optimizer.state[p]]


def one_process(steps: int) -> list[Tensor]:
    model = make_model()
    optimizer = ADOPT(model.parameters(), **OPTIONS, **CLIP)
    train(model, optimizer, range(steps))
    return everything(model, optimizer)


def saved(rank: int, world_size: int, mesh: tuple[int, ...], flat: bool, root: Path) -> None:
    model = shard(make_model(), mesh)
    optimizer = ADOPT(model.parameters(), **OPTIONS, **CLIP)
    train(model, optimizer, range(SAVED))
    found = get_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat))
    dcp.save(dict(zip(("model", "optimizer"), found, strict=True)), checkpoint_id=root)


def resumed(
    rank: int, world_size: int, mesh: tuple[int, ...], flat: bool, root: Path
) -> tuple[list[Tensor], list[Tensor], Any]:
    """What was loaded, what it trained to, and the clip bound; constructed with other options on purpose."""
    torch.manual_seed(1)
    model = shard(make_model(), mesh)
    nn.init.constant_(model[0].weight, 7.0)
    optimizer = ADOPT(model.parameters(), lr=9.0)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    found = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))
    assert all(optimizer.state[p]["step"] == 0 for p in model.parameters()), "DCP's fake step does not count"
    dcp.load(found, checkpoint_id=root)
    set_state_dict(
        model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"], options=options
    )
    loaded = everything(model, optimizer)
    train(model, optimizer, range(SAVED, STEPS))
    return loaded, everything(model, optimizer), optimizer.state_dict()["param_groups"][0]["clip_lambda"]


def assert_all_close(ours: list[Tensor], theirs: list[Tensor], rtol: float = 0.0, atol: float = 0.0) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("before", "after"),
    [((2,), (1,)), ((2,), (2,)), ((1,), (2,)), ((2,), (2, 2)), ((2, 2), (2,))],
    ids=lambda mesh: "x".join(map(str, mesh)),
)
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_resumed_on_another_mesh_equals_one_uninterrupted_process_to_the_bit(
    before: tuple[int, ...], after: tuple[int, ...], flat: bool, tmp_path: Path
) -> None:
    """FSDP and HSDP (2x2: replicated over two, sharded over two)."""
    run_ranks(torch.Size(before).numel(), saved, before, flat, tmp_path)
    for loaded, trained, clip in run_ranks(torch.Size(after).numel(), resumed, after, flat, tmp_path):
        assert_all_close(loaded, one_process(SAVED))
        assert_all_close(trained, one_process(STEPS))
        assert clip == CLIP["clip_lambda"]


def test_resumed_on_three_ranks_loads_the_bits_and_stays_near(tmp_path: Path) -> None:
    """Named tolerance: a third of three times a gradient is not always that gradient, by its last bit."""
    run_ranks(2, saved, (2,), False, tmp_path)
    for loaded, trained, _ in run_ranks(3, resumed, (3,), False, tmp_path):
        assert_all_close(loaded, one_process(SAVED))
        assert_all_close(trained, one_process(STEPS), rtol=1e-5, atol=1e-6)
