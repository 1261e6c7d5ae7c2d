"""Situations in which sharding stacks have broken optimizers, where no other file holds the test.

docs/traps.md lists all of them. The numbers in the comments are its rows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import STEPS, AwkwardModel, assert_same, averaged_gradients, batch, branch_of, train_sharded
from ranks import run_ranks
from torch import Tensor, nn

from sharded_adopt import ADOPT, ShardedADOPT, checkpoint

MANY_BUCKETS = 100 / 2**20
both_ways = pytest.mark.parametrize("frees", [False, True], ids=["kept", "freed"])


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def shards(optimizer: ShardedADOPT) -> dict[str, dict[str, Tensor]]:
    return {n: {k: t.clone() for k, t in one.items()} for n, one in optimizer.local_shards().items()}


def make(frees: bool = False, **arguments: Any) -> tuple[AwkwardModel, ShardedADOPT]:
    model = AwkwardModel()
    optimizer = ShardedADOPT(
        model.named_parameters(), lr=0.05, bucket_cap_mb=MANY_BUCKETS, shard_gradients=frees, **arguments
    )
    return model, optimizer


# --- the first gradient, the missing one, the late one --------------------------------------------------------------


def first_step(rank: int, world_size: int, frees: bool, decouple: bool) -> None:
    model, optimizer = make(frees, weight_decay=0.1, decouple=decouple)
    before = values(model)
    (model(*batch(0, rank, "left")) + model(*batch(0, rank, "right"))).backward()
    means = averaged_gradients(twin := AwkwardModel(), [batch(0, r, "left") for r in range(world_size)])
    rights = averaged_gradients(twin, [batch(0, r, "right") for r in range(world_size)])
    optimizer.step()
    assert_same(values(model), before)
    after = shards(optimizer)
    places = optimizer.layout.segments(rank)
    for place, spec, p, left, right in zip(
        places, optimizer.layout.params, twin.parameters(), means, rights, strict=True
    ):
        state = after[spec.name]
        assert not state["exp_avg"].any()
        assert float(state["step"]) == (1.0 if p.requires_grad else 0.0)
        grads = [g for g in (left, right) if g is not None]
        if grads:
            grad = sum(grads[1:], grads[0]) + (0.0 if decouple else 0.1 * p.detach())
            flat = grad.permute(spec.dim_order).reshape(-1)[place.start : place.stop]
            torch.testing.assert_close(state["exp_avg_sq"], flat**2, rtol=1e-4, atol=1e-9)


@both_ways
@pytest.mark.parametrize("decouple", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_first_gradient_only_initialises_v_and_nothing_decays(world_size: int, decouple: bool, frees: bool) -> None:
    run_ranks(world_size, first_step, frees, decouple)  # T1


def missing_everywhere(rank: int, world_size: int, frees: bool) -> None:
    model, optimizer = make(frees, weight_decay=0.1, decouple=True)
    train_sharded(model, optimizer, rank, range(2), lambda step, rank: batch(step, rank, "right"))
    before, held = shards(optimizer), values(model)
    train_sharded(model, optimizer, rank, range(2, 4), lambda step, rank: batch(step, rank, "neither"))
    after = shards(optimizer)
    for name in ("right", "left"):
        assert all(torch.equal(tensor, before[name][key]) for key, tensor in after[name].items())
    for p, was, (name, _) in zip(model.parameters(), held, model.named_parameters(), strict=True):
        assert torch.equal(p, was) == (name in ("right", "left", "empty", "frozen")), name
    assert float(before["right"]["step"]) == 2
    assert float(before["left"]["step"]) == 0


@both_ways
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_parameter_without_a_gradient_on_any_rank_keeps_every_bit_of_value_and_state(
    world_size: int, frees: bool
) -> None:
    run_ranks(world_size, missing_everywhere, frees)  # T3


def late(rank: int, world_size: int, frees: bool) -> list[Tensor]:
    model, optimizer = make(frees)
    train_sharded(model, optimizer, rank, range(3), lambda step, rank: batch(step, rank, "left"))
    before = model.right.detach().clone()
    optimizer.zero_grad()
    one = batch(3, rank, "right" if rank == 0 else "left")  # one rank is enough
    model(*one).backward()
    optimizer.step()
    assert torch.equal(model.right, before), "its first gradient moves nothing"
    assert float(optimizer.local_shards()["right"]["step"]) == 1
    assert float(optimizer.local_shards()["left"]["step"]) == 4
    train_sharded(model, optimizer, rank, range(4, 6), lambda step, rank: batch(step, rank, "right"))
    assert float(optimizer.local_shards()["right"]["step"]) == 3
    return values(model)


@both_ways
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_late_parameter_is_initialised_then_and_counts_its_own_steps(world_size: int, frees: bool) -> None:
    # T5
    model = AwkwardModel()
    optimizer = ADOPT(model.parameters(), lr=0.05)
    for step in range(6):
        branches = ["left" if step < 3 or (step == 3 and rank) else "right" for rank in range(world_size)]
        means = averaged_gradients(model, [batch(step, rank, branch) for rank, branch in enumerate(branches)])
        for p, mean in zip(model.parameters(), means, strict=True):
            p.grad = mean
        optimizer.step()
    for params in run_ranks(world_size, late, frees):
        assert_same(params, values(model))


def zero_gradient(rank: int, world_size: int, init: str) -> list[float]:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(5))
    optimizer = ShardedADOPT([a, b], lr=0.1, init=init)
    for grad in (0.0, 2.0, 2.0):
        optimizer.zero_grad()
        a.grad, b.grad = torch.ones(3), torch.full((5,), grad)
        optimizer.step()
    return [float(optimizer.local_shards()["param.1"]["step"]), b.detach()[0].item(), b.detach()[4].item()]


def test_a_gradient_of_zeros_is_a_gradient_and_init_element_waits_for_another() -> None:
    # T5: zeros use up the initialisation as in the authors' rule; init="element" does not let them.
    for steps, first, last in run_ranks(2, zero_gradient, "parameter"):
        assert steps == 3
        assert (
            first == last == pytest.approx(1 - 0.1 * (0.1 + 0.09 + 0.1 * 2**0.25))
        )  # both at the clip bounds: v was 0
    for steps, first, last in run_ranks(2, zero_gradient, "element"):
        assert steps == 3
        assert first == last == pytest.approx(0.99)  # one update, of (1 - β1) * lr


# --- sizes ----------------------------------------------------------------------------------------------------------


def five_ranks(rank: int, world_size: int) -> list[Tensor]:
    model, optimizer = make()
    train_sharded(model, optimizer, rank, range(STEPS))
    return values(model)


def test_five_ranks_equal_one_process() -> None:
    from oracle import train_unsharded

    expected, _ = train_unsharded(lambda m: ADOPT(m.parameters(), lr=0.05), 5)  # T6
    for params in run_ranks(5, five_ranks):
        assert_same(params, expected)


def tiny(rank: int, world_size: int, frees: bool, directory: str) -> tuple[list[float], list[int]]:
    params = [nn.Parameter(torch.ones(())), nn.Parameter(torch.full((2,), 2.0)), nn.Parameter(torch.empty(0))]
    optimizer = ShardedADOPT(params, lr=0.1, shard_gradients=frees, bucket_cap_mb=4 / 2**20)
    owned = [segment.numel for segment in optimizer.layout.segments(rank)]
    for step in range(4):
        optimizer.zero_grad()
        (params[0] * (step + rank + 1) + params[1].sum() + params[2].sum()).backward()
        norm = optimizer.clip_grad_norm_(100.0)
        mean = step + 1 + (world_size - 1) / 2
        assert float(norm) == pytest.approx((mean**2 + 2) ** 0.5)
        optimizer.step()
    state = optimizer.state_dict()["state"]
    assert [set(state[index]) for index in range(3)] == [{"step", "exp_avg", "exp_avg_sq"}] * 3
    full = optimizer.full_state_dict(rank0_only=False)
    checkpoint.save(directory, step=4, optimizer=optimizer)
    again = ShardedADOPT([nn.Parameter(torch.zeros_like(p)) for p in params], lr=0.5)
    checkpoint.load(directory, optimizer=again)
    third = ShardedADOPT([nn.Parameter(p.detach().clone()) for p in params], lr=0.5)
    third.load_state_dict(full)
    for other in (again, third):
        for mine, theirs in zip(optimizer.state.values(), other.state.values(), strict=True):
            assert torch.equal(mine["step"], theirs["step"])
    assert_same([p.detach() for g in again.param_groups for p in g["params"]], [p.detach() for p in params])
    return [params[0].item(), *params[1].tolist()], owned


@both_ways
def test_fewer_elements_than_ranks_train_clip_save_and_load(frees: bool, tmp_path: Any) -> None:
    # T7, T14
    results = run_ranks(4, tiny, frees, str(tmp_path))
    assert any(sum(owned) == 0 for _, owned in results), "some rank owns nothing at all"
    assert all(params == results[0][0] for params, _ in results)


def test_a_lone_process_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # T8
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a message")

    for name in ("all_reduce", "all_gather", "isend", "irecv", "broadcast", "gather", "new_group", "barrier"):
        monkeypatch.setattr(dist, name, refuse)
    model, optimizer = make()
    for step in range(3):
        optimizer.zero_grad()
        model(*batch(step, 0)).backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    optimizer.load_state_dict(optimizer.full_state_dict())


# --- tying ----------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.embedding(tokens)
        return self.head(hidden).square().mean()


def tied_before(rank: int, world_size: int) -> None:
    model = Tied()
    model.head.weight = model.embedding.weight
    optimizer = ShardedADOPT(model.parameters(), module=model, lr=0.1)
    assert [spec.name for spec in optimizer.layout.params] == ["embedding.weight"]
    hooks = 0

    def count(_: Tensor) -> None:
        nonlocal hooks
        hooks += 1

    model.head.weight.register_post_accumulate_grad_hook(count)
    model(torch.tensor([1, 2])).backward()
    norm = optimizer.clip_grad_norm_(100.0)
    optimizer.step()
    assert hooks == 1
    assert len(optimizer.state) == 1
    assert model.head.weight is model.embedding.weight
    twin = Tied()
    twin.head.weight = twin.embedding.weight
    twin(torch.tensor([1, 2])).backward()
    assert float(norm) == pytest.approx(float(torch.nn.utils.clip_grad_norm_(twin.parameters(), 100.0)))


def test_tied_parameters_count_once() -> None:
    run_ranks(2, tied_before)  # T9


def tied_after(rank: int, world_size: int) -> str:
    model = Tied()
    optimizer = ShardedADOPT(model.named_parameters(), lr=0.1)
    if rank == 1:
        model.head.weight = model.embedding.weight
    model(torch.tensor([1, 2])).backward()
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    return str(caught.value)


def test_tying_after_construction_is_an_error_that_names_both() -> None:
    for message in run_ranks(2, tied_after):
        assert "'head.weight' was tied to 'embedding.weight'" in message  # T10


# --- groups, norms, infinities, closures ----------------------------------------------------------------------------


def group_through_a_checkpoint(rank: int, world_size: int, directory: str) -> None:
    model, optimizer = make()
    train_sharded(model, optimizer, rank, range(2))
    extra = nn.Parameter(torch.full((7,), 0.5))
    optimizer.add_param_group({"params": [("extra", extra)], "lr": 0.2})
    for step in range(2):
        optimizer.zero_grad()
        (model(*batch(step, rank)) + extra.square().sum()).backward()
        optimizer.step()
    checkpoint.save(directory, step=4, optimizer=optimizer)
    again, other = make()
    fresh = nn.Parameter(torch.zeros(7))
    other.add_param_group({"params": [("extra", fresh)], "lr": 0.7})
    checkpoint.load(directory, optimizer=other)
    assert torch.equal(fresh, extra)
    assert other.param_groups[1]["lr"] == 0.2
    assert_same(values(again), values(model))
    assert float(other.local_shards()["extra"]["step"]) == 2


def test_an_added_group_comes_back_from_a_checkpoint(tmp_path: Any) -> None:
    run_ranks(2, group_through_a_checkpoint, str(tmp_path))  # T18


def clip_to_nothing(rank: int, world_size: int) -> tuple[float, float]:
    # Two groups of two ranks, each with a model and a norm of its own.
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    param = nn.Parameter(torch.ones(6))
    optimizer = ShardedADOPT([param], lr=0.1, process_group=groups[rank // 2])
    param.grad = torch.full((6,), float(rank))
    norm = float(optimizer.clip_grad_norm_(0.0))
    assert not optimizer._gradients.segment_grad(optimizer.layout.segments(rank % 2)[0]).any()
    optimizer.step()
    return norm, param.sum().item()


def test_a_norm_is_that_of_the_group_and_max_norm_zero_clips_to_zero() -> None:
    # T29
    norms = [norm for norm, _ in run_ranks(4, clip_to_nothing)]
    assert norms == pytest.approx([0.5 * 6**0.5] * 2 + [2.5 * 6**0.5] * 2)


def nan_on_one_rank(rank: int, world_size: int) -> tuple[list[Tensor], int]:
    model, optimizer = make()
    for step in range(3):
        optimizer.zero_grad()
        loss = model(*batch(step, rank))
        (loss * float("nan") if step == 1 and rank == 1 else loss).backward()
        optimizer.step()
    return values(model), sum(int(p.isnan().sum()) for p in model.parameters())


def test_without_a_scaler_a_nan_reaches_every_rank_alike() -> None:
    # T30
    (first, nans), (second, others) = run_ranks(2, nan_on_one_rank)
    assert nans == others > 0
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def with_closure(rank: int, world_size: int) -> list[Tensor]:
    model, optimizer = make()
    for step in range(4):

        def closure(step: int = step) -> Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss: Tensor = model(*batch(step, rank))
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        assert loss.item() > 0
    return values(model)


def test_gradients_made_in_a_closure_are_averaged() -> None:
    # T36
    model = AwkwardModel()
    optimizer = ADOPT(model.parameters(), lr=0.05)
    for step in range(4):
        for p, mean in zip(
            model.parameters(), averaged_gradients(model, [batch(step, r) for r in range(2)]), strict=True
        ):
            p.grad = mean
        optimizer.step()
    for params in run_ranks(2, with_closure):
        assert_same(params, values(model))


def group_destroyed(rank: int, world_size: int) -> str:
    model, optimizer = make(timeout=5.0)
    train_sharded(model, optimizer, rank, range(1))
    shown = repr(optimizer)
    dist.barrier()
    dist.destroy_process_group()  # with hooks alive and gradients there
    with pytest.raises((RuntimeError, ValueError)):
        train_sharded(model, optimizer, rank, range(1, 3))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # what the helper destroys
    return shown


def test_the_process_group_goes_while_hooks_are_alive_without_a_hang() -> None:
    # T37
    for shown in run_ranks(2, group_destroyed, timeout=30):
        assert shown.startswith("ShardedADOPT (")
        assert "lr: 0.05" in shown


# --- the rule's own options -----------------------------------------------------------------------------------------


def bound(step: int) -> float:
    return 0.5 * (1 + step)


def other_bound(step: int) -> float:
    return 1.0


RULES: dict[str, dict[str, Any]] = {
    "maximize": {"maximize": True},
    "l2": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.1, "decouple": True},
    "no eps": {"eps": 0.0},
    "no clip": {"clip_lambda": None},
    "own clip": {"clip_lambda": bound},
}


def with_rule(rank: int, world_size: int, rule: str) -> list[Tensor]:
    model, optimizer = make(**RULES[rule])
    train_sharded(model, optimizer, rank, range(STEPS))
    if rule == "own clip":
        saved = optimizer.state_dict()["param_groups"][0]["clip_lambda"]
        assert saved == {"custom": f"{bound.__module__}.bound"}, "a name, not a pickle"
    return values(model)


@pytest.mark.parametrize("rule", RULES)
def test_every_option_of_the_rule_is_that_of_one_process(rule: str) -> None:
    # T2, T40
    model = AwkwardModel()
    optimizer = ADOPT(model.named_parameters(), lr=0.05, **RULES[rule])
    for step in range(STEPS):
        means = averaged_gradients(model, [batch(step, rank, branch_of(step, rank)) for rank in range(2)])
        for p, mean in zip(model.parameters(), means, strict=True):
            p.grad = mean
        optimizer.step()
    for params in run_ranks(2, with_rule, rule):
        torch.testing.assert_close(params, values(model), rtol=0, atol=0, equal_nan=True)


def other_clip(rank: int, world_size: int) -> str:
    with pytest.raises(ValueError, match="clip_lambda") as caught:
        make(clip_lambda=other_bound if rank else bound)
    return str(caught.value)


def test_clip_bounds_that_differ_by_rank_are_named() -> None:
    for message in run_ranks(2, other_clip):
        assert "<function bound> against <function other_bound>" in message  # T40
