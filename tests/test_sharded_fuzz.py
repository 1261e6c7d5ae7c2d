"""Random training loops, legal but unusual, against one process: what nobody thought of writing a test for.

In fp64, so that another order of the same additions stays below the tolerance and anything wrong does not.
"""

from __future__ import annotations

import random

import pytest
import torch
from oracle import AwkwardModel, Batch, averaged_gradients, batch
from ranks import run_ranks
from torch import Tensor

from sharded_adopt import ADOPT, ShardedADOPT

CASES, LENGTH = 30, 14
Action = tuple[str, int]


KINDS = ["backward"] * 5 + ["accumulate"] * 2 + ["step"] * 3 + ["zero"] * 2 + ["synchronize", "scale", "clip"]
KINDS += ["freeze", "move", "lr"]


def actions(seed: int) -> list[Action]:
    """A training loop: what is done, and a number from which batches and branches follow."""
    draw = random.Random(seed)
    return [(draw.choice(KINDS), draw.randrange(1000)) for _ in range(LENGTH)] + [("step", 0)]


def is_uneven(seed: int) -> bool:
    """Whether the ranks of this case use different parameters, and sometimes have no batch."""
    return seed % 2 == 0


def double(seed: int, number: int, rank: int) -> Batch | None:
    """What `rank` sees."""
    shift = rank if is_uneven(seed) else 0
    if shift and (number + shift) % 7 == 0:
        return None
    tokens, image, _ = batch(number, rank)
    return tokens, image.double(), ["left", "right", "neither"][(number // 7 + shift * (number % 3)) % 3]


def change(kind: str, number: int, model: AwkwardModel, optimizer: torch.optim.Optimizer) -> None:
    """What a user does to the model and the groups between backwards."""
    if kind == "freeze":
        param = [model.left, model.right, model.pair][number % 3]
        param.requires_grad_(not param.requires_grad)
    elif kind == "move":
        for p in model.parameters():
            p.data = p.data.clone()
    elif kind == "lr":
        optimizer.param_groups[0]["lr"] = 0.01 * (1 + number % 7)


def one_process(seed: int, world_size: int, frees: bool) -> list[Tensor]:
    model = AwkwardModel().double()
    optimizer = ADOPT(model.parameters(), lr=0.05)
    held: list[Tensor | None] = [None] * len(list(model.parameters()))
    for kind, number in actions(seed):
        change(kind, number, model, optimizer)
        if kind in ("backward", "accumulate"):
            means = averaged_gradients(model, [double(seed, number, rank) for rank in range(world_size)])
            held = [m if h is None else h if m is None else h + m for h, m in zip(held, means, strict=True)]
        elif kind == "zero":
            held = [None] * len(held)
        elif kind == "scale" and not frees:  # there is no gradient to scale once it is freed
            held = [None if h is None else h * 0.5 for h in held]
        for p, grad in zip(model.parameters(), held, strict=True):
            p.grad = None if grad is None or p.numel() == 0 else grad
        if kind == "clip":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            held = [p.grad for p in model.parameters()]
        elif kind == "step":
            optimizer.step()
            held = [None] * len(held) if frees else held
    return [p.detach().clone() for p in model.parameters()]


def several_ranks(rank: int, world_size: int, seeds: list[int], frees: bool) -> list[list[Tensor]]:
    results = []
    for seed in seeds:
        model = AwkwardModel().double()
        optimizer = ShardedADOPT(
            model.named_parameters(),
            lr=0.05,
            bucket_cap_mb=[25, 200 / 2**20, 1e-6][seed % 3],
            overlap_grad_reduce=seed % 5 != 0,
            shard_gradients=frees,
        )
        for kind, number in actions(seed):
            change(kind, number, model, optimizer)
            one = double(seed, number, rank)
            if kind == "backward" and one is not None:
                model(*one).backward()
            elif kind == "accumulate" and one is not None:
                with optimizer.no_sync():
                    model(*one).backward()
            elif kind == "zero":
                if is_uneven(seed):
                    # Ranks that have reduced different buckets cannot drop them as one: that is an error, by contract.
                    optimizer.synchronize_gradients()
                # Gradients that were freed can be dropped through the optimizer only.
                [optimizer, optimizer if frees else model][number % 2].zero_grad()
            elif kind == "synchronize":
                optimizer.synchronize_gradients()
            elif kind == "scale":
                optimizer.synchronize_gradients()
                for p in model.parameters():
                    if p.grad is not None:
                        p.grad.mul_(0.5)
            elif kind == "clip":
                optimizer.clip_grad_norm_(0.1)
            elif kind == "step":
                optimizer.step()
        results.append([p.detach().clone() for p in model.parameters()])
        optimizer.collectives.close()
    return results


@pytest.mark.parametrize("frees", [False, True], ids=["kept", "freed"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_training_loop_equals_one_process(world_size: int, frees: bool) -> None:
    seeds = list(range(CASES))
    results = run_ranks(world_size, several_ranks, seeds, frees, timeout=120)
    for case, seed in enumerate(seeds):
        expected = one_process(seed, world_size, frees)
        for rank in range(world_size):
            for ours, theirs in zip(results[rank][case], expected, strict=True):
                torch.testing.assert_close(
                    ours, theirs, rtol=1e-9, atol=1e-10, msg=lambda text, seed=seed: f"{actions(seed)}\n{text}"
                )
