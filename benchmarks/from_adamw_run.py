"""One training run of the main job's model, small enough for a hundred of them: what `from_adamw.py` measures with.

Everything is as in examples/pretrain.py (text, schedule, groups, gradient clipping, decoupled decay), on one thread in
one process, with a model of 120,576 parameters.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from sharded_adopt import ADOPT

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from byte_gpt import ByteGPT, GPTConfig
from corpus import Corpus
from corpus import load as load_corpus

MODEL = GPTConfig(layers=2, heads=4, width=64, context=32)
BATCH = 16
GRAD_CLIP = 1.0
HELD_OUT = 1 / 20
"""The share at the end of the text that is never trained on."""
EVERY = 20
"""Steps that one point of a stored loss curve is the mean of, and between two measurements of the update RMS."""


@dataclass(frozen=True)
class Run:
    """What makes a run what it is. `clip`: the exponent of ADOPT's bound, None for no clip. `warmup` and `steps` are
    those of the schedule: a straight line up, then half a cosine down to a tenth.
    """

    optimizer: str
    lr: float
    beta2: float
    seed: int
    steps: int
    warmup: int = 20
    clip: float | None = 0.25
    weight_decay: float = 0.1
    decouple: bool = True

    @property
    def key(self) -> str:
        """A name that no other run has."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())


@dataclass(frozen=True)
class Switch:
    """AdamW until `at` at a constant learning rate, then every one of `SWITCHES` for `after` steps."""

    lr: float
    beta2: float
    seed: int
    at: int
    after: int
    warmup: int = 20

    @property
    def key(self) -> str:
        """A name that no other run has."""
        return "switch " + " ".join(f"{name}={value}" for name, value in asdict(self).items())


class Text:
    """The corpus in two parts."""

    def __init__(self) -> None:
        whole = load_corpus([], MODEL.context)
        self.sha256, self.source = whole.sha256, whole.source
        end = len(whole.text) - int(len(whole.text) * HELD_OUT)
        self.train = Corpus(whole.text[:end], whole.sha256, whole.source)
        held_out = Corpus(whole.text[end:], whole.sha256, whole.source)
        self.held_out = [
            held_out.batch(seed=0, step=step, size=64, context=MODEL.context, rows=range(64)) for step in range(8)
        ]

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step."""
        return self.train.batch(seed=seed, step=step, size=BATCH, context=MODEL.context, rows=range(BATCH))


def groups_of(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights and embeddings decay, norms and biases do not."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]


def make_optimizer(run: Run, model: nn.Module) -> Optimizer:
    """The optimizer of a run."""
    groups, betas = groups_of(model, run.weight_decay), (0.9, run.beta2)
    if run.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=run.lr, betas=betas)
    return ADOPT(groups, lr=run.lr, betas=betas, clip_lambda=run.clip, decouple=run.decouple)


def lr_factor(step: int, warmup: int, steps: int) -> float:
    """The schedule of examples/pretrain.py."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 0.55 + 0.45 * math.cos(math.pi * progress)


