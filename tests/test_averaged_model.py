"""An average of the weights beside the optimizer: `torch.optim.swa_utils.AveragedModel`."""

from __future__ import annotations

import pytest
import torch
from oracle import AwkwardModel, assert_same, averaged_gradients, batch
from ranks import run_ranks
from torch import Tensor, nn
from torch.optim import swa_utils

from sharded_adopt import ADOPT, ShardedADOPT

KINDS = {
    "mean": {},
    "EMA": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)},
    "EMA, one by one": {"avg_fn": swa_utils.get_ema_avg_fn(0.9)},
}


def average_of(model: nn.Module, kind: str) -> swa_utils.AveragedModel:
    return swa_utils.AveragedModel(model, use_buffers=False, **KINDS[kind])


def sharded(rank: int, world_size: int, kind: str) -> tuple[list[Tensor], list[Tensor]]:
    model = AwkwardModel()
    optimizer = ShardedADOPT(model.named_parameters(), lr=0.05)
    average = average_of(model, kind)
    for step in range(5):
        optimizer.zero_grad()
        model(*batch(step, rank)).backward()
        optimizer.step()
        average.update_parameters(model)
    return [p.detach().clone() for p in average.parameters()], [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_the_average_over_sharded_steps_is_that_of_one_process_to_the_bit(kind: str) -> None:
    model = AwkwardModel()
    optimizer = ADOPT(model.named_parameters(), lr=0.05)
    average = average_of(model, kind)
    for step in range(5):
        for p, mean in zip(
            model.parameters(), averaged_gradients(model, [batch(step, r) for r in range(2)]), strict=True
        ):
            p.grad = mean
        optimizer.step()
        average.update_parameters(model)
    assert not torch.equal(average.module.left, model.left)
    for averaged, params in run_ranks(2, sharded, kind):
        assert_same(averaged, list(average.parameters()))
        assert_same(params, list(model.parameters()))
