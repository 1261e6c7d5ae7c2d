"""ADOPT in transformers' Trainer: alone, sharded under torchrun, saved and resumed, and what is not ADOPT is caught."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hosting import as_torchrun_rank
from job import Job
from ranks import RanksFailed, run_ranks
from safetensors.torch import load_file
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers is not installed: make ecosystem")
pytest.importorskip("accelerate", reason="accelerate is not installed: make ecosystem")

from transformers import Trainer, TrainingArguments

from sharded_adopt import ADOPT, ShardedADOPT
from sharded_adopt.interop.transformers import AdoptCallback, adopt_for

EXAMPLE = Path(__file__).parents[2] / "examples" / "trainer_pretrain.py"


# --- the example, as users run it -------------------------------------------------------------------------------------


def pretrain(ranks: int, output: Path, *arguments: str) -> str:
    """Run the example under torchrun; returns what it printed."""
    output.mkdir(parents=True, exist_ok=True)
    steps = ("--output", str(output), "--steps", "8", "--save-steps", "4", "--batch", "8", "--accumulate", "2")
    with (output / "printed").open("w") as file, Job(ranks, EXAMPLE, (*steps, *arguments), output=file) as job:
        code = job.wait(200)
    printed = (output / "printed").read_text()
    assert code == 0, printed
    return printed


def interrupted(source: Path, output: Path) -> Path:
    """A run of which only the checkpoint of step 4 is left."""
    output.mkdir()
    shutil.copytree(source / "checkpoint-4", output / "checkpoint-4")
    return output


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trainer") / "sharded"
    assert "ShardedADOPT, 2 processes" in pretrain(2, output)
    return output


def weights(output: Path) -> dict[str, Tensor]:
    return load_file(output / "final" / "model.safetensors")


def optimizer_state(output: Path, step: int) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(output / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)
    return loaded


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **(tolerance or {"rtol": 0, "atol": 0}))


def test_sharded_trainer_equals_unsharded_to_the_bit_and_saves_the_same(sharded: Path, tmp_path: Path) -> None:
    """DDP, torch's clipping, accumulation and dropout included; `optimizer.pt` holds the state of both ranks."""
    assert "\nADOPT, 2 processes" in pretrain(2, tmp_path / "plain", "--unsharded")
    assert_equal(weights(sharded), weights(tmp_path / "plain"))
    ours, theirs = optimizer_state(sharded, 8), optimizer_state(tmp_path / "plain", 8)
    assert ours["state"].keys() == theirs["state"].keys()
    for index, state in theirs["state"].items():
        assert_equal(ours["state"][index], state)
    assert [group["lr"] for group in ours["param_groups"]] == [group["lr"] for group in theirs["param_groups"]]
    assert [group["weight_decay"] for group in ours["param_groups"]] == [0.1, 0.0]


def test_resumed_trainer_equals_the_uninterrupted_one_to_the_bit(sharded: Path, tmp_path: Path) -> None:
    resumed = interrupted(sharded, tmp_path / "resumed")
    assert pretrain(2, resumed, "--resume").count("{'loss'") == 4, "steps 5 to 8 only"
    assert_equal(weights(resumed), weights(sharded))
    for index, state in optimizer_state(sharded, 8)["state"].items():
        assert_equal(optimizer_state(resumed, 8)["state"][index], state)


def test_a_checkpoint_of_two_processes_goes_on_in_one(sharded: Path, tmp_path: Path) -> None:
    """Named tolerance: one process draws other dropout masks and cuts the batches otherwise; weights stay near."""
    resumed = interrupted(sharded, tmp_path / "alone")
    assert "\nADOPT, 1 processes" in pretrain(1, resumed, "--resume")
    ours, theirs = optimizer_state(resumed, 8)["state"], optimizer_state(sharded, 8)["state"]
    assert [float(state["step"]) for state in ours.values()] == [8.0] * len(theirs)
    assert_equal(weights(resumed), weights(sharded), rtol=0, atol=5e-3)


