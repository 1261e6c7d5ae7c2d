"""ADOPT in real DeepSpeed engines on real ranks: the trajectory of one process, whatever ZeRO cuts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: make ecosystem")

import torch
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from deepspeed_cases import (
    LATE,
    OPTIONS,
    STEPS,
    Model,
    config,
    convert_to_universal,
    distance,
    load_and_train,
    make_engine,
    parameters,
    steps_of,
    take_steps,
    train,
    train_alone,
    train_and_save,
)
from ranks import RanksFailed, run_ranks

import sharded_adopt.interop.deepspeed
from sharded_adopt import ADOPT, ShardedADOPT
from sharded_adopt.interop.deepspeed import assert_runs_adopt
from sharded_adopt.interop.deepspeed_config import findings
from sharded_adopt.interop.deepspeed_form import CHECKED
from sharded_adopt.interop.deepspeed_host import Host

EVERY_STAGE: dict[str, dict[str, Any]] = {
    "stage 0": {"stage": 0},
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "stage 3": {"stage": 3},
    "stage 3 in sub groups": {"stage": 3, "zero": {"sub_group_size": 3000}},
    "stage 2, offloaded": {"stage": 2, "offload": True},
    "stage 3, offloaded": {"stage": 3, "offload": True},
}
every_stage = pytest.mark.parametrize("case", EVERY_STAGE.values(), ids=EVERY_STAGE.keys())
BF16 = {"bf16": {"enabled": True}}


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    return train_alone()


@every_stage
def test_every_stage_is_one_process_bit_for_bit(case: dict[str, Any], alone: dict[str, torch.Tensor]) -> None:
    assert distance(alone, dict(Model().named_parameters())) > 0.1, "nothing was trained"
    for trained in run_ranks(2, train, config(**case)):
        assert distance(trained, alone) == 0


@every_stage
def test_a_saved_run_goes_on_as_if_nothing_had_been(
    case: dict[str, Any], alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    run_ranks(2, train_and_save, config(**case), 6, tmp_path)
    for trained, steps in run_ranks(2, load_and_train, config(**case), 6, tmp_path, "halfway"):
        assert distance(trained, alone) == 0
        assert set(steps) == {STEPS}


@pytest.mark.parametrize("name", [name for name in EVERY_STAGE if name != "stage 0"])
def test_a_universal_checkpoint_goes_on_as_if_nothing_had_been(
    name: str, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Loading one, ZeRO-3 gives all its partitions one tensor for `step`, which each of them then advanced."""
    case = EVERY_STAGE[name]
    run_ranks(2, train_and_save, config(**case), 6, tmp_path)
    convert_to_universal(tmp_path)
    universal = config(**case, checkpoint={"load_universal": True})
    for trained, steps in run_ranks(2, load_and_train, universal, 6, tmp_path, "halfway_universal"):
        assert set(steps) == {STEPS}
        assert distance(trained, alone) == 0


def _train_groups(rank: int, world_size: int, stage: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    model = Model()
    groups = _decay_groups(model.parameters())
    engine = make_engine(rank, world_size, config(stage), model=model, model_parameters=groups)
    take_steps(engine, rank, range(STEPS))
    return parameters(engine), steps_of(engine)


def _decay_groups(params: Iterable[torch.nn.Parameter]) -> list[dict[str, Any]]:
    listed = list(params)
    wide, narrow = [p for p in listed if p.ndim > 1], [p for p in listed if p.ndim < 2]
    return [{"params": wide, "weight_decay": 0.5}, {"params": narrow}]


@pytest.mark.parametrize("stage", [1, 3])
def test_parameter_groups_keep_their_own_options(stage: int) -> None:
    expected = train_alone(make=lambda params, **options: ADOPT(_decay_groups(params), **options))
    for trained, steps in run_ranks(2, _train_groups, stage):
        assert distance(trained, expected) == 0
        assert steps == [STEPS, STEPS]


def _universal_with_groups(
    rank: int, world_size: int, ds_config: dict[str, Any], directory: Path, tag: str
) -> list[tuple[float, torch.dtype]]:
    """Save, or load where there is a `tag`; return each group's decay and what its exp_avg_sq is kept in."""
    model = Model()
    engine = make_engine(rank, world_size, ds_config, model=model, model_parameters=_decay_groups(model.parameters()))
    if tag:
        engine.load_checkpoint(str(directory), tag=tag)
    take_steps(engine, rank, [0])
    if not tag:
        engine.save_checkpoint(str(directory), tag="halfway")
    optimizer = engine.optimizer.optimizer
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    return list(zip(decays, [state["exp_avg_sq"].dtype for state in optimizer.state.values()], strict=True))


@pytest.mark.parametrize(("stage", "decays"), [(2, [0.5, 0.05]), (3, [0.5, 0.5])])
def test_what_a_universal_checkpoint_does_not_bring_back(tmp_path: Path, stage: int, decays: list[float]) -> None:
    """Nobody's wish, but DeepSpeed's doing and in our documentation: not to be found out later."""
    case = config(stage, params={"state_dtype": "bf16"})
    before = run_ranks(2, _universal_with_groups, case, tmp_path, "")[0]
    assert before == [(0.5, torch.bfloat16), (0.05, torch.bfloat16)]
    convert_to_universal(tmp_path)
    universal = case | {"checkpoint": {"load_universal": True}}
    after = run_ranks(2, _universal_with_groups, universal, tmp_path, "halfway_universal")[0]
    assert after == [(decay, torch.float32) for decay in decays]


def _train_on_half_the_rows(
    rank: int, world_size: int, ds_config: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], list[float]]:
    engine = make_engine(rank, world_size, ds_config)
    take_steps(engine, rank, range(STEPS), highest=20)
    return parameters(engine), steps_of(engine)


