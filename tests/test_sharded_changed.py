"""What happens to parameters behind the optimizer's back: bound again with their values, or refused by name.

The danger is a detached copy: the model trains one tensor, the optimizer another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import AwkwardModel, assert_same, averaged_gradients, batch
from ranks import run_ranks
from torch import Tensor, nn

from sharded_adopt import ADOPT, ShardedADOPT

MANY_BUCKETS = 100 / 2**20


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(*batch(step, rank)).backward()
        optimizer.step()


def train_oracle(model: nn.Module, optimizer: torch.optim.Optimizer, world_size: int, steps: range) -> None:
    for step in steps:
        means = averaged_gradients(model, [batch(step, rank) for rank in range(world_size)])
        for p, mean in zip(model.parameters(), means, strict=True):
            p.grad = mean
        optimizer.step()


# --- bound again ----------------------------------------------------------------------------------------------------


def new_memory(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data.clone() * 0.5


def there_and_back(model: nn.Module) -> None:
    model.half().float()


def square_transposed(model: nn.Module) -> None:
    """The same memory, shape and dtype, and other strides: what a look at the address does not see."""
    square = model.square
    assert isinstance(square, nn.Parameter)
    square.data = square.data.t()


def moved_back_by_hand(model: nn.Module) -> None:
    """A view of the bucket that lies elsewhere in it."""
    square = model.square
    assert isinstance(square, nn.Parameter)
    square.data = square.data.flip(0)


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "new memory": new_memory,
    "cast there and back": there_and_back,
    "transposed": square_transposed,
    "flipped": moved_back_by_hand,
}


class WithSquare(AwkwardModel):
    """With a square matrix, of which the transpose has the same shape."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.square = nn.Parameter(torch.arange(49.0).reshape(7, 7) / 49)

    def forward(self, tokens: Tensor, image: Tensor, branch: str) -> Tensor:
        return super().forward(tokens, image, branch) + (self.embedding[tokens] @ self.square).square().mean()


def changed_and_bound_again(rank: int, world_size: int, how: str, frees: bool) -> list[Tensor]:
    model = WithSquare()
    optimizer = ShardedADOPT(model.parameters(), lr=0.05, bucket_cap_mb=MANY_BUCKETS, shard_gradients=frees)
    train(model, optimizer, rank, range(3))
    CHANGES[how](model)
    train(model, optimizer, rank, range(3, 6))
    return values(model)


@pytest.mark.parametrize("frees", [False, True], ids=["kept", "freed"])
@pytest.mark.parametrize("how", CHANGES)
def test_a_parameter_given_other_memory_or_strides_trains_on_with_its_values(how: str, frees: bool) -> None:
    # T32
    model = WithSquare()
    optimizer = ADOPT(model.parameters(), lr=0.05)
    train_oracle(model, optimizer, 2, range(3))
    before = values(model)
    CHANGES[how](model)
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    train_oracle(model, optimizer, 2, range(3, 6))
    for params in run_ranks(2, changed_and_bound_again, how, frees):
        # The sharded matrix gets its own strides back at the next step, and matmul rounds by strides.
        tolerance = 1e-5 if how == "transposed" else 0.0
        assert_same(params, values(model), rtol=tolerance, atol=tolerance / 10)


CASTS: dict[str, Callable[[nn.Module], None]] = {
    "half": lambda model: model.half() and None,
    "double": lambda model: model.to(torch.float64) and None,
    "shape": lambda model: setattr(model.left, "data", torch.zeros(2, 2)),
    "part": lambda model: setattr(model.left, "data", model.left.data[:2]),  # the address stays
}


def cast(rank: int, world_size: int, how: str, everywhere: bool, reduces: bool) -> str:
    model = AwkwardModel()
    optimizer = ShardedADOPT(model.named_parameters(), lr=0.05, reduce_gradients=reduces)
    before = values(model)
    if everywhere or rank == 1:
        CASTS[how](model)
    with pytest.raises(RuntimeError, match="was changed after the optimizer was made: expected shape") as caught:
        optimizer.step()
    if not everywhere and rank == 0:
        assert_same(values(model), before)
    return str(caught.value)


