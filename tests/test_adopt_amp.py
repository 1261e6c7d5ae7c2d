"""ADOPT under torch.amp.GradScaler: the scale goes into the kernels, gradients stay as they are."""

from __future__ import annotations

import pytest
import torch
from adopt_cases import same_bits
from torch import nn

from sharded_adopt import ADOPT

kernels = pytest.mark.parametrize(
    "options",
    [{"foreach": False}, {"foreach": True}, {}, {"capturable": True}],
    ids=["single", "foreach", "auto", "capturable"],
)


def make(options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    return model, ADOPT(model.parameters(), lr=0.1, weight_decay=0.1, **options)


def batch(step):
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(step))


@kernels
def test_scaled_training_equals_unscaled_to_the_bit_and_skips_overflows(options):
    """Scales are powers of two. A step with an inf is skipped as if its batch had not been there."""
    scaled_model, scaled = make(options)
    plain_model, plain = make(options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    scales = []
    for step in range(10):
        for optimizer in (scaled, plain):
            optimizer.zero_grad()
        loss = scaled_model(batch(step)).square().mean()
        if step in (0, 4):  # the very first step too
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        before = [p.grad.clone() for p in scaled_model.parameters()]
        scaler.step(scaled)
        assert all(same_bits(a, p.grad) for a, p in zip(before, scaled_model.parameters(), strict=True))
        scaler.update()
        scales.append(scaler.get_scale())
        if step not in (0, 4):
            plain_model(batch(step)).square().mean().backward()
            plain.step()
    assert scales[0] == 2.0**9  # backed off, so the overflow was seen
    assert max(scales) > 2.0**9
    for p, q in zip(scaled_model.parameters(), plain_model.parameters(), strict=True):
        assert same_bits(p, q)
        assert scaled.state[p]["step"] == plain.state[q]["step"] == 8
        assert same_bits(scaled.state[p]["exp_avg_sq"], plain.state[q]["exp_avg_sq"])
    assert not hasattr(scaled, "grad_scale")


@kernels
def test_unscale_before_clipping_is_not_done_twice(options):
    scaled_model, scaled = make(options)
    plain_model, plain = make(options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(4):
        for optimizer in (scaled, plain):
            optimizer.zero_grad()
        scaler.scale(scaled_model(batch(step)).square().mean()).backward()
        scaler.unscale_(scaled)
        plain_model(batch(step)).square().mean().backward()
        for model in (scaled_model, plain_model):
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(scaled)
        scaler.update()
        plain.step()
    for p, q in zip(scaled_model.parameters(), plain_model.parameters(), strict=True):
        assert same_bits(p, q)


def test_a_disabled_scaler_is_no_scaler():
    model, optimizer = make({})
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(model(batch(0)).square().mean()).backward()
    scaler.step(optimizer)
    assert all(optimizer.state[p]["step"] == 1 for p in model.parameters())


@pytest.mark.parametrize("foreach", [False, True])
def test_fp16_parameters_train_with_a_scaler(foreach):
    p = nn.Parameter(torch.ones(8, dtype=torch.float16))
    optimizer = ADOPT([p], lr=0.01, foreach=foreach)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for _ in range(5):
        optimizer.zero_grad()
        scaler.scale(p.float().square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.state[p]["step"] == 5
    assert optimizer.state[p]["exp_avg_sq"].dtype == torch.float32
    assert (p < 1).all()
