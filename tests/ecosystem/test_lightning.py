"""ADOPT in Lightning: `configure_optimizers`, accumulation, clipping, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hosting import (
    MAX_NORM,
    MICRO,
    OPTIONS,
    STEPS,
    as_torchrun_rank,
    assert_same_bits,
    expected,
    loss_of,
    make_net,
    micro_batch,
    values,
)
from ranks import RanksFailed, run_ranks
from torch import Tensor, nn

pytest.importorskip("lightning", reason="lightning is not installed: make ecosystem")

import lightning.pytorch as pl

from sharded_adopt import ADOPT, ShardedADOPT
from sharded_adopt.interop.lightning import AdoptCallback


class Module(pl.LightningModule):
    def __init__(self, cls: type, options: dict[str, Any]) -> None:
        super().__init__()
        self.net = make_net()
        self.cls, self.options = cls, options

    def train_dataloader(self) -> Any:
        """An epoch is half of the steps: Lightning resumes from the end of one, where no loader has to skip."""
        steps = range(self.current_epoch * STEPS // 2, (self.current_epoch + 1) * STEPS // 2)
        batches = [micro_batch(step, micro, self.global_rank) for step in steps for micro in range(MICRO)]
        return torch.utils.data.DataLoader(batches, batch_size=None)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self.cls(self.net.parameters(), **OPTIONS, **self.options)
        return optimizer


def fit(
    rank: int,
    world_size: int,
    cls: type,
    options: dict[str, Any],
    directory: Path,
    resume: bool = False,
    callbacks: tuple[type, ...] = (AdoptCallback,),
) -> list[Tensor]:
    """Train two epochs with a checkpoint after the first, or go on from it."""
    as_torchrun_rank(rank, world_size)
    module = Module(cls, options)
    if resume:
        nn.init.constant_(module.net[0].weight, 7.0)  # what is not loaded shows
    saving = pl.callbacks.ModelCheckpoint(dirpath=directory, filename="{step}", save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy="ddp",
        max_epochs=2,
        reload_dataloaders_every_n_epochs=1,
        accumulate_grad_batches=MICRO,
        gradient_clip_val=MAX_NORM,
        callbacks=[saving, *(make() for make in callbacks)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, ckpt_path=str(directory / "step=3.ckpt") if resume else None)
    return values(module.net)


BESIDE_DDP = {"reduce_gradients": False}


@pytest.mark.parametrize(
    ("world_size", "cls", "options"),
    [(1, ADOPT, {}), (2, ADOPT, {}), (2, ShardedADOPT, BESIDE_DDP)],
    ids=["ADOPT-1", "ADOPT-2", "ShardedADOPT-2"],
)
def test_accumulated_clipped_and_resumed_equals_a_plain_loop_to_the_bit(
    world_size: int, cls: type, options: dict[str, Any], tmp_path: Path
) -> None:
    for params in run_ranks(world_size, fit, cls, options, tmp_path):
        assert_same_bits(params, expected(world_size))
    for params in run_ranks(world_size, fit, cls, options, tmp_path, True):
        assert_same_bits(params, expected(world_size))


def test_a_checkpoint_of_sharded_ranks_is_that_of_unsharded_ones(tmp_path: Path) -> None:
    run_ranks(2, fit, ShardedADOPT, BESIDE_DDP, tmp_path / "sharded")
    run_ranks(2, fit, ADOPT, {}, tmp_path / "plain")
    ours, theirs = (
        torch.load(tmp_path / name / "step=3.ckpt", weights_only=True)["optimizer_states"][0]["state"]
        for name in ("sharded", "plain")
    )
    assert ours.keys() == theirs.keys()
    for index, state in theirs.items():
        assert_same_bits(list(ours[index].values()), list(state.values()))
    run_ranks(1, fit, ADOPT, {}, tmp_path / "sharded", True)


def test_a_checkpoint_without_the_callback_is_refused_on_every_rank(tmp_path: Path) -> None:
    run_ranks(2, fit, ShardedADOPT, BESIDE_DDP, tmp_path, False, ())
    with pytest.raises(RanksFailed, match=r"checkpoint\.load") as failed:
        run_ranks(2, fit, ShardedADOPT, BESIDE_DDP, tmp_path, True, ())
    assert str(failed.value).count("--- rank") == 2


def test_a_sharded_optimizer_that_averages_beside_ddp_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match="construct the sharded optimizer with reduce_gradients=False"):
        run_ranks(2, fit, ShardedADOPT, {}, tmp_path)
