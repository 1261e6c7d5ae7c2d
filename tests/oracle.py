"""The oracle of every sharding test: one process, an unsharded optimizer, the averaged gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 6


class AwkwardModel(nn.Module):
    """Everything that breaks a flat layout: odd sizes, tying, a scalar, an empty and a frozen parameter, channels_last,
    fewer elements than ranks, and two branches of which a batch may use one.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) * 0.5)

        self.embedding = random(11, 7)
        self.head = self.embedding  # tied
        self.mix = random(7, 5).t()  # stored transposed: shape (5, 7), strides (1, 5)
        self.mix = nn.Parameter(self.mix.detach())
        self.left = random(5, 7)
        self.right = random(5, 7)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.pair = random(2)
        conv = torch.randn(4, 3, 2, 2, generator=generator).to(memory_format=torch.channels_last)
        self.kernel = nn.Parameter(conv)
        self.register_buffer("counter", torch.zeros(2))

    def forward(self, tokens: Tensor, image: Tensor, branch: str) -> Tensor:
        hidden = self.embedding[tokens] @ self.mix.t()
        weight = {"left": self.left, "right": self.right}.get(branch)
        hidden = torch.tanh(hidden) @ weight if weight is not None else torch.tanh(hidden) @ self.mix
        logits = (hidden * self.scale) @ self.head.t()
        convolved = nn.functional.conv2d(image, self.kernel).square().mean() * self.pair.sum()
        return logits.square().mean() + convolved + self.frozen.sum() + self.empty.sum()


Batch = tuple[Tensor, Tensor, str]


def batch(step: int, rank: int, branch: str = "left") -> Batch:
    """What `rank` sees at `step`."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    tokens = torch.randint(0, 11, (4,), generator=generator)
    return tokens, torch.randn(2, 3, 4, 4, generator=generator), branch


def branch_of(step: int, rank: int) -> str:
    """`right` comes late and on odd ranks only, `left` is missing on some steps."""
    if step == 2:
        return "neither"
    return "right" if step >= 3 and rank % 2 == 1 else "left"


def averaged_gradients(model: nn.Module, batches: Sequence[Batch | None]) -> list[Tensor | None]:
    """The gradient of every parameter: the sum over the ranks in their order, divided by their number.

    None on every rank stays None; None on some counts as zero there.
    """
    params = list(model.parameters())
    per_rank: list[list[Tensor | None]] = []
    for one in batches:
        if one is None:
            per_rank.append([None] * len(params))
            continue
        for p in params:
            p.grad = None
        model(*one).backward()
        per_rank.append([p.grad for p in params])
    means: list[Tensor | None] = []
    for i, p in enumerate(params):
        grads = [row[i] for row in per_rank]
        if all(g is None for g in grads):
            means.append(None)
            continue
        filled = [torch.zeros_like(p) if g is None else g for g in grads]
        total = filled[0].clone()
        for g in filled[1:]:
            total += g
        means.append(total / len(batches))
    return means


def train_unsharded(
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    world_size: int,
    steps: int = STEPS,
    batches_of: Callable[[int, int], Batch | None] = lambda step, rank: batch(step, rank, branch_of(step, rank)),
) -> tuple[list[Tensor], dict[str, Any]]:
    """Train on what `world_size` ranks would see. Returns the parameters and the optimizer's state dict."""
    model = AwkwardModel()
    optimizer = make_optimizer(model)
    for step in range(steps):
        means = averaged_gradients(model, [batches_of(step, rank) for rank in range(world_size)])
        for p, mean in zip(model.parameters(), means, strict=True):
            p.grad = mean
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()], optimizer.state_dict()


def train_sharded(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rank: int,
    steps: Sequence[int],
    batches_of: Callable[[int, int], Batch | None] = lambda step, rank: batch(step, rank, branch_of(step, rank)),
) -> None:
    """The loop a user writes."""
    for step in steps:
        optimizer.zero_grad()
        one = batches_of(step, rank)
        if one is not None:
            model(*one).backward()
        optimizer.step()


def assert_same(ours: Sequence[Tensor], theirs: Sequence[Tensor], rtol: float = 0.0, atol: float = 0.0) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