def test_a_partition_without_any_gradient_at_first_counts_its_steps() -> None:
    """Its own gradients being zero is no dummy step: the other ranks' are not.

    Here rank 1's part of the embedding is not in the first batches. Taken for a dummy step, its `step` lagged behind
    the other rank's, which DeepSpeed's converter refuses, and its trajectory was not that of one process.
    """
    expected = train_alone(highest=20)
    case = config(3, zero={"sub_group_size": 1000})  # the embedding is one of its own
    for trained, steps in run_ranks(2, _train_on_half_the_rows, case):
        assert set(steps) == {STEPS}
        assert distance(trained, expected) == 0


def _train_and_count(rank: int, world_size: int, ds_config: dict[str, Any], steps: int) -> tuple[Any, list[float]]:
    engine = make_engine(rank, world_size, ds_config)
    assert_runs_adopt(engine)
    take_steps(engine, rank, range(steps))
    return parameters(engine), steps_of(engine)


def test_bf16_without_zero_ends_as_near_to_fp32_as_with_it() -> None:
    """Its constructor fakes a step on zero gradients; counted, it leaves v = 0 and steps several times too long."""
    expected = train_alone(steps=30)
    distances = []
    for stage in (1, 0):
        trained, steps = run_ranks(2, _train_and_count, config(stage, **BF16), 30)[0]
        assert set(steps) == {30}
        distances.append(distance(trained, expected))
    with_zero, without = distances
    assert 0 < without <= 1.1 * with_zero < 0.1


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_late_parameter_is_moved_at_once_as_the_zeros_that_deepspeed_fills_in_say(stage: int) -> None:
    """Before its first gradient the parameter got zeros: v = 0, and `step` was counted."""
    filled = train_alone(late=LATE, zero_fill=True)
    for trained in run_ranks(2, train, config(stage), STEPS, LATE):
        assert distance(trained, filled) == 0
    assert distance(filled, train_alone(late=LATE)) > 0.01, "then there would be nothing to warn of"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_with_element_init_a_late_parameter_starts_as_in_one_process_but_for_its_clip_bound(stage: int) -> None:
    """The bound counts the steps of the flat group, not those since the parameter came: without a clip none differs."""
    options = {"init": "element", "clip_lambda": None}
    expected = train_alone(late=LATE, **options)
    trained = run_ranks(2, train, config(stage, params=options), STEPS, LATE)[0]
    assert distance(trained, expected) == 0
    clipped = run_ranks(2, train, config(stage, params={"init": "element"}), STEPS, LATE)[0]
    assert distance(clipped, train_alone(late=LATE, zero_fill=True, init="element")) == 0
    assert distance(clipped, train_alone(late=LATE, init="element")) > 0


