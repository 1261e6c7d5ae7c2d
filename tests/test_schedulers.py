"""Every learning rate scheduler of torch: alone, sharded, and taken up again from a checkpoint."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import AwkwardModel, assert_same, averaged_gradients, batch
from ranks import run_ranks
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.optim import lr_scheduler as lrs

from sharded_adopt import ADOPT, ShardedADOPT, checkpoint

STEPS, SAVED = 10, 5


def halved(step: int) -> float:
    return 0.5**step


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, halved),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lrs.StepLR(o, 3),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2, 7, 7], gamma=0.5),
    "ConstantLR": lambda o: lrs.ConstantLR(o, 0.5, total_iters=6),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.5, total_iters=7),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lrs.SequentialLR(o, [lrs.ConstantLR(o), lrs.MultiStepLR(o, [1, 3])], [4]),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 8, power=2.0),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 10),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.StepLR(o, 4), lrs.ExponentialLR(o, 0.9)]),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.01, 0.1, step_size_up=3),  # moves betas too
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 3, 2),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.1, total_steps=STEPS),  # moves betas too
    "SWALR": lambda o: swa_utils.SWALR(o, 0.01, anneal_epochs=6),
}


def test_no_scheduler_of_torch_is_left_out() -> None:
    abstract = (lr_scheduler.LRScheduler, lr_scheduler._LRScheduler)
    found = [c for c in vars(lr_scheduler).values() if inspect.isclass(c) and issubclass(c, lr_scheduler.LRScheduler)]
    assert {c.__name__ for c in found if c not in abstract} | {"SWALR"} == set(SCHEDULERS)


def move(scheduler: Any, step: int) -> None:
    if isinstance(scheduler, lrs.ReduceLROnPlateau):
        scheduler.step([3.0, 2.0, 2.0, 2.0, 2.5, 1.0, 1.0, 1.0, 1.0, 1.0][step])
    else:
        scheduler.step()


def seen(optimizer: Optimizer) -> tuple[float, Any]:
    return float(optimizer.param_groups[0]["lr"]), optimizer.param_groups[0]["betas"]


Trajectory = tuple[list[tuple[float, Any]], list[Tensor]]


def lr_of(is_tensor: bool) -> float | Tensor:
    return torch.tensor(0.05) if is_tensor else 0.05


def one_process(name: str, is_tensor: bool) -> Trajectory:
    model = AwkwardModel()
    optimizer = ADOPT(model.named_parameters(), lr=lr_of(is_tensor), foreach=False)
    scheduler = SCHEDULERS[name](optimizer)
    rates = []
    for step in range(STEPS):
        for p, mean in zip(
            model.parameters(), averaged_gradients(model, [batch(step, r) for r in range(2)]), strict=True
        ):
            p.grad = mean
        optimizer.step()
        move(scheduler, step)
        rates.append(seen(optimizer))
    return rates, [p.detach().clone() for p in model.parameters()]


def sharded(rank: int, world_size: int, name: str, is_tensor: bool, root: Path, first: int) -> Trajectory:
    model = AwkwardModel()
    optimizer = ShardedADOPT(model.named_parameters(), lr=lr_of(is_tensor), foreach=False)
    scheduler = SCHEDULERS[name](optimizer)
    if first:
        nn.init.constant_(model.left, 7.0)
        loaded = checkpoint.load(root, optimizer=optimizer, model=model)
        scheduler.load_state_dict(loaded.extra["scheduler"])
    rates = []
    for step in range(first, STEPS):
        optimizer.zero_grad()
        model(*batch(step, rank)).backward()
        optimizer.step()
        move(scheduler, step)
        rates.append(seen(optimizer))
        if not first and step + 1 == SAVED:
            extra = {"scheduler": scheduler.state_dict()}
            checkpoint.save(root, step=SAVED, optimizer=optimizer, model=model, extra=extra)
    return rates, [p.detach().clone() for p in model.parameters()]


PAGE = (Path(__file__).parents[1] / "docs" / "from-adamw.md").read_text(encoding="utf-8")
LINES = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "adamw_scheduler" in block)


def from_adamw_with_its_scheduler(name: str, is_tensor: bool, ours: Any) -> list[Any]:
    """lr and betas of AdamW for `SAVED` steps, then those of what `ours` makes of it; None: AdamW goes on."""
    model = nn.Linear(3, 2)
    optimizer: Optimizer = torch.optim.AdamW(model.parameters(), lr=lr_of(is_tensor), foreach=False)
    scheduler = SCHEDULERS[name](optimizer)
    rates = []
    for step in range(STEPS):
        if step == SAVED and ours is not None:
            names = {
                "optimizer": ours.from_adamw(optimizer),
                "adamw_scheduler": scheduler,
                "make_scheduler": SCHEDULERS[name],
            }
            exec(LINES, names)
            optimizer, scheduler = names["optimizer"], names["scheduler"]
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().mean().backward()
        rates.append(seen(optimizer))
        optimizer.step()
        move(scheduler, step)
        rates.append(seen(optimizer))
    return rates


@pytest.mark.parametrize("is_tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("ours", [ADOPT, ShardedADOPT])
def test_after_from_adamw_the_lines_of_the_page_give_the_learning_rates_of_adamw(
    ours: Any, name: str, is_tensor: bool
) -> None:
    expected = from_adamw_with_its_scheduler(name, is_tensor, None)
    assert from_adamw_with_its_scheduler(name, is_tensor, ours) == expected
    assert len(set(expected)) > 1, "the scheduler moved something"


@pytest.mark.parametrize(
    ("kind", "options"), [(lrs.StepLR, {"step_size": SAVED}), (lrs.MultiStepLR, {"milestones": [SAVED]})]
)
def test_last_epoch_moves_a_learning_rate_that_was_moved_already(kind: Any, options: dict[str, Any]) -> None:
    """torch's doing, whatever the optimizer: why docs/from-adamw.md gives it for `LambdaLR` only."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))], lr=0.1)
    scheduler = kind(optimizer, gamma=0.5, **options)
    for _ in range(SAVED):
        optimizer.step()
        scheduler.step()
    was = optimizer.param_groups[0]["lr"]
    for goes_on in (optimizer, ADOPT.from_adamw(optimizer)):
        goes_on.param_groups[0]["lr"] = was
        kind(goes_on, gamma=0.5, last_epoch=SAVED - 1, **options)
        assert goes_on.param_groups[0]["lr"] == was / 2


@pytest.mark.parametrize("is_tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_two_sharded_ranks_and_a_resumed_one_follow_one_process_to_the_bit(
    name: str, is_tensor: bool, tmp_path: Path
) -> None:
    """The scheduler's own state goes through `extra`, whatever it holds."""
    rates, params = one_process(name, is_tensor)
    assert len(set(rates)) > 1, "the scheduler moved something"
    for found_rates, found in run_ranks(2, sharded, name, is_tensor, tmp_path, 0):
        assert found_rates == rates
        assert_same(found, params)
    for found_rates, found in run_ranks(2, sharded, name, is_tensor, tmp_path, SAVED):
        assert found_rates == rates[SAVED:]
        assert_same(found, params)
