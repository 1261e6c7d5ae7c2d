"""Training under a real DeepSpeed engine on real ranks, and the same in one process without it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed

# Imported late by DeepSpeed and torch, seconds in every rank: once here, before the ranks are forked.
import deepspeed.runtime.zero.muon.muon_optimizer
import torch._dynamo

from sharded_adopt import ADOPT

# Built at run time by every initialize(), half a minute each time: gloo does the same. One test leaves it on.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

STEPS = 12
OPTIONS = {"lr": 0.02, "weight_decay": 0.05, "decouple": True, "betas": [0.9, 0.99]}
LATE = 5
"""The step that first uses the branch which comes late, from 0."""


class Model(nn.Module):
    """Sizes that no world size divides, and a branch that a batch may leave out."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(61, 37)
        self.hidden = nn.Linear(37, 53)
        self.late = nn.Linear(53, 53)
        self.norm = nn.LayerNorm(53)
        self.head = nn.Linear(53, 61)
        for param in self.parameters():
            nn.init.normal_(param, std=0.2, generator=generator)

    def forward(self, tokens: Tensor, use_late: bool = True) -> Tensor:
        hidden = nn.functional.gelu(self.hidden(self.embedding(tokens)))
        if use_late:
            hidden = hidden + self.late(hidden)
        return self.head(self.norm(hidden))


def loss_of(model: Callable[..., Tensor], step: int, rank: int, use_late: bool, highest: int = 60) -> Tensor:
    """The loss of what `rank` sees at `step`: 8 tokens, none above `highest`, and the 8 to predict."""
    random = torch.Generator().manual_seed(100 * step + rank)
    tokens, targets = torch.randint(0, highest + 1, (2, 8), generator=random)
    return nn.functional.cross_entropy(model(tokens, use_late).float(), targets)


def train_alone(
    steps: int = STEPS,
    late: int = 0,
    zero_fill: bool = False,
    highest: int = 60,
    make: Callable[..., Any] = ADOPT,
    **options: Any,
) -> dict[str, Tensor]:
    """Train in one process on the mean over two ranks; return the parameters by name.

    `late`: the step that first uses the late branch. `zero_fill`: its gradients before are zeros, not None.
    """
    model = Model()
    optimizer = make(model.parameters(), **{**OPTIONS, **options})
    for step in range(steps):
        per_rank = []
        for rank in range(2):
            optimizer.zero_grad()
            loss_of(model, step, rank, step >= late, highest).backward()
            per_rank.append([p.grad for p in model.parameters()])
        for param, *grads in zip(model.parameters(), *per_rank, strict=True):
            param.grad = None if grads[0] is None else (grads[0] + grads[1]) / 2
            if param.grad is None and zero_fill:
                param.grad = torch.zeros_like(param)
        optimizer.step()
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def config(stage: int, **changes: Any) -> dict[str, Any]:
    """A DeepSpeed config as a user writes it, fp32, without clipping."""
    offload = changes.pop("offload", False)
    zero: dict[str, Any] = {"stage": stage, **changes.pop("zero", {})}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    return {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "ADOPT", "params": OPTIONS | changes.pop("params", {})},
        "zero_optimization": zero,
        **changes,
    }


def make_engine(rank: int, world_size: int, ds_config: dict[str, Any], **arguments: Any) -> Any:
    """Initialize DeepSpeed in a rank that has a process group already."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    model = arguments.pop("model", None) or Model()
    arguments = {"model_parameters": model.parameters(), **arguments}
    return deepspeed.initialize(model=model, config=ds_config, **arguments)[0]


def take_steps(engine: Any, rank: int, steps: Sequence[int], late: int = 0, highest: int = 60) -> None:
    """The loop a user writes."""
    for step in steps:
        engine.backward(loss_of(engine, step, rank, step >= late, highest))
        engine.step()


def parameters(engine: Any) -> dict[str, Tensor]:
    """The whole parameters by name, in fp32 where DeepSpeed keeps them so."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param]):
            full = safe_get_full_fp32_param(param) if hasattr(param, "_hp_mapping") or hasattr(param, "ds_id") else None
            found[name] = (param if full is None else full).detach().float().clone()
    return found


def steps_of(engine: Any) -> list[float]:
    """`step` of everything that the inner ADOPT holds."""
    optimizer = engine.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    assert isinstance(optimizer, ADOPT)
    return [float(state["step"]) for state in optimizer.state.values()]


def train(
    rank: int, world_size: int, ds_config: dict[str, Any], steps: int = STEPS, late: int = 0
) -> dict[str, Tensor]:
    """Train on this rank from the start; return the parameters."""
    engine = make_engine(rank, world_size, ds_config)
    take_steps(engine, rank, range(steps), late)
    return parameters(engine)


def train_and_save(rank: int, world_size: int, ds_config: dict[str, Any], steps: int, directory: Path) -> None:
    """Train on this rank from the start and save a checkpoint with the tag "halfway"."""
    engine = make_engine(rank, world_size, ds_config)
    take_steps(engine, rank, range(steps))
    engine.save_checkpoint(str(directory), tag="halfway")


def load_and_train(
    rank: int, world_size: int, ds_config: dict[str, Any], steps: int, directory: Path, tag: str
) -> tuple[dict[str, Tensor], list[float]]:
    """Load the checkpoint of `train_and_save` and take the steps up to STEPS; return the parameters and the steps."""
    engine = make_engine(rank, world_size, ds_config)
    path, _ = engine.load_checkpoint(str(directory), tag=tag)
    assert path is not None
    take_steps(engine, rank, range(steps, STEPS))
    return parameters(engine), steps_of(engine)


def convert_to_universal(directory: Path) -> None:
    """Run DeepSpeed's own converter on the checkpoint, as a user does."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(directory / "halfway"), "--output_folder", str(directory / "halfway_universal")]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of any element."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).detach().abs().max()) for name in ours)