@pytest.mark.parametrize("reduces", [True, False])
@pytest.mark.parametrize("everywhere", [True, False], ids=["everywhere", "on one rank"])
@pytest.mark.parametrize("how", CASTS)
def test_a_parameter_cast_moved_or_cut_is_refused_by_name_on_every_rank(
    how: str, everywhere: bool, reduces: bool
) -> None:
    # T32
    for message in run_ranks(2, cast, how, everywhere, reduces):
        assert ("'embedding'" if how in ("half", "double") else "'left'") in message


# --- replaced in a module -------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.body(x)))
        return y.square().mean()


def assigned(model: Net) -> None:
    model.head.weight = nn.Parameter(torch.ones(2, 4))


def loaded(model: Net) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def normed(model: Net) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.head)


def other_head(model: Net) -> None:
    model.head = nn.Linear(4, 2)


def overwritten(model: Net) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


SEEN_BY_TORCHS_HOOK = [assigned, loaded]
REPLACEMENTS = [*SEEN_BY_TORCHS_HOOK, normed, other_head, overwritten]
GIVEN: dict[str, Callable[[Net], dict[str, Any]]] = {
    "parameters": lambda model: {"params": model.parameters()},
    "named": lambda model: {"params": model.named_parameters()},
    "module": lambda model: {"params": [{"params": list(model.parameters())}], "module": model},
    "groups": lambda model: {"params": [{"params": list(model.parameters())}]},
}
CASES = [(how, given) for given in ("parameters", "named", "module") for how in REPLACEMENTS]
CASES += [(how, "groups") for how in SEEN_BY_TORCHS_HOOK]


def replaced(rank: int, world_size: int, how: Callable[[Net], None], given: str, reduces: bool) -> str:
    model = Net()
    optimizer = ShardedADOPT(**GIVEN[given](model), lr=0.05, reduce_gradients=reduces)
    old = list(model.parameters())
    model(torch.ones(3, 4)).backward()
    optimizer.step()
    before = [p.detach().clone() for p in old]
    if rank == 1:
        how(model)
    optimizer.zero_grad()
    x = torch.ones(3, 4)
    model(x.double() if model.body.weight.dtype is torch.float64 else x).backward()
    for _ in range(2):  # not only once
        with pytest.raises(RuntimeError, match="nobody would train them") as caught:
            optimizer.step()
    assert_same(old, before)
    return str(caught.value)


@pytest.mark.parametrize(("how", "given"), CASES, ids=lambda one: one if isinstance(one, str) else one.__name__)
def test_a_parameter_replaced_in_its_module_is_refused_by_name_on_every_rank(
    how: Callable[[Net], None], given: str
) -> None:
    # T32
    for message in run_ranks(2, replaced, how, given, True):
        assert "weight" in message
        assert "head" in message or how is assigned or how is loaded


def test_a_replaced_parameter_is_refused_beside_ddp_too() -> None:
    for message in run_ranks(2, replaced, assigned, "named", False):
        assert "trainable parameters ['weight'] in the place of ['head.weight']" in message


def submodule_out_of_a_list(rank: int, world_size: int) -> None:
    model = Net()
    optimizer = ShardedADOPT(list(model.parameters()), module=model, lr=0.05)
    model.extra = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"trainable parameters \['extra.weight', 'extra.bias'\]"):
        optimizer.step()
    optimizer.add_param_group({"params": list(model.extra.parameters())})
    optimizer.step()


def test_a_parameter_added_to_the_named_module_must_be_handed_over() -> None:
    run_ranks(2, submodule_out_of_a_list)


def put_back(rank: int, world_size: int) -> list[Tensor]:
    model = Net()
    optimizer = ShardedADOPT(model.parameters(), lr=0.05)
    old = model.head.weight
    for step in range(4):
        model.head.weight = nn.Parameter(torch.zeros(2, 4))  # say, an average of weights to evaluate
        model(torch.ones(3, 4))
        model.head.weight = old
        optimizer.zero_grad()
        model(torch.full((3, 4), 1.0 + step)).backward()
        optimizer.step()
    return values(model)


def test_weights_swapped_in_to_evaluate_and_back_are_no_replacement() -> None:
    model = Net()
    optimizer = ADOPT(model.parameters(), lr=0.05)
    for step in range(4):
        optimizer.zero_grad()
        model(torch.full((3, 4), 1.0 + step)).backward()
        optimizer.step()
    for params in run_ranks(2, put_back):
        assert_same(params, values(model))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def parametrized(model: Net) -> None:
    torch.nn.utils.parametrize.register_parametrization(model.body, "weight", Doubled())


