"""ADOPT in torchtitan's containers: groups by pattern, flat state by name, schedules, DCP at other world sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from test_fsdp2_checkpoint import assert_all_close, everything, make_model, shard, train, whole
from torch import Tensor

pytest.importorskip("torchtitan", reason="torchtitan is not installed: make ecosystem")

from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig

from sharded_adopt import ADOPT, ADOPTW
from sharded_adopt.interop.torchtitan import AdoptOptimizersContainer, default_adopt

STEPS, SAVED = 8, 4
SCHEDULE = LRSchedulersContainer.Config(warmup_steps=2, decay_type="cosine")


def config(**options: Any) -> AdoptOptimizersContainer.Config:
    """No decay of the biases, as users write it."""
    return AdoptOptimizersContainer.Config(
        param_groups=[
            ParamGroupConfig(pattern=r"bias$", optimizer_name="ADOPT", optimizer_kwargs={"lr": 0.1}),
            ParamGroupConfig(
                pattern=r".*",
                optimizer_name="ADOPT",
                optimizer_kwargs={"lr": 0.05, "betas": (0.9, 0.99), "weight_decay": 0.1, "decouple": True},
            ),
        ],
        **{"implementation": "foreach", **options},
    )


class Both:
    """Steps of the optimizers and of their schedule, as `train` of one optimizer."""

    def __init__(self, optimizers: Any, schedule: Any) -> None:
        self.optimizers, self.schedule = optimizers, schedule
        self.zero_grad = optimizers.zero_grad

    def step(self) -> None:
        self.optimizers.step()
        self.schedule.step()


def one_process(steps: int) -> list[Tensor]:
    """The same groups and rates in torch's own words."""
    model = make_model()
    named = dict(model.named_parameters())
    optimizer = ADOPT(
        [
            {"params": [p for n, p in named.items() if n.endswith("bias")], "lr": 0.1},
            {
                "params": [p for n, p in named.items() if not n.endswith("bias")],
                "lr": 0.05,
                "betas": (0.9, 0.99),
                "weight_decay": 0.1,
                "decouple": True,
            },
        ],
        foreach=True,  # as torchtitan asks for; the fused kernel's square root may differ from torch's by its last bit
    )
    factor = LRSchedulersContainer([optimizer], schedule_of_titan()).schedulers[0]
    train(model, Both(optimizer, factor), range(steps))
    return everything(model, optimizer)


def schedule_of_titan() -> Any:
    """The lambda that torchtitan makes of `SCHEDULE`."""
    model = make_model()
    built = SCHEDULE.build(optimizers=config().build(model_parts=[model]), training_steps=STEPS)
    return built.schedulers[0].lr_lambdas[0]


def build(mesh: tuple[int, ...]) -> tuple[Any, Any, Any]:
    model = shard(make_model(), mesh)
    optimizers = config().build(model_parts=[model])
    return model, optimizers, SCHEDULE.build(optimizers=optimizers, training_steps=STEPS)


def trained(rank: int, world_size: int, root: Path) -> list[Tensor]:
    model, optimizers, schedule = build((world_size,))
    assert type(optimizers) is AdoptOptimizersContainer
    train(model, Both(optimizers, schedule), range(SAVED))
    dcp.save({"model": model.state_dict(), "optimizer": optimizers, "lr": schedule}, checkpoint_id=root)
    train(model, Both(optimizers, schedule), range(SAVED, STEPS))
    return everything(model, next(iter(optimizers)))


def resumed(rank: int, world_size: int, root: Path) -> tuple[dict[str, Any], list[Tensor]]:
    """What a fresh container says of itself, and what it trains to from the checkpoint."""
    model, optimizers, schedule = build((world_size,))
    fresh = {key: whole(value) for key, value in optimizers.state_dict().items() if key.startswith("state.")}
    weights = model.state_dict()
    dcp.load({"model": weights, "optimizer": optimizers, "lr": schedule}, checkpoint_id=root)
    model.load_state_dict(weights)
    train(model, Both(optimizers, schedule), range(SAVED, STEPS))
    return fresh, everything(model, next(iter(optimizers)))


def test_containers_of_two_ranks_and_of_one_that_goes_on_equal_one_process_to_the_bit(tmp_path: Path) -> None:
    for found in run_ranks(2, trained, tmp_path):
        assert_all_close(found, one_process(STEPS))
    for world_size in (1, 2):
        for _, found in run_ranks(world_size, resumed, tmp_path):
            assert_all_close(found, one_process(STEPS))


def test_state_that_torchtitan_makes_by_a_fake_step_stays_at_step_0(tmp_path: Path) -> None:
    run_ranks(2, trained, tmp_path)
    for fresh, _ in run_ranks(2, resumed, tmp_path):
        names = {name for name, _ in make_model().named_parameters()}
        assert set(fresh) == {f"state.{n}.{key}" for n in names for key in ("step", "exp_avg", "exp_avg_sq")}
        assert all(not value.any() for value in fresh.values())


def test_the_flat_state_dict_is_keyed_by_name_and_holds_plain_groups() -> None:
    optimizers = config().build(model_parts=[make_model()])
    state = optimizers.state_dict()
    assert state["param_groups.0.bias.clip_lambda"] == {"exponent": 0.25, "scale": 1.0}
    assert state["param_groups.0.weight.weight_decay"] == 0.1
    assert state["param_groups.0.bias.weight_decay"] == 0.0


def test_adopt_stands_beside_torchtitans_own_optimizers() -> None:
    both = AdoptOptimizersContainer.Config(
        param_groups=[
            ParamGroupConfig(pattern=r"bias$", optimizer_name="AdamW", optimizer_kwargs={"lr": 0.1}),
            ParamGroupConfig(pattern=r".*", optimizer_name="ADOPTW", optimizer_kwargs={"lr": 0.1}),
        ],
        implementation="for-loop",
    )
    assert [type(o) for o in both.build(model_parts=[make_model()])] == [torch.optim.AdamW, ADOPTW]
    (optimizer,) = default_adopt(eps=1e-5).build(model_parts=[make_model()])
    assert type(optimizer) is ADOPTW
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["eps"], group["fused"]) == (1e-3, 0.1, 1e-5, None)


def test_what_torchtitan_alone_says_of_adopt_and_what_would_do_nothing_are_refused() -> None:
    alone = OptimizersContainer.Config(param_groups=config().param_groups)
    with pytest.raises(NotImplementedError, match="ADOPT not added"):
        alone.build(model_parts=[make_model()])
    with pytest.raises(ValueError, match=r"leaves the state of ADOPT as it is: use .*state_dtype"):
        config(implementation="fused_opt_states_bf16").build(model_parts=[make_model()])