def take_step(model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor], lr: float) -> float:
    """One step; return its loss."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
    optimizer.step()
    return loss.item()


def update_rms(before: list[Tensor], optimizer: Optimizer) -> float:
    """The RMS of what the last step took from the parameters, which were `before`, over lr; without decoupled decay."""
    total, numel, old = 0.0, 0, iter(before)
    for group in optimizer.param_groups:
        kept = 1 - group["lr"] * group["weight_decay"] * group.get("decouple", True)
        for param in group["params"]:
            total += float((next(old) * kept - param.detach()).square().sum(dtype=torch.float64)) / group["lr"] ** 2
            numel += param.numel()
    return math.sqrt(total / numel)


def values_of(optimizer: Optimizer) -> list[Tensor]:
    """Copies of all parameters."""
    return [param.detach().clone() for group in optimizer.param_groups for param in group["params"]]


@torch.no_grad()
def held_out_loss(model: nn.Module, text: Text) -> float:
    """The mean loss on text that was never trained on."""
    losses = [F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item() for x, y in text.held_out]
    return sum(losses) / len(losses)


def train(run: Run, text: Text) -> dict[str, Any]:
    """Train; return the held-out loss at the end and the curves of loss and update RMS."""
    torch.manual_seed(run.seed)
    model = ByteGPT(MODEL)
    optimizer = make_optimizer(run, model)
    losses: list[float] = []
    sizes: list[float] = []
    for step in range(run.steps):
        before = values_of(optimizer) if step % EVERY == 0 else []
        lr = run.lr * lr_factor(step, run.warmup, run.steps)
        losses.append(take_step(model, optimizer, text.batch(run.seed, step), lr))
        if not math.isfinite(losses[-1]):
            return {"final": None, "loss": curve(losses[:-1]), "update_rms": sizes}
        if before:
            sizes.append(round(update_rms(before, optimizer), 4))
    return {"final": round(held_out_loss(model, text), 5), "loss": curve(losses), "update_rms": sizes}


def curve(values: list[float]) -> list[float]:
    """Means of `EVERY` values each."""
    chunks = [values[i : i + EVERY] for i in range(0, len(values), EVERY)]
    return [round(sum(chunk) / len(chunk), 4) for chunk in chunks]


def _from_step_1(adamw: Optimizer) -> ADOPT:
    made = ADOPT.from_adamw(adamw)
    for state in made.state.values():
        state["step"].fill_(1)
    return made


def _cold(adamw: Optimizer) -> ADOPT:
    groups = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in adamw.param_groups]
    return ADOPT(groups, decouple=True)


SWITCHES: dict[str, tuple[Callable[[Optimizer], Optimizer], float, int]] = {
    "AdamW goes on": (lambda adamw: adamw, 1.0, 1),
    "ADOPT.from_adamw": (ADOPT.from_adamw, 1.0, 1),
    "from_adamw, betas=(0.9, 0.9999)": (lambda adamw: ADOPT.from_adamw(adamw, betas=(0.9, 0.9999)), 1.0, 1),
    "from_adamw, eps=1e-6": (lambda adamw: ADOPT.from_adamw(adamw, eps=1e-6), 1.0, 1),
    "from_adamw, but step = 1": (_from_step_1, 1.0, 1),
    "cold ADOPT": (_cold, 1.0, 1),
    "cold ADOPT, warmed up over 50 steps": (_cold, 1.0, 50),
    "cold ADOPT, half the lr": (_cold, 0.5, 1),
}
"""How training goes on at the switch, at what share of the learning rate, warmed up over how many steps.

The first is what the others are compared with.
"""


def switch(run: Switch, text: Text) -> dict[str, Any]:
    """Train by AdamW, then go on in each way from there on the same batches; return the loss of every step."""
    torch.manual_seed(run.seed)
    model = ByteGPT(MODEL)
    adamw = torch.optim.AdamW(groups_of(model, 0.1), lr=run.lr, betas=(0.9, run.beta2))
    before = []
    for step in range(run.at):
        lr = run.lr * min(1.0, (step + 1) / run.warmup)
        before.append(round(take_step(model, adamw, text.batch(run.seed, step), lr), 4))
    result: dict[str, Any] = {"before": before[-100:], "after": {}, "update_rms": {}, "final": {}}
    for name, (go_on, share, warmup) in SWITCHES.items():
        own_model, own_adamw = copy.deepcopy((model, adamw))
        optimizer = go_on(own_adamw)
        losses: list[float] = []
        sizes: list[float] = []
        for step in range(run.after):
            old = values_of(optimizer)
            lr = run.lr * share * min(1.0, (step + 1) / warmup)
            losses.append(round(take_step(own_model, optimizer, text.batch(run.seed, run.at + step), lr), 4))
            sizes.append(round(update_rms(old, optimizer), 4))
        result["after"][name], result["update_rms"][name] = losses, sizes
        result["final"][name] = round(held_out_loss(own_model, text), 5)
    return result