def pruned(model: Net) -> None:
    from torch.nn.utils import prune

    prune.random_unstructured(model.body, "weight", amount=0.5)


def dropped(model: Net) -> None:
    model.body.bias = None


def frozen_instead(model: Net) -> None:
    model.body.bias = nn.Parameter(torch.ones(4), requires_grad=False)


def averaged(model: Net) -> None:
    model.average = torch.optim.swa_utils.AveragedModel(model.head).requires_grad_(False)


def restructured(rank: int, world_size: int, how: Callable[[Net], None]) -> list[Tensor]:
    model = Net()
    optimizer = ShardedADOPT(model.parameters(), lr=0.05)
    old = list(model.parameters())
    torch.manual_seed(1)
    how(model)
    for step in range(4):
        optimizer.zero_grad()
        model(torch.full((3, 4), 1.0 + step)).backward()
        optimizer.step()
    return [p.detach().clone() for p in old]


@pytest.mark.parametrize("how", [parametrized, pruned, dropped, frozen_instead, averaged])
def test_a_module_may_be_rebuilt_around_the_same_parameters(how: Callable[[Net], None]) -> None:
    # T32: what holds the very same tensors elsewhere, or trains fewer, is no detached copy.
    model = Net()
    optimizer = ADOPT(model.parameters(), lr=0.05)
    old = list(model.parameters())
    torch.manual_seed(1)
    how(model)
    for step in range(4):
        optimizer.zero_grad()
        model(torch.full((3, 4), 1.0 + step)).backward()
        optimizer.step()
    for params in run_ranks(2, restructured, how):
        assert_same(params, old)


# --- copies and other ways to call ----------------------------------------------------------------------------------


def copied(rank: int, world_size: int) -> list[Tensor]:
    model = AwkwardModel()
    optimizer = ShardedADOPT(model.parameters(), lr=0.05, bucket_cap_mb=MANY_BUCKETS)
    train(model, optimizer, rank, range(2))
    twin = copy.deepcopy(model)
    assert twin.head is twin.embedding
    assert all(p.untyped_storage().nbytes() == p.numel() * 4 for p in twin.parameters()), "not the whole bucket"
    before = values(twin)
    train(model, optimizer, rank, range(2, 4))
    assert_same(values(twin), before)
    # A backward through the copy is none through the model, and makes no step.
    held = values(model)
    optimizer.zero_grad()
    twin(*batch(4, rank)).backward()
    optimizer.step()
    assert_same(values(model), held)
    assert max(float(state["step"]) for state in optimizer.state.values()) == 4
    train(model, optimizer, rank, range(4, 6))
    return values(model)


def test_a_deep_copy_of_the_model_is_a_model_of_its_own() -> None:
    # T32
    model = AwkwardModel()
    train_oracle(model, ADOPT(model.parameters(), lr=0.05), 2, range(6))
    for params in run_ranks(2, copied):
        assert_same(params, values(model))


def functional(rank: int, world_size: int, how: str) -> list[Tensor]:
    from torch.func import functional_call, grad

    model = Net()
    params = dict(model.named_parameters())
    optimizer = ShardedADOPT(model.parameters(), lr=0.05)
    for step in range(4):
        optimizer.zero_grad()
        x = torch.full((3, 4), 1.0 + step + rank)
        if how == "functional_call":
            functional_call(model, params, (x,)).backward()
        else:
            detached = {name: p.detach() for name, p in params.items()}
            grads = grad(lambda weights, x=x: functional_call(model, weights, (x,)))(detached)
            for name, p in params.items():
                p.grad = grads[name]
        optimizer.step()
    return values(model)


@pytest.mark.parametrize("how", ["functional_call", "grad"])
def test_torch_func_trains_the_parameters_themselves(how: str) -> None:
    model = Net()
    optimizer = ADOPT(model.parameters(), lr=0.05)
    for step in range(4):
        grads = []
        for rank in range(2):
            model.zero_grad()
            model(torch.full((3, 4), 1.0 + step + rank)).backward()
            grads.append([p.grad for p in model.parameters() if p.grad is not None])
        for p, first, second in zip(model.parameters(), *grads, strict=True):
            p.grad = (first + second) / 2
        optimizer.step()
    for params in run_ranks(2, functional, how):
        assert_same(params, values(model))
