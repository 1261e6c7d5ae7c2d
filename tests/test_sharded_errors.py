"""Wrong input is an error on every rank that names what is wrong; never a hang, never a silent fallback."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import AwkwardModel, batch
from ranks import run_ranks
from torch import nn

from sharded_adopt import ADOPT, ShardedADOPT, ShardedOptimizer
from sharded_adopt.sharding.collectives import RankLost


def weights(*sizes: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(size)) for size in sizes]


shared = nn.Parameter(torch.ones(3))
linear = nn.Linear(2, 2)

BAD_INPUT: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "empty list": (lambda: ShardedADOPT([]), ValueError, "empty parameter list"),
    "one tensor": (lambda: ShardedADOPT(shared), TypeError, "got one tensor"),
    "set": (lambda: ShardedADOPT([{"params": {shared}}]), TypeError, "ordered the same on every rank"),
    "a set": (lambda: ShardedADOPT({shared}), TypeError, "got a set: use a list"),
    "a module": (lambda: ShardedADOPT(linear), TypeError, r"pass its parameters\(\)"),
    "module of another kind": (lambda: ShardedADOPT([shared], module=3), TypeError, "module must be a torch.nn.Module"),
    "timeout": (lambda: ShardedADOPT([shared], timeout=-1), ValueError, "timeout must be a number of seconds"),
    "bucket in words": (
        lambda: ShardedADOPT([shared], bucket_cap_mb="x"),
        ValueError,
        "must be positive and finite, got 'x'",
    ),
    "two groups": (
        lambda: ShardedADOPT([{"params": [("a", shared)]}, {"params": [("b", shared)]}]),
        ValueError,
        "given twice, as 'a' in group 0 and as 'b' in group 1",
    ),
    "twice in a group": (lambda: ShardedADOPT([("a", shared), ("b", shared)]), ValueError, "given twice"),
    "one name twice": (
        lambda: ShardedADOPT([("w", p) for p in weights(2, 3)]),
        ValueError,
        "two tensors have one name: 'w'",
    ),
    "names for some": (lambda: ShardedADOPT([("a", shared), *weights(2)]), ValueError, "1 of 2"),
    "not dense": (
        lambda: ShardedADOPT([("gappy", torch.ones(4, 4)[:, :2].detach().requires_grad_())]),
        ValueError,
        r"'gappy' is not dense: shape \(4, 2\) with strides \(4, 1\)",
    ),
    "expanded": (
        lambda: ShardedADOPT([("wide", torch.ones(1, 2).expand(3, 2).detach().requires_grad_())]),
        ValueError,
        "'wide' is not dense",
    ),
    "not a leaf": (lambda: ShardedADOPT([("c", shared * 2)]), ValueError, "'c' is not a leaf"),
    "integers": (lambda: ShardedADOPT([("i", torch.ones(2, dtype=torch.int64))]), TypeError, "'i' is torch.int64"),
    "no tensor": (lambda: ShardedADOPT([("x", 3)]), TypeError, "tensor as parameter 'x', got int"),
    "bad lr": (lambda: ShardedADOPT([shared], lr=-1.0), ValueError, "lr.*-1"),
    "bad lr in a group": (lambda: ShardedADOPT([{"params": [shared], "lr": -2.0}]), ValueError, "lr.*-2"),
    "unknown argument": (lambda: ShardedADOPT([shared], learning_rate=1.0), TypeError, "learning_rate"),
    "bucket": (lambda: ShardedADOPT([shared], bucket_cap_mb=0), ValueError, "must be positive and finite, got 0"),
    "endless bucket": (lambda: ShardedADOPT([shared], bucket_cap_mb=1e303), ValueError, "finite too, got 1e\\+303"),
    "freed and given": (
        lambda: ShardedADOPT([shared], shard_gradients=True, reduce_gradients=False),
        ValueError,
        "reduces nothing: choose one",
    ),
    "untracked": (
        lambda: ShardedADOPT([linear.weight], module=linear),
        ValueError,
        r"nobody would synchronise \['bias'\]",
    ),
    "lbfgs": (lambda: ShardedOptimizer([shared], torch.optim.LBFGS), TypeError, "LBFGS cannot be sharded"),
    "muon": (lambda: ShardedOptimizer([shared], torch.optim.Muon), TypeError, "orthogonalises whole matrices"),
    "no class": (lambda: ShardedOptimizer([shared], "ADOPT"), TypeError, "must be a subclass"),
    **{
        name: (lambda name=name, value=value: ShardedADOPT([shared], **{name: value}), NotImplementedError, name)
        for name, value in {
            "mesh": object(),
            "sharding": "hybrid",
            "overlap_param_gather": True,
        }.items()
    },
    "stats": (lambda: ShardedOptimizer([shared], torch.optim.AdamW).stats(), TypeError, "runs AdamW"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named(case: str) -> None:
    # T10, T12, T34, T35
    act, kind, told = BAD_INPUT[case]
    with pytest.raises(kind, match=told):
        act()


def dtensor_parameter(rank: int, world_size: int) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world_size,))
    param = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    with pytest.raises(TypeError, match="use plain ADOPT") as caught:
        ShardedADOPT([("w", param)])
    return str(caught.value)


def test_dtensor_parameters_are_sent_to_plain_adopt() -> None:
    # T12
    assert all("'w' is a DTensor" in message for message in run_ranks(2, dtensor_parameter))


def differing(rank: int, world_size: int, what: str) -> str:
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))
    named: list[Any] = [("first", first), ("second", second)]
    arguments: dict[str, Any] = {}
    if rank == 1:
        if what == "order":
            named.reverse()
        elif what == "shape":
            named[1] = ("second", nn.Parameter(torch.ones(4)))
        elif what == "missing":
            named.pop()
        elif what == "dtype":
            named[0] = ("first", nn.Parameter(torch.ones(3, dtype=torch.float64)))
        elif what == "groups":
            named = [{"params": named[:1]}, {"params": named[1:]}]
        elif what == "lr":
            arguments["lr"] = 0.5
        elif what == "buckets":
            arguments["bucket_cap_mb"] = 1e-6
        elif what == "empty":
            named = []
    with pytest.raises(ValueError, match=r"\w") as caught:
        ShardedADOPT(named, **arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("order", "parameter 0 ('first' against 'second'): name"),
        ("shape", "('second' against 'second'): shape (2, 2) against (4,)"),
        ("missing", "2 parameters against 1: 'second' is on one side only"),
        ("dtype", "dtype 'float32' against 'float64'"),
        ("groups", "parameter group 0 against 1"),
        ("lr", "parameter group 0: lr 0.001 against 0.5"),
        ("buckets", "bucket_cap_mb"),
        ("empty", "empty parameter list"),
    ],
)
def test_ranks_that_disagree_are_told_the_first_difference(what: str, told: str) -> None:
    # T34
    begin = time.monotonic()
    messages = run_ranks(2, differing, what)
    assert all(told in message for message in messages), messages
    assert time.monotonic() - begin < 10, "an error, not a time-out"


def add_group(rank: int, world_size: int, what: str) -> str:
    model = AwkwardModel()
    optimizer = ShardedADOPT(model.named_parameters(), lr=0.05)
    model(*batch(0, rank)).backward()
    optimizer.step()
    extra = nn.Parameter(torch.ones(5 + rank if what == "shape" else 5))
    group: dict[str, Any] = {"params": [("extra", extra)]}
    if what == "known" and rank == 0:
        group = {"params": [("again", model.left)]}
    elif what == "value":
        group["lr"] = -1.0
    elif what == "unnamed":
        group = {"params": [extra]}
    with pytest.raises(ValueError, match=r"\w") as caught:
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    # Nothing was added anywhere, and a good group still can be.
    optimizer.add_param_group({"params": [("good", nn.Parameter(torch.ones(3)))]})
    optimizer.zero_grad()
    model(*batch(1, rank)).backward()
    optimizer.step()
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("known", "'again' is in this optimizer already, as 'left'"),
        ("value", "lr"),
        ("shape", "shape (5,) against (6,)"),
        ("unnamed", "names"),
    ],
)
def test_a_group_that_cannot_be_added_is_added_nowhere(what: str, told: str) -> None:
    # T18
    for message in run_ranks(2, add_group, what):
        assert told in message, message


def changed_after_construction(rank: int, world_size: int, how: str) -> str:
    model = AwkwardModel()
    optimizer = ShardedADOPT(model.named_parameters(), lr=0.05)
    if how == "double":
        model.left.data = model.left.data.double()
    else:
        model.left.data = torch.zeros(2, 2)
    with pytest.raises(RuntimeError, match="'left' was changed after the optimizer was made") as caught:
        optimizer.step()
    return str(caught.value)


@pytest.mark.parametrize("how", ["double", "shape"])
def test_a_parameter_cast_or_replaced_after_construction_is_named(how: str) -> None:
    run_ranks(2, changed_after_construction, how)


def given_values_elsewhere(rank: int, world_size: int) -> None:
    model = AwkwardModel()
    optimizer = ShardedADOPT(model.named_parameters(), lr=0.05)
    other = {name: torch.full_like(value, 0.25) for name, value in model.state_dict().items()}
    model.load_state_dict(other, assign=False)
    for p in model.parameters():
        p.data = torch.full_like(p, 0.25)  # new memory, as assign=True and many libraries do
    for step in range(3):
        optimizer.zero_grad()
        model(*batch(step, 0)).backward()
        optimizer.step()
    twin = AwkwardModel()
    plain = ADOPT(twin.parameters(), lr=0.05)
    for p in twin.parameters():
        p.data.fill_(0.25)
    twin.counter.fill_(0.25)
    for step in range(3):
        plain.zero_grad()
        twin(*batch(step, 0)).backward()
        plain.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_parameter_given_other_memory_is_bound_again_with_its_values() -> None:
    run_ranks(2, given_values_elsewhere)


def fail_and_go_on(rank: int, world_size: int) -> list[float]:
    model = AwkwardModel()
    optimizer = ShardedADOPT(model.named_parameters(), lr=0.05, timeout=1.0, bucket_cap_mb=100 / 2**20)
    caught: list[Exception] = []
    begin = time.monotonic()
    for step in range(4):
        try:
            optimizer.zero_grad()
            loss = model(*batch(step, rank))
            if step == 1 and rank == 1:
                raise ArithmeticError("this rank has no loss")
            loss.backward()
            optimizer.step()
        except (ArithmeticError, RuntimeError) as error:
            caught.append(error)
            # The other rank has waited for its timeout; both are here now.
            optimizer.reset()
    (error,) = caught
    assert isinstance(error, ArithmeticError if rank == 1 else RankLost)
    if rank == 0:
        assert re.search(r"(from|gradients of bucket \d+ for) rank 1: .*[Tt]imed out", str(error)), error
    assert time.monotonic() - begin < 8
    return [p.sum().item() for p in model.parameters()]


def test_after_an_error_caught_on_every_rank_reset_lets_training_go_on() -> None:
    first, second = run_ranks(2, fail_and_go_on, timeout=30)
    assert first == second


def another_lr(rank: int, world_size: int, reduces: bool) -> str:
    model = AwkwardModel()
    optimizer = ShardedADOPT(model.named_parameters(), lr=0.05, reduce_gradients=reduces)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["lr"] = 0.1 + 0.1 * rank
    with pytest.raises(ValueError, match="lr") as caught:
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert all(float(state["step"]) == 2 for state in optimizer.state.values())
    return str(caught.value)


@pytest.mark.parametrize("reduces", [True, False])
def test_a_learning_rate_that_differs_by_rank_is_named_at_the_step(reduces: bool) -> None:
    # T17
    for message in run_ranks(2, another_lr, reduces):
        assert "parameter group 0: lr 0.1 against 0.2" in message


def killed_in_backward(rank: int, world_size: int) -> float:
    import os
    import signal

    model = AwkwardModel()
    optimizer = ShardedADOPT(model.named_parameters(), lr=0.05, timeout=20.0)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    model(*batch(0, rank)).backward()
    with pytest.raises(RankLost, match="rank 1"):
        optimizer.step()
    raise AssertionError(f"the survivor was told after {time.monotonic() - begin:.1f} s")


def test_a_killed_rank_is_an_error_on_the_others_at_once() -> None:
    # T31
    from ranks import RanksFailed

    with pytest.raises(RanksFailed) as caught:
        run_ranks(2, killed_in_backward)
    told = re.search(r"the survivor was told after ([\d.]+) s", str(caught.value))
    assert told is not None, str(caught.value)
    assert float(told.group(1)) < 5


def wrong_on_one(rank: int, world_size: int, what: str) -> str:
    wrong: dict[str, Any] = {"bucket_cap_mb": -1.0} if what == "bucket" else {"main_params": "bf16"}
    with pytest.raises(ValueError, match=r"\w") as caught:
        ShardedADOPT([nn.Parameter(torch.ones(3))], **(wrong if rank == 1 else {}))
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "told"), [("bucket", "bucket_cap_mb must be positive"), ("main", "main_params must be")]
)
def test_an_argument_that_is_wrong_on_one_rank_is_an_error_on_all(what: str, told: str) -> None:
    assert all(told in message for message in run_ranks(2, wrong_on_one, what))


def test_a_norm_below_zero_is_refused() -> None:
    optimizer = ShardedADOPT([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match=r"max_norm must be at least 0, got -1\.0"):
        optimizer.clip_grad_norm_(-1.0)


def test_what_is_no_state_dict_is_said_to_be_none() -> None:
    optimizer = ShardedADOPT([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="rank0_only=False"):
        optimizer.load_state_dict({})