def _first_late_step(rank: int, world_size: int, stage: int) -> tuple[bool, bool]:
    engine = make_engine(rank, world_size, config(stage, params={"init": "element"}))
    take_steps(engine, rank, range(LATE), LATE)
    before = parameters(engine)["late.weight"]
    take_steps(engine, rank, [LATE], LATE)
    first = parameters(engine)["late.weight"]
    take_steps(engine, rank, [LATE + 1], LATE)
    return torch.equal(before, first), torch.equal(first, parameters(engine)["late.weight"])


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_with_element_init_the_first_gradient_moves_nothing(stage: int) -> None:
    assert run_ranks(2, _first_late_step, stage) == [(True, False)] * 2


def _initialize(rank: int, world_size: int, ds_config: dict[str, Any]) -> None:
    make_engine(rank, world_size, ds_config)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"beta": [0.9, 0.99]}, r"beta: ADOPT has no such option; did you mean 'betas'\?"),
        ({"clip_lambda": "step**0.25"}, r"got the string 'step\*\*0.25'; a config is data and is never evaluated"),
        ({"lr": "auto"}, r'lr: it is still "auto"'),
        ({"betas": [0.9, 1.0]}, r"betas\[1\] must be a number of at least 0 and below 1, got 1.0"),
    ],
)
def test_what_cannot_be_meant_is_refused_on_every_rank_before_training(params: dict[str, Any], message: str) -> None:
    with pytest.raises(RanksFailed, match=message) as failed:
        run_ranks(2, _initialize, config(2, params=params))
    for rank in (0, 1):
        assert f"--- rank {rank} of 2 ---" in str(failed.value)
    assert str(failed.value).count("ValueError: the options of ADOPT in the config cannot be used") == 2


def _inner_options(rank: int, world_size: int, ds_config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    optimizer = make_engine(rank, world_size, ds_config).optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return type(optimizer).__name__, {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}


def test_every_option_reaches_the_optimizer() -> None:
    params = {
        "lr": 0.5,
        "betas": [0.8, 0.7],
        "eps": 1e-5,
        "clip_lambda": {"exponent": 0.5, "scale": 2.0},
        "weight_decay": 0.25,
        "decouple": True,
        "foreach": None,
        "maximize": True,
        "capturable": False,
        "differentiable": False,
        "fused": False,
        "nesterov": True,
        "state_dtype": ["float32", "bf16"],
        "init": "element",
    }
    (kind, options), _ = run_ranks(2, _inner_options, config(1) | {"optimizer": {"type": "ADOPT", "params": params}})
    assert kind == "ADOPT"
    expected = ADOPT([torch.zeros(1)], lr=0.5).defaults | {
        **{name: value for name, value in params.items() if name not in ("betas", "clip_lambda", "state_dtype")},
        "betas": (0.8, 0.7),
        "clip_lambda": sharded_adopt.PowerClip(0.5, 2.0),
        "state_dtype": (torch.float32, torch.bfloat16),
    }
    assert {name: options[name] for name in expected} == expected


def test_adoptw_comes_with_its_own_defaults() -> None:
    (kind, options), _ = run_ranks(2, _inner_options, config(1) | {"optimizer": {"type": "ADOPTW"}})
    assert kind == "ADOPTW"
    assert (options["decouple"], options["weight_decay"]) == (True, 0.01)


def _client(rank: int, world_size: int, case: dict[str, Any], is_callable: bool) -> dict[str, torch.Tensor]:
    model = Model()
    optimizer: Any = lambda params: ADOPT(params, **OPTIONS)  # noqa: E731 - the user's callable
    if not is_callable:
        optimizer = ADOPT(model.parameters(), **OPTIONS)
    ds_config = config(**case) | {"zero_force_ds_cpu_optimizer": False}
    del ds_config["optimizer"]
    engine = make_engine(rank, world_size, ds_config, model=model, optimizer=optimizer)
    assert_runs_adopt(engine)
    take_steps(engine, rank, range(STEPS))
    return parameters(engine)


@pytest.mark.parametrize("case", [{"stage": 2}, {"stage": 3, "offload": True}], ids=["stage 2", "stage 3, offloaded"])
@pytest.mark.parametrize("is_callable", [True, False])
def test_an_optimizer_that_the_user_made_needs_no_allowance(
    case: dict[str, Any], is_callable: bool, alone: dict[str, torch.Tensor]
) -> None:
    for trained in run_ranks(2, _client, case, is_callable):
        assert distance(trained, alone) == 0


def _train_with_schedule(rank: int, world_size: int, ds_config: dict[str, Any]) -> list[float]:
    engine = make_engine(rank, world_size, ds_config)
    rates = []
    for step in range(4):
        take_steps(engine, rank, [step])
        rates.append(engine.optimizer.param_groups[0]["lr"])
    return rates


def test_a_schedule_of_the_config_moves_the_learning_rate() -> None:
    warmup = {"warmup_min_lr": 0.0, "warmup_max_lr": 0.1, "warmup_num_steps": 2, "warmup_type": "linear"}
    rates = run_ranks(2, _train_with_schedule, config(2, scheduler={"type": "WarmupLR", "params": warmup}))[0]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.1])


