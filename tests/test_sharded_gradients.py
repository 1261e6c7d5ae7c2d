"""What a user may do to gradients between two steps, and what is reduced when."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import AwkwardModel, assert_same, averaged_gradients, batch
from ranks import run_ranks
from torch import Tensor, nn

from sharded_adopt import ADOPT, ShardedADOPT
from sharded_adopt.sharding.buckets import flatten_in_memory_order

MANY_BUCKETS = 100 / 2**20
LR = {"lr": 0.05}

both_ways = pytest.mark.parametrize("frees", [False, True], ids=["kept", "freed"])
Scenario = Callable[[nn.Module, ShardedADOPT, int], None]


def sharded(rank: int, world_size: int, scenario: Scenario, overlap: bool, frees: bool = False) -> list[Tensor]:
    model = AwkwardModel()
    optimizer = ShardedADOPT(
        model.named_parameters(),
        **LR,
        bucket_cap_mb=MANY_BUCKETS,
        overlap_grad_reduce=overlap,
        shard_gradients=frees,
    )
    scenario(model, optimizer, rank)
    return [p.detach().clone() for p in model.parameters()]


def on_the_sum(batches: list[list[tuple[int, str]]], world_size: int) -> list[Tensor]:
    """One process that, for each step, sums the averaged gradients of some batches (a data index and a branch each)."""
    model = AwkwardModel()
    optimizer = ADOPT(model.parameters(), **LR)
    for step in batches:
        total: list[Tensor | None] = [None] * len(list(model.parameters()))
        for index, branch in step:
            means = averaged_gradients(model, [batch(index, rank, branch) for rank in range(world_size)])
            total = [a if b is None else b if a is None else a + b for a, b in zip(total, means, strict=True)]
        for p, grad in zip(model.parameters(), total, strict=True):
            p.grad = grad
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def check(
    scenario: Scenario,
    batches: list[list[tuple[int, str]]],
    overlap: bool = True,
    exact: bool = False,
    frees: bool = False,
) -> None:
    expected = on_the_sum(batches, 2)
    for params in run_ranks(2, sharded, scenario, overlap, frees):
        # Where two sums are added in another order than one process adds them, the last bit may differ; the division
        # by √v does not make that larger.
        assert_same(params, expected, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)


def accumulate(model: nn.Module, optimizer: ShardedADOPT, rank: int) -> None:
    for step in range(4):
        optimizer.zero_grad()
        with optimizer.no_sync():
            model(*batch(2 * step, rank, "left")).backward()
        model(*batch(2 * step + 1, rank, "right" if step else "left")).backward()
        optimizer.step()


ACCUMULATED = [[(2 * s, "left"), (2 * s + 1, "right" if s else "left")] for s in range(4)]


@both_ways
@pytest.mark.parametrize("overlap", [True, False])
def test_accumulation_under_no_sync_equals_the_sum(overlap: bool, frees: bool) -> None:
    # T25
    check(accumulate, ACCUMULATED, overlap, frees=frees)


def accumulate_without_no_sync(model: nn.Module, optimizer: ShardedADOPT, rank: int) -> None:
    for step in range(4):
        optimizer.zero_grad()
        model(*batch(2 * step, rank, "left")).backward()
        model(*batch(2 * step + 1, rank, "right" if step else "left")).backward()
        optimizer.step()


@both_ways
@pytest.mark.parametrize("overlap", [True, False])
def test_a_second_backward_without_no_sync_is_summed(overlap: bool, frees: bool) -> None:
    # T26
    check(accumulate_without_no_sync, ACCUMULATED, overlap, frees=frees)


def backward_on_one_rank_twice(model: nn.Module, optimizer: ShardedADOPT, rank: int) -> None:
    for step in range(3):
        optimizer.zero_grad()
        half = 0.5 if rank else 1.0
        for _ in range(2 if rank else 1):
            (half * model(*batch(step, rank, "left"))).backward()
        optimizer.step()


@both_ways
def test_ranks_with_another_number_of_backwards_neither_hang_nor_mix(frees: bool) -> None:
    check(backward_on_one_rank_twice, [[(s, "left")] for s in range(3)], frees=frees)


def no_sync_only(model: nn.Module, optimizer: ShardedADOPT, rank: int) -> None:
    for step in range(3):
        optimizer.zero_grad()
        with optimizer.no_sync():
            model(*batch(step, rank, "left")).backward()
        optimizer.step()


@both_ways
def test_step_reduces_what_was_only_accumulated(frees: bool) -> None:
    check(no_sync_only, [[(s, "left")] for s in range(3)], exact=True, frees=frees)


class Leave(Exception):
    pass


def leave_no_sync_by_an_exception(model: nn.Module, optimizer: ShardedADOPT, rank: int) -> None:
    with pytest.raises(Leave), optimizer.no_sync():
        raise Leave
    for step in range(3):
        optimizer.zero_grad()
        model(*batch(step, rank, "left")).backward()
        optimizer.step()


def test_an_exception_inside_no_sync_restores_synchronisation() -> None:
    # T25
    check(leave_no_sync_by_an_exception, [[(s, "left")] for s in range(3)], exact=True)


def zero(how: str) -> Scenario:
    def scenario(model: nn.Module, optimizer: ShardedADOPT, rank: int) -> None:
        for step in range(4):
            # The branch changes, so that a stale region of `right` or `left` would show.
            model(*batch(step, rank, "left" if step % 2 else "right")).backward()
            optimizer.step()
            if how == "optimizer-none":
                optimizer.zero_grad()
            elif how == "model-none":
                model.zero_grad()
            elif how == "by-hand":
                for p in model.parameters():
                    p.grad = None
            elif how == "optimizer-zero":
                optimizer.zero_grad(set_to_none=False)
            else:
                model.zero_grad(set_to_none=False)

    return scenario


STEPS_OF_ZERO = [[(s, "left" if s % 2 else "right")] for s in range(4)]


@pytest.mark.parametrize("how", ["optimizer-none", "model-none", "by-hand"])
def test_every_way_to_drop_gradients_is_the_same(how: str) -> None:
    # T23
    check(zero(how), STEPS_OF_ZERO, exact=True)


@pytest.mark.parametrize("how", ["optimizer-zero", "model-zero"])
def test_zeroed_gradients_stay_gradients_as_in_torch(how: str) -> None:
    # T23
    model = AwkwardModel()
    optimizer = ADOPT(model.parameters(), **LR)
    for step in range(4):
        branch = "left" if step % 2 else "right"
        means = averaged_gradients(model, [batch(step, rank, branch) for rank in range(2)])
        for p, mean in zip(model.parameters(), means, strict=True):
            # A gradient that was there before is zero now, not None.
            had = (step > 0 and p.grad is not None) or p in optimizer.state
            p.grad = mean if mean is not None else torch.zeros_like(p) if had else None
        optimizer.step()
    for params in run_ranks(2, sharded, zero(how), True):
        assert_same(params, [p.detach() for p in model.parameters()])


def never_zeroed(model: nn.Module, optimizer: ShardedADOPT, rank: int) -> None:
    for step in range(3):
        model(*batch(step, rank, "left")).backward()
        optimizer.step()


def test_without_zero_grad_gradients_add_up_over_steps_as_in_torch() -> None:
    model = AwkwardModel()
    optimizer = ADOPT(model.parameters(), **LR)
    total: list[Tensor | None] = [None] * len(list(model.parameters()))
    for step in range(3):
        means = averaged_gradients(model, [batch(step, rank, "left") for rank in range(2)])
        total = [m if t is None else t + m if m is not None else t for t, m in zip(total, means, strict=True)]
        for p, grad in zip(model.parameters(), total, strict=True):
            p.grad = grad
        optimizer.step()
    for params in run_ranks(2, sharded, never_zeroed, True):
        assert_same(params, [p.detach() for p in model.parameters()], rtol=1e-5, atol=1e-6)


def dropped_round(model: nn.Module, optimizer: ShardedADOPT, rank: int) -> None:
    for step in range(3):
        model(*batch(50 + step, rank, "right")).backward()  # a batch that is thought better of
        model.zero_grad()
        model(*batch(step, rank, "left")).backward()
        optimizer.step()
        model.zero_grad()


def test_a_backward_that_was_dropped_before_the_step_leaves_nothing_behind() -> None:
    # T27
    check(dropped_round, [[(s, "left")] for s in range(3)], exact=True)


def backward_then_nothing(model: nn.Module, optimizer: ShardedADOPT, rank: int) -> None:
    model(*batch(0, rank, "left")).backward()
    optimizer.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    optimizer.step()
    assert_same([p.detach() for p in model.parameters()], before)
    assert all(float(state["step"]) == 0 for state in optimizer.state.values())
    model(*batch(1, rank, "left")).backward()
    optimizer.step()


@both_ways
def test_a_step_without_gradients_changes_nothing(frees: bool) -> None:
    # T27
    check(backward_then_nothing, [[(1, "left")]], exact=True, frees=frees)


def dropped_through_the_optimizer(model: nn.Module, optimizer: ShardedADOPT, rank: int) -> None:
    for step in range(3):
        model(*batch(50 + step, rank, "right")).backward()
        if step == 1:
            optimizer.synchronize_gradients()
        optimizer.zero_grad()
        model(*batch(step, rank, "left")).backward()
        optimizer.step()
        optimizer.zero_grad()


@both_ways
def test_the_optimizers_zero_grad_drops_what_was_reduced(frees: bool) -> None:
    check(dropped_through_the_optimizer, [[(s, "left")] for s in range(3)], exact=True, frees=frees)


def freed(rank: int, world_size: int) -> None:
    model = AwkwardModel()
    optimizer = ShardedADOPT(model.named_parameters(), **LR, bucket_cap_mb=MANY_BUCKETS, shard_gradients=True)
    for step in range(2):
        (model(*batch(step, rank, "left")) + model(*batch(step, rank, "right"))).backward()
        # Everything is full, so everything is on its way and nothing is kept.
        assert all(p.grad is None for p in model.parameters())
        optimizer.synchronize_gradients()
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()


def test_with_shard_gradients_grad_is_none_once_it_is_reduced() -> None:
    run_ranks(2, freed)


def read_only(rank: int, world_size: int) -> None:
    model = AwkwardModel()
    optimizer = ShardedADOPT(model.named_parameters(), **LR, bucket_cap_mb=1 / 2**20, shard_gradients=True)
    everyone = [[torch.randn_like(p) for p in model.parameters()] for _ in range(world_size)]
    given = [g.clone() for g in everyone[rank]]
    for p, grad in zip(model.parameters(), given, strict=True):
        p.grad = grad
    optimizer.synchronize_gradients()
    assert_same(given, everyone[rank])
    optimizer.step()
    alone = AwkwardModel()
    plain = ADOPT(alone.parameters(), **LR)
    for p, *grads in zip(alone.parameters(), *everyone, strict=True):
        p.grad = sum(grads[1:], start=grads[0]) / world_size
    plain.step()
    for name, shards in optimizer.local_shards().items():
        whole = plain.state[dict(alone.named_parameters())[name]]["exp_avg_sq"]
        start = optimizer.state[optimizer.param_for(name)]["exp_avg_sq"].start
        order = optimizer.layout.params[[s.name for s in optimizer.layout.params].index(name)]
        flat = flatten_in_memory_order(whole, order)
        assert torch.equal(shards["exp_avg_sq"], flat[start : start + shards["exp_avg_sq"].numel()])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_gradient_that_travels_in_its_own_memory_is_only_read(world_size: int) -> None:
    run_ranks(world_size, read_only)


def by_hand(model: nn.Module, optimizer: ShardedADOPT, rank: int) -> None:
    for step in range(3):
        grads = torch.autograd.grad(model(*batch(step, rank, "left")), list(model.parameters())[:3], allow_unused=True)
        optimizer.zero_grad()
        for p, grad in zip(model.parameters(), grads, strict=False):
            p.grad = None if grad is None else grad * 2.0
        optimizer.step()


def test_gradients_set_by_hand_are_averaged() -> None:
    # T24
    model = AwkwardModel()
    optimizer = ADOPT(model.parameters(), **LR)
    for step in range(3):
        means = averaged_gradients(model, [batch(step, rank, "left") for rank in range(2)])
        for i, (p, mean) in enumerate(zip(model.parameters(), means, strict=True)):
            p.grad = None if i >= 3 or mean is None else mean * 2.0
        optimizer.step()
    for params in run_ranks(2, sharded, by_hand, True):
        assert_same(params, [p.detach() for p in model.parameters()])


def replaced_after_backward(model: nn.Module, optimizer: ShardedADOPT, rank: int) -> None:
    for step in range(3):
        optimizer.zero_grad()
        model(*batch(step, rank, "left")).backward()
        model.left.grad = torch.full_like(model.left, float(rank + 1 + step))
        model.pair.grad = None
        optimizer.step()


@pytest.mark.parametrize("overlap", [True, False])
def test_a_gradient_replaced_or_dropped_after_backward_counts(overlap: bool) -> None:
    # T24
    model = AwkwardModel()
    optimizer = ADOPT(model.parameters(), **LR)
    for step in range(3):
        means = averaged_gradients(model, [batch(step, rank, "left") for rank in range(2)])
        for p, mean in zip(model.parameters(), means, strict=True):
            p.grad = mean
        model.left.grad = torch.full_like(model.left, 1.5 + step)
        model.pair.grad = None
        optimizer.step()
    for params in run_ranks(2, sharded, replaced_after_backward, overlap):
        assert_same(params, [p.detach() for p in model.parameters()])


def edited_after_synchronisation(model: nn.Module, optimizer: ShardedADOPT, rank: int) -> None:
    for step in range(3):
        optimizer.zero_grad()
        model(*batch(step, rank, "left")).backward()
        optimizer.synchronize_gradients()
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(3.0)
        optimizer.step()


def test_editing_a_synchronised_gradient_counts() -> None:
    # T24
    model = AwkwardModel()
    optimizer = ADOPT(model.parameters(), **LR)
    for step in range(3):
        means = averaged_gradients(model, [batch(step, rank, "left") for rank in range(2)])
        for p, mean in zip(model.parameters(), means, strict=True):
            p.grad = None if mean is None else mean * 3.0
        optimizer.step()
    for params in run_ranks(2, sharded, edited_after_synchronisation, True):
        assert_same(params, [p.detach() for p in model.parameters()])


def after_synchronisation(rank: int, world_size: int) -> None:
    model = AwkwardModel()
    optimizer = ShardedADOPT(model.named_parameters(), **LR, bucket_cap_mb=MANY_BUCKETS)
    branch = "right" if rank else "left"
    model(*batch(0, rank, branch)).backward()
    optimizer.synchronize_gradients()
    twin = AwkwardModel()
    means = averaged_gradients(twin, [batch(0, r, "right" if r else "left") for r in range(world_size)])
    for segment, p, mean in zip(optimizer.layout.segments(rank), model.parameters(), means, strict=True):
        if mean is None:
            assert p.grad is None
            continue
        assert p.grad is not None
        assert p.grad.stride() == p.stride()
        order = optimizer.layout.params[segment.param].dim_order
        flat = p.grad.permute(order).reshape(-1)[segment.start : segment.stop]
        assert torch.equal(flat, mean.permute(order).reshape(-1)[segment.start : segment.stop])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_after_synchronisation_grad_holds_the_mean_in_this_ranks_segment(world_size: int) -> None:
    run_ranks(world_size, after_synchronisation)


def dropped_on_one_rank(rank: int, world_size: int) -> str:
    model = AwkwardModel()
    optimizer = ShardedADOPT(model.named_parameters(), **LR)
    # With both branches every bucket is full after backward, so it is being reduced already.
    (model(*batch(0, rank, "left")) + model(*batch(0, rank, "right"))).backward()
    if rank == 1:
        model.left.grad = None
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    # The error was raised everywhere, nothing is under way, and training goes on.
    model(*batch(1, rank, "left")).backward()
    optimizer.step()
    return str(caught.value)


def test_a_gradient_dropped_on_one_rank_only_is_an_error_on_all() -> None:
    for message in run_ranks(2, dropped_on_one_rank):
        assert "'left'" in message
        assert "dropped on some ranks" in message


def unevenly_dropped(rank: int, world_size: int, synchronizes: bool) -> str:
    """After this backward some buckets are full, and on their way, on one rank only."""
    model = AwkwardModel()
    optimizer = ShardedADOPT(model.named_parameters(), **LR, bucket_cap_mb=MANY_BUCKETS)
    loss = model(*batch(50, rank, "left"))
    (loss + model(*batch(51, rank, "right")) if rank else loss).backward()
    if synchronizes:
        optimizer.synchronize_gradients()
    model.zero_grad()
    model(*batch(0, rank, "left")).backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    twin = AwkwardModel()
    plain = ADOPT(twin.parameters(), **LR)
    for p, mean in zip(
        twin.parameters(), averaged_gradients(twin, [batch(0, r, "left") for r in range(world_size)]), strict=True
    ):
        p.grad = mean
    plain.step()
    state = optimizer.full_state_dict(rank0_only=False)["state"]
    for index, p in enumerate(twin.parameters()):
        if p in plain.state:
            assert torch.equal(state[index]["exp_avg_sq"], plain.state[p]["exp_avg_sq"])
    return ""


def test_a_round_that_ranks_dropped_unevenly_is_an_error_unless_synchronised_before() -> None:
    for message in run_ranks(2, unevenly_dropped, False):
        assert "call synchronize_gradients() before zero_grad()" in message
    assert run_ranks(2, unevenly_dropped, True) == ["", ""]


def edited_in_flight(rank: int, world_size: int) -> str:
    model = AwkwardModel()
    optimizer = ShardedADOPT(model.named_parameters(), **LR)
    # With both branches every bucket is full after backward, so it is being reduced already.
    (model(*batch(0, rank, "left")) + model(*batch(0, rank, "right"))).backward()
    assert model.left.grad is not None
    if rank == 0:
        model.left.grad.mul_(2.0)
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    return str(caught.value)


def test_editing_a_gradient_while_it_is_reduced_is_an_error_on_all_ranks() -> None:
    # T24
    messages = run_ranks(2, edited_in_flight)
    assert all("use this optimizer's clip_grad_norm_, not torch's" in message for message in messages)


def sparse(rank: int, world_size: int) -> str:
    torch.sparse.check_sparse_tensor_invariants.disable()  # the choice that torch otherwise warns about
    dense, embedding = nn.Linear(3, 2), nn.Embedding(5, 3, sparse=True)
    named = [*dense.named_parameters("dense"), *embedding.named_parameters("table")]
    optimizer = ShardedADOPT(named, **LR)
    dense(embedding(torch.tensor([1, 2]))).sum().backward()
    with pytest.raises(TypeError) as caught:
        optimizer.step()
    return str(caught.value)


def test_a_sparse_gradient_is_named_on_every_rank() -> None:
    # T12
    assert all("'table.weight'" in message for message in run_ranks(2, sparse))


def unfrozen(model: nn.Module, optimizer: ShardedADOPT, rank: int) -> None:
    model.pair.requires_grad_(False)
    for step in range(5):
        model.pair.requires_grad_(step >= 2)
        model.left.requires_grad_(step != 3)
        optimizer.zero_grad()
        model(*batch(step, rank, "left")).backward()
        optimizer.step()


def test_freezing_and_unfreezing_while_training_equals_one_process() -> None:
    # T19
    model = AwkwardModel()
    optimizer = ADOPT(model.parameters(), **LR)
    for step in range(5):
        means = averaged_gradients(model, [batch(step, rank, "left") for rank in range(2)])
        for p, mean in zip(model.parameters(), means, strict=True):
            p.grad = mean
        if step < 2:
            model.pair.grad = None
        if step == 3:
            model.left.grad = None
        optimizer.step()
    for params in run_ranks(2, sharded, unfrozen, True):
        assert_same(params, [p.detach() for p in model.parameters()])


def dummy_step(rank: int, world_size: int) -> list[Tensor]:
    model = AwkwardModel()
    optimizer = ShardedADOPT(model.named_parameters(), **LR)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(float(state["step"]) == 0 for state in optimizer.state.values())
    for step in range(3):
        optimizer.zero_grad()
        model(*batch(step, rank, "left")).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_a_dummy_step_of_zero_gradients_does_not_count() -> None:
    # T20
    expected = on_the_sum([[(s, "left")] for s in range(3)], 2)
    for params in run_ranks(2, dummy_step):
        assert_same(params, expected)


def nonzero_in_one_shard(rank: int, world_size: int) -> list[float]:
    param = nn.Parameter(torch.ones(8))
    optimizer = ShardedADOPT([param], **LR)
    param.grad = torch.zeros(8)
    param.grad[0] = float(rank == 1)  # owned by rank 0, made by rank 1
    optimizer.step()
    return [float(optimizer.state[param]["step"]), param.sum().item()]


def test_one_nonzero_element_anywhere_makes_the_step_count_on_every_rank() -> None:
    assert run_ranks(2, nonzero_in_one_shard) == [[1.0, 8.0], [1.0, 8.0]]


@both_ways
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 2.5, float("inf")])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_clipping_equals_torch_on_the_averaged_gradient(norm_type: float, world_size: int, frees: bool) -> None:
    # T29
    model = AwkwardModel()
    optimizer = ADOPT(model.parameters(), **LR)
    norms = []
    for step in range(4):
        means = averaged_gradients(model, [batch(step, rank, "left") for rank in range(world_size)])
        for p, mean in zip(model.parameters(), means, strict=True):
            # torch cannot take the infinity norm of an empty tensor.
            p.grad = None if p.numel() == 0 else mean
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3, norm_type).item())
        optimizer.step()
    for ours, params in run_ranks(world_size, clipped, norm_type, frees):
        assert ours == pytest.approx(norms, rel=1e-6)
        assert_same(params, [p.detach() for p in model.parameters()], rtol=1e-5, atol=1e-6)


def clipped(rank: int, world_size: int, norm_type: float, frees: bool) -> tuple[list[float], list[Tensor]]:
    model = AwkwardModel()
    optimizer = ShardedADOPT(model.named_parameters(), **LR, bucket_cap_mb=MANY_BUCKETS, shard_gradients=frees)
    norms = []
    for step in range(4):
        optimizer.zero_grad()
        model(*batch(step, rank, "left")).backward()
        norms.append(optimizer.clip_grad_norm_(0.3, norm_type).item())
        optimizer.step()
    return norms, [p.detach().clone() for p in model.parameters()]


def clip_nonfinite(rank: int, world_size: int) -> str:
    model = AwkwardModel()
    optimizer = ShardedADOPT(model.named_parameters(), **LR)
    assert optimizer.clip_grad_norm_(1.0).item() == 0.0
    model(*batch(0, rank, "left")).backward()
    if rank == 1:
        assert model.pair.grad is not None
        model.pair.grad = torch.tensor([float("inf"), 0.0])
    with pytest.raises(RuntimeError, match="total norm") as caught:
        optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
    return str(caught.value)


def test_a_norm_that_is_not_finite_raises_on_every_rank_if_asked() -> None:
    # T29
    first, second = run_ranks(2, clip_nonfinite)
    assert first == second