# --- inside one process -----------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A model as Trainer wants it: it returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.layers(x) - y).square().mean()}


def data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(4, generator=generator), "y": torch.randn(1, generator=generator)} for _ in range(32)]


def training_arguments(directory: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(directory),
        **{
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "lr_scheduler_type": "linear",
            "max_grad_norm": 0.5,
            "learning_rate": 0.05,
            "save_strategy": "no",
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "label_names": ["y"],
            "remove_unused_columns": False,
            **options,
        },
    )


def plain_loop(loader: Any) -> list[Tensor]:
    """What Trainer should do, written out."""
    model = Net()
    optimizer = ADOPT(model.parameters(), lr=0.05, betas=(0.9, 0.99))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (6 - step) / 6)
    for _, batch in zip(range(6), loader, strict=False):
        model(**batch)["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("door", ["optimizers", "optimizer_cls_and_kwargs", "adopt_for"])
def test_every_door_of_trainer_trains_as_a_plain_loop_to_the_bit(door: str, tmp_path: Path) -> None:
    model = Net()
    args = training_arguments(tmp_path, optim_args="beta2=0.99")
    entry: dict[str, Any] = {
        "optimizers": {"optimizers": (ADOPT(model.parameters(), lr=0.05, betas=(0.9, 0.99)), None)},
        "optimizer_cls_and_kwargs": {"optimizer_cls_and_kwargs": (ADOPT, {"lr": 0.05, "betas": (0.9, 0.99)})},
        "adopt_for": {"optimizer_cls_and_kwargs": adopt_for(args)},
    }[door]
    trainer = Trainer(model, args, train_dataset=data(), callbacks=[AdoptCallback()], **entry)
    trainer.train()
    torch.manual_seed(args.seed)  # the sampler's seed
    expected = plain_loop(Trainer(Net(), args, train_dataset=data()).get_train_dataloader())
    for ours, theirs in zip(model.parameters(), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_trainer_arguments_become_adopts(tmp_path: Path) -> None:
    args = training_arguments(tmp_path, optim_args="beta1=0.95, clip_exponent=none, decouple=true, eps=1e-5")
    assert adopt_for(args, nesterov=True) == (
        ADOPT,
        {
            "lr": 0.05,
            "betas": (0.95, 0.9999),
            "clip_lambda": None,
            "decouple": True,
            "eps": 1e-5,
            "nesterov": True,
        },
    )


def test_an_argument_of_adam_that_would_be_passed_over_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adam_beta2=0\.95 is not ADOPT's: write optim_args='beta2=\.\.\.'"):
        adopt_for(training_arguments(tmp_path, adam_beta2=0.95))


def test_weight_decay_is_trainers_and_refused_where_trainer_would_not_use_it(tmp_path: Path) -> None:
    for optim_args, arguments in ((None, {"weight_decay": 0.3}), ("weight_decay=0.3,decouple=true", {})):
        with pytest.raises(ValueError, match=r"write TrainingArguments\(weight_decay=0\.3\) instead"):
            adopt_for(training_arguments(tmp_path, optim_args=optim_args), **arguments)
    args = training_arguments(tmp_path, optim_args="decouple=true", weight_decay=0.3)
    trainer = Trainer(Net(), args, train_dataset=data(), optimizer_cls_and_kwargs=adopt_for(args))
    trainer.train()
    assert [group["weight_decay"] for group in trainer.optimizer.optimizer.param_groups] == [0.3, 0.0]
    # and this is what adopt_for refuses: the value in the keywords counts for nothing
    entry = (ADOPT, {"lr": 0.05, "weight_decay": 0.3})
    plain = Trainer(Net(), training_arguments(tmp_path), train_dataset=data(), optimizer_cls_and_kwargs=entry)
    plain.train()
    assert [group["weight_decay"] for group in plain.optimizer.optimizer.param_groups] == [0.0, 0.0]


def test_the_callback_refuses_a_trainer_that_runs_another_optimizer(tmp_path: Path) -> None:
    """A `Trainer` whose ADOPT was forgotten, or dropped on the way, trains with AdamW without a word."""
    trainer = Trainer(Net(), training_arguments(tmp_path), train_dataset=data(), callbacks=[AdoptCallback()])
    with pytest.raises(RuntimeError, match=r"expected Trainer to train with ADOPT .* but torch\.optim\.adamw\.AdamW"):
        trainer.train()


# --- on ranks ---------------------------------------------------------------------------------------------------------


def averages_twice(rank: int, world_size: int, directory: Path) -> None:
    as_torchrun_rank(rank, world_size)
    args = training_arguments(directory)
    entry = (ShardedADOPT, {"lr": 0.05})
    Trainer(Net(), args, train_dataset=data(), optimizer_cls_and_kwargs=entry, callbacks=[AdoptCallback()]).train()


def test_the_callback_refuses_a_sharded_optimizer_that_averages_beside_ddp(tmp_path: Path) -> None:
    """It would be clipped by torch's function, which sees a rank's shard only: other factors on every rank."""
    with pytest.raises(RanksFailed, match="construct the sharded optimizer with reduce_gradients=False"):
        run_ranks(2, averages_twice, tmp_path)


def without_the_callback(rank: int, world_size: int, directory: Path) -> None:
    as_torchrun_rank(rank, world_size)
    args = training_arguments(directory, save_strategy="steps", save_steps=3)
    trainer = Trainer(Net(), args, train_dataset=data(), optimizer_cls_and_kwargs=adopt_for(args))
    trainer.train()
    trainer.train(resume_from_checkpoint=str(directory / "checkpoint-3"))


def test_resuming_from_a_checkpoint_without_the_callback_is_refused_on_every_rank(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(2, without_the_callback, tmp_path)
    assert str(failed.value).count("--- rank") == 2
    assert "checkpoint.load" in str(failed.value)


DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 1},
}


def under_deepspeed(rank: int, world_size: int, directory: Path, door: str) -> tuple[str, list[str]]:
    as_torchrun_rank(rank, world_size)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first
    warned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())
    logging.getLogger("sharded_adopt").addHandler(handler)
    model = Net()
    config: dict[str, Any] = {**DEEPSPEED}
    if door == "json":
        from sharded_adopt.interop.deepspeed import register

        register()
        config["optimizer"] = {"type": "ADOPT", "params": {"lr": "auto", "betas": "auto", "eps": "auto"}}
    args = training_arguments(directory, deepspeed=config)
    entry: dict[str, Any] = {
        "adopt_for": {"optimizer_cls_and_kwargs": adopt_for(args)},
        "optimizers": {"optimizers": (ADOPT(model.parameters(), lr=0.05), None)},
        "json": {},
    }[door]
    trainer = Trainer(model, args, train_dataset=data(), callbacks=[AdoptCallback()], **entry)
    trainer.train()
    return type(trainer.optimizer.optimizer.optimizer).__name__, warned


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: make ecosystem"
)


@needs_deepspeed
def test_adopt_for_gives_deepspeed_an_unsharded_adopt(tmp_path: Path) -> None:
    assert run_ranks(2, under_deepspeed, tmp_path, "adopt_for") == [("ADOPT", [])] * 2


@needs_deepspeed
def test_the_callback_catches_the_adamw_that_deepspeed_puts_in_place_of_an_instance(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match=r"but torch\.optim\.adamw\.AdamW is what runs"):
        run_ranks(2, under_deepspeed, tmp_path, "optimizers")


@needs_deepspeed
def test_the_callback_warns_of_adams_constants_that_auto_fills_in(tmp_path: Path) -> None:
    for name, warned in run_ranks(2, under_deepspeed, tmp_path, "json"):
        assert name == "ADOPT"
        assert len(warned) == 1
        assert "eps=1e-08 and betas=(0.9, 0.999), which are Adam's" in warned[0]
