"""`assert_runs_adopt` on what holds an engine in transformers and accelerate, and the swaps that it is there for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hosting import as_torchrun_rank
from ranks import run_ranks
from torch import Tensor, nn

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: make ecosystem")
pytest.importorskip("transformers", reason="transformers is not installed: make ecosystem")
pytest.importorskip("accelerate", reason="accelerate is not installed: make ecosystem")

from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import HfTrainerDeepSpeedConfig

from sharded_adopt import ADOPT
from sharded_adopt.interop.deepspeed import assert_runs_adopt
from sharded_adopt.interop.deepspeed_config import findings
from sharded_adopt.interop.deepspeed_host import Host
from sharded_adopt.interop.deepspeed_optimizer import TRAINERS

AUTO = {"train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto", "gradient_clipping": "auto"}
OFFLOADED = {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}}
IN_CONFIG = {"optimizer": {"type": "ADOPT", "params": {"lr": "auto"}}}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.linear(x).square().mean()}


def said_of(*holders: Any) -> list[str | None]:
    """What `assert_runs_adopt` says of each, None for nothing."""
    said: list[str | None] = []
    for holder in holders:
        try:
            assert_runs_adopt(holder)
            said.append(None)
        except AssertionError as error:
            said.append(str(error))
    return said


class Ask(TrainerCallback):
    trainer: Any = None
    said: Any = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        trainer = self.trainer
        engine = trainer.model_wrapped
        self.said = said_of(engine, trainer, trainer.accelerator, trainer.accelerator.deepspeed_engine_wrapped)


def in_trainer(rank: int, world_size: int, directory: Path, ds_config: dict[str, Any], door: str) -> list[str | None]:
    as_torchrun_rank(rank, world_size)
    not_compiled()
    model, ask = Net(), Ask()
    args = TrainingArguments(
        str(directory),
        max_steps=1,
        deepspeed=ds_config,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    entry: dict[str, Any] = {
        "config": {},
        "instance": {"optimizers": (ADOPT(model.parameters()), None)},
        "class": {"optimizer_cls_and_kwargs": (ADOPT, {"lr": 0.01})},
    }[door]
    data = [{"x": torch.randn(4)} for _ in range(32)]
    ask.trainer = Trainer(model, args, train_dataset=data, callbacks=[ask], **entry)
    ask.trainer.train()
    return ask.said


def not_compiled() -> None:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@pytest.mark.parametrize(
    ("ds_config", "door"),
    [
        ({**AUTO, **IN_CONFIG, "zero_optimization": {"stage": 2}}, "config"),
        ({**AUTO, **IN_CONFIG, "zero_optimization": OFFLOADED}, "config"),
        ({**AUTO, "zero_optimization": {"stage": 2}}, "class"),
        ({**AUTO, "zero_optimization": OFFLOADED, "zero_force_ds_cpu_optimizer": False}, "class"),
    ],
    ids=["config", "config, offloaded", "class", "class, offloaded and told to stay"],
)
def test_adopt_is_found_in_what_transformers_and_accelerate_hold(
    tmp_path: Path, ds_config: dict[str, Any], door: str
) -> None:
    assert "error" not in {f.severity for f in findings(ds_config, Host(), hf=True)}
    assert run_ranks(2, in_trainer, tmp_path, ds_config, door) == [[None] * 4] * 2


def test_the_adamw_that_trainer_takes_instead_is_named_on_every_rank(tmp_path: Path) -> None:
    ds_config = {**AUTO, "zero_optimization": {"stage": 2}}
    assert [f.trap for f in findings(ds_config, Host(), hf=True)] == ["client-dropped"]
    for said in run_ranks(2, in_trainer, tmp_path, ds_config, "instance"):
        assert len(said) == 4
        for message in said:
            assert message is not None
            assert "but AdamW runs: DeepSpeedEngine > DeepSpeedZeroOptimizer > AdamW" in message


def as_trainer_reads(ds_config: dict[str, Any], directory: Path, **arguments: Any) -> dict[str, Any]:
    """The config that Trainer hands on, or its `ValueError`."""
    args = TrainingArguments(str(directory), use_cpu=True, report_to=[], **arguments)
    read = HfTrainerDeepSpeedConfig(ds_config)
    read.trainer_config_process(args)
    read.trainer_config_finalize(args, Net(), 10)
    return read.config


def test_the_doctor_knows_the_defaults_that_trainer_compares_with(tmp_path: Path) -> None:
    ds_config = {
        "gradient_clipping": "auto",
        "optimizer": {"params": dict.fromkeys(["lr", "weight_decay", "betas", "eps"], "auto")},
    }
    read = as_trainer_reads(ds_config, tmp_path)
    values = {"gradient_clipping": read["gradient_clipping"], **read["optimizer"]["params"]}
    assert values == {name: default for name, (_, default) in TRAINERS.items()}


OTHERS = {"lr": 1e-3, "weight_decay": 0.1, "betas": [0.9, 0.9999], "eps": 1e-6, "gradient_clipping": 0.0}


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_doctor_says_that_trainer_refuses_is_refused_and_its_advice_is_taken(
    tmp_path: Path, name: str
) -> None:
    value = OTHERS[name]
    ds_config: dict[str, Any] = {
        "gradient_clipping": "auto",
        "optimizer": {"type": "ADOPT", "params": {"lr": "auto", "weight_decay": "auto", "decouple": True}},
    }
    held = ds_config if name == "gradient_clipping" else ds_config["optimizer"]["params"]
    held[name] = value
    [finding] = findings(ds_config, Host(), hf=True)
    assert (finding.severity, finding.trap, finding.where.split(".")[-1]) == ("warning", "trainer-refuses", name)
    with pytest.raises(ValueError, match="Please correct the following DeepSpeed config values"):
        as_trainer_reads(ds_config, tmp_path)
    # as the line to change says: "auto" with the arguments, or left out
    arguments = TRAINERS[name][0]
    held[name] = "auto"
    each = value if isinstance(value, list) else [value]
    read = as_trainer_reads(ds_config, tmp_path, **dict(zip(arguments, each, strict=True)))
    assert (read if name == "gradient_clipping" else read["optimizer"]["params"])[name] == value
    if name in ("betas", "eps"):
        assert f'take "{name}" out' in finding.change
        del held[name]
        assert name not in as_trainer_reads(ds_config, tmp_path)["optimizer"]["params"]


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_what_is_left_out_trainer_passes_over_as_the_doctor_says(tmp_path: Path, name: str) -> None:
    params = {"lr": "auto", "weight_decay": "auto", "decouple": True}
    del params[name]
    ds_config = {"gradient_clipping": "auto", "optimizer": {"type": "ADOPT", "params": params}}
    assert [(f.trap, f.where) for f in findings(ds_config, Host(), hf=True)] == [
        ("trainer-passed-over", f"optimizer.params.{name}")
    ]
    read = as_trainer_reads(ds_config, tmp_path, **{TRAINERS[name][0][0]: 0.25})
    assert name not in read["optimizer"]["params"]


def in_accelerate(rank: int, world_size: int, ds_config: dict[str, Any]) -> list[str | None]:
    as_torchrun_rank(rank, world_size)
    not_compiled()
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ds_config))
    model = Net()
    engine, optimizer = accelerator.prepare(model, ADOPT(model.parameters()))
    accelerator.backward(engine(torch.randn(3, 4))["loss"])
    optimizer.step()
    return said_of(engine, accelerator)


def test_an_optimizer_given_to_accelerate_is_found() -> None:
    ds_config = {"train_micro_batch_size_per_gpu": 3, "gradient_clipping": 0.0, "zero_optimization": {"stage": 2}}
    assert run_ranks(2, in_accelerate, ds_config) == [[None, None]] * 2
