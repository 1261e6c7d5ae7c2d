"""Any elementwise torch optimizer, sharded, is that optimizer unsharded; one that is not elementwise is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import STEPS, AwkwardModel, assert_same, train_sharded, train_unsharded
from ranks import run_ranks
from torch import Tensor, nn
from torch.optim import Optimizer

from sharded_adopt import ShardedOptimizer

MANY_BUCKETS = 100 / 2**20
FOR_LOOP, FOREACH = {"foreach": False}, {"foreach": True}

EXACT: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "Adadelta": (torch.optim.Adadelta, {"lr": 0.5}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05, "initial_accumulator_value": 0.1}),
    "Adam": (torch.optim.Adam, {"lr": 0.05, "weight_decay": 0.1}),
    "Adam amsgrad": (torch.optim.Adam, {"lr": 0.05, "amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.05}),
    "AdamW amsgrad maximize": (torch.optim.AdamW, {"lr": 0.05, "amsgrad": True, "maximize": True}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.05}),
    "ASGD": (torch.optim.ASGD, {"lr": 0.05, "t0": 2}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.05}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.05}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.5}),
    "Rprop": (torch.optim.Rprop, {"lr": 0.01}),
    "SGD": (torch.optim.SGD, {"lr": 0.05}),
    "SGD nesterov": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
}


def run(
    rank: int, world_size: int, cls: type[Optimizer], arguments: dict[str, Any], frees: bool
) -> tuple[list[Tensor], dict[str, Any]]:
    model = AwkwardModel(seed=rank)
    optimizer = ShardedOptimizer(
        model.named_parameters(), cls, bucket_cap_mb=MANY_BUCKETS, shard_gradients=frees, **arguments
    )
    train_sharded(model, optimizer, rank, range(STEPS))
    return [p.detach().clone() for p in model.parameters()], optimizer.full_state_dict(rank0_only=False)


@pytest.mark.parametrize("kernel", [FOR_LOOP, FOREACH], ids=["for-loop", "foreach"])
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", EXACT)
def test_an_elementwise_optimizer_sharded_is_itself_bit_for_bit(
    name: str, world_size: int, kernel: dict[str, Any]
) -> None:
    cls, arguments = EXACT[name]
    arguments = {**arguments, **kernel}
    expected, state = train_unsharded(lambda m: cls(m.named_parameters(), **arguments), world_size)
    for params, ours in run_ranks(world_size, run, cls, arguments, world_size == 3):
        assert_same(params, expected)
        assert ours["param_groups"] == state["param_groups"]
        for index, entries in state["state"].items():
            for key, value in entries.items():
                theirs = ours["state"][index][key]
                assert (value is None and theirs is None) or torch.equal(
                    torch.as_tensor(theirs, dtype=torch.as_tensor(value).dtype), torch.as_tensor(value)
                ), (index, key)


# torch's fused kernels take whole vectors and then the elements that are left in another order of operations, so that
# the last bits of an element depend on where its tensor was cut. Six steps of them stay within these.
FUSED_RTOL, FUSED_ATOL = 1e-5, 1e-6


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (torch.optim.AdamW, {"lr": 0.05}),
        (torch.optim.Adam, {"lr": 0.05, "amsgrad": True}),
        # Without momentum: torch's fused SGD with momentum fails where a parameter's first gradient comes late.
        (torch.optim.SGD, {"lr": 0.05, "weight_decay": 0.1}),
        (torch.optim.Adagrad, {"lr": 0.05, "initial_accumulator_value": 0.1}),
    ],
    ids=lambda one: one.__name__ if isinstance(one, type) else "",
)
def test_a_fused_torch_optimizer_sharded_is_itself_to_the_tolerance_of_its_cuts(
    cls: type[Optimizer], arguments: dict[str, Any], world_size: int
) -> None:
    arguments = {**arguments, "fused": True}
    expected, _ = train_unsharded(lambda m: cls(m.named_parameters(), **arguments), world_size)
    for params, _ in run_ranks(world_size, run, cls, arguments, False):
        assert_same(params, expected, rtol=FUSED_RTOL, atol=FUSED_ATOL)


class Shampoo(Optimizer):
    """Stands for what calls itself so, wherever it comes from."""


class DistributedMuon(torch.optim.Muon):
    """A subclass of what cannot be cut."""


class Mine(Shampoo):
    """One more generation."""


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (torch.optim.Muon, "orthogonalises whole matrices"),
        (DistributedMuon, "orthogonalises whole matrices"),
        (torch.optim.LBFGS, "searches along a direction of all parameters"),
        (torch.optim.Adafactor, "factors the second moment over rows and columns"),
        (torch.optim.SparseAdam, "takes sparse gradients only"),
        (Shampoo, "preconditions whole matrices"),
        (Mine, "preconditions whole matrices"),
    ],
    ids=lambda one: one.__name__ if isinstance(one, type) else "",
)
def test_an_optimizer_that_needs_whole_tensors_is_refused_with_the_reason(cls: type[Optimizer], reason: str) -> None:
    with pytest.raises(TypeError, match=f"{cls.__name__} cannot be sharded by elements: it {reason}"):
        ShardedOptimizer([nn.Parameter(torch.ones(4, 4))], cls, lr=0.1)