def _assert_runs_adopt(rank: int, world_size: int, ds_config: dict[str, Any]) -> str | None:
    try:
        assert_runs_adopt(make_engine(rank, world_size, ds_config))
    except AssertionError as error:
        return str(error)
    return None


WRAPPERS = [*EVERY_STAGE.values(), {"stage": 0, **BF16}, {"stage": 1, **BF16}, {"stage": 3, **BF16}]


@pytest.mark.parametrize("case", WRAPPERS, ids=[*EVERY_STAGE, "bf16, stage 0", "bf16, stage 1", "bf16, stage 3"])
def test_adopt_is_found_in_every_wrapper_and_what_replaced_it_is_named(case: dict[str, Any]) -> None:
    assert run_ranks(2, _assert_runs_adopt, config(**case)) == [None, None]
    other = config(**case) | {"optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}}}
    for message in run_ranks(2, _assert_runs_adopt, other):
        assert message is not None
        assert "expected this engine to train with ADOPT, but AdamW runs: DeepSpeedEngine > " in message


def _sharded_client(rank: int, world_size: int, is_callable: bool) -> list[str]:
    """What `initialize` says, and what `assert_runs_adopt` says of an engine made before our module was imported."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    ds_config = config(0)
    del ds_config["optimizer"]
    said = []
    ours = DeepSpeedEngine._do_optimizer_sanity_check
    for look in (ours, ours.__wrapped__):
        model = Model()
        made: Any = ShardedADOPT if is_callable else ShardedADOPT(model.parameters())
        DeepSpeedEngine._do_optimizer_sanity_check = look
        try:
            assert_runs_adopt(make_engine(rank, world_size, ds_config, model=model, optimizer=made))
        except (ValueError, AssertionError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


@pytest.mark.parametrize("is_callable", [True, False])
def test_a_sharded_optimizer_that_averages_beside_deepspeed_is_refused_on_every_rank(is_callable: bool) -> None:
    why = "ShardedADOPT, which averages the gradients over the ranks, and so does DeepSpeed: give it ADOPT"
    for said in run_ranks(2, _sharded_client, is_callable):
        assert len(said) == 2
        assert said[0].startswith(f"ValueError: DeepSpeed got {why}")
        assert said[1].startswith(f"AssertionError: this engine trains with DeepSpeedEngine > {why}")


def test_an_optimizer_without_an_engine_is_named_as_what_runs() -> None:
    with pytest.raises(AssertionError, match="but SGD runs: SGD"):
        assert_runs_adopt(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1))


def _without_optimizer(rank: int, world_size: int) -> str | None:
    ds_config = config(0)
    del ds_config["optimizer"]
    return _assert_runs_adopt(rank, world_size, ds_config)


def test_an_engine_without_an_optimizer_is_no_engine_with_adopt() -> None:
    for message in run_ranks(2, _without_optimizer):
        assert message is not None
        assert "no optimizer is there" in message


@pytest.mark.parametrize("first", ["deepspeed", "sharded_adopt.interop.deepspeed"])
def test_the_order_of_imports_does_not_count(first: str) -> None:
    script = f"""
import {first}
import deepspeed, torch, sharded_adopt.interop.deepspeed as ours
from deepspeed.runtime import engine
before = torch.optim.ADOPT, engine.is_zero_supported_optimizer
ours.register()
assert engine.is_zero_supported_optimizer is before[1], "registered twice"
made = torch.optim.ADOPT([torch.zeros(2, requires_grad=True)], lr=0.5)
print(type(made).__module__, type(torch.optim.ADOPTW([torch.zeros(2, requires_grad=True)])).__name__)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "sharded_adopt.adopt ADOPTW"


def test_another_adopt_in_torch_is_not_replaced_in_silence() -> None:
    script = """
import torch
class ADOPT(torch.optim.SGD): pass
torch.optim.ADOPT = ADOPT
import deepspeed, sharded_adopt.interop.deepspeed
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode != 0
    assert "RuntimeError: torch.optim.ADOPT is <class '__main__.ADOPT'> already" in ran.stderr


OFFLOADED = {"device": "cpu", "pin_memory": False}
STOPS: dict[str, dict[str, Any]] = {
    "type": config(2) | {"optimizer": {"type": "adopt"}},
    "option": config(2, params={"max_grad_norm": 1.0}),
    "auto": config(2, train_batch_size="auto"),
    "adam-only, ratio": config(3, zero={"offload_optimizer": {**OFFLOADED, "ratio": 0.5}}),
    "adam-only, zenflow": config(2, zero={"offload_optimizer": OFFLOADED, "zenflow": {"topk_ratio": 0.1}}),
    "adam-only, 16 bit": config(2, bf16={"enabled": True, "bf16_master_weights_and_grads": True}),
    "key": config(2) | {"zero_optimization": {"stgae": 2}},
    "removed": config(2, amp={}),
    "shape, params": config(2) | {"optimizer": {"type": "ADOPT", "params": ["lr", 0.001]}},
    "shape, fp16": config(2, fp16=None),
    "value, clipping null": config(2, gradient_clipping=None),
    "value, stage": config(2) | {"zero_optimization": {"stage": 5}},
    "value, both": config(2, fp16={"enabled": True}, bf16={"enabled": True}),
    "value, batch": {k: v for k, v in config(2).items() if "batch" not in k},
    "scheduler": config(2, scheduler={"type": "WarmupLr", "params": {}}),
    "scheduler, params": config(2, scheduler={"type": "WarmupLR"}),
    "offloaded-client, old key": {"zero_optimization": {"stage": 2, "cpu_offload": True}}
    | {k: v for k, v in config(2).items() if k not in ("optimizer", "zero_optimization")},
    "offloaded-client": {k: v for k, v in config(2, offload=True).items() if k != "optimizer"},
}


def _step_with_client(rank: int, world_size: int, ds_config: dict[str, Any]) -> None:
    model = Model()
    client = {} if "optimizer" in ds_config else {"optimizer": ADOPT(model.parameters())}
    engine = make_engine(rank, world_size, ds_config, model=model, **client)
    take_steps(engine, rank, [0])


@pytest.mark.parametrize("name", STOPS)
def test_what_the_doctor_calls_an_error_stops_in_deepspeed(name: str) -> None:
    found = findings(STOPS[name], Host())
    assert {(f.severity, f.trap) for f in found if f.severity == "error"} == {("error", name.partition(",")[0])}
    with pytest.raises(RanksFailed):
        run_ranks(2, _step_with_client, STOPS[name])


def test_the_keys_that_the_doctor_knows_are_those_of_deepspeed() -> None:
    models = {
        ("zero_optimization",): DeepSpeedZeroConfig,
        ("zero_optimization", "offload_optimizer"): DeepSpeedZeroOffloadOptimizerConfig,
        ("zero_optimization", "offload_param"): DeepSpeedZeroOffloadParamConfig,
        ("fp16",): DeepSpeedFP16Config,
        ("bf16",): DeepSpeedBF16Config,
    }
    for path, model in models.items():
        fields = {name for key, field in model.model_fields.items() for name in (key, field.alias) if name}
        assert set(CHECKED[path]) == fields, path
    assert set(CHECKED) == set(models)


def test_an_elastic_checkpoint_cannot_be_loaded_as_the_doctor_says(tmp_path: Path) -> None:
    case = config(2, zero={"elastic_checkpoint": True})
    assert [f.trap for f in findings(case, Host())] == ["elastic-checkpoint"]
    run_ranks(2, train_and_save, case, 1, tmp_path)
    with pytest.raises(RanksFailed, match="BASE_OPTIMIZER_STATE_STEP"):
        run_ranks(2, load_and_train, case, 1, tmp_path, "halfway")


def test_the_hidden_clipping_that_the_doctor_warns_of_changes_the_trajectory(alone: dict[str, torch.Tensor]) -> None:
    case = config(2)
    del case["gradient_clipping"]
    assert [f.trap for f in findings(case, Host())] == ["hidden-clipping"]
    assert distance(run_ranks(2, train, case)[0], alone) > 1e-4
