"""ADOPT's arguments as a config file says them."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch

from sharded_adopt import ADOPT, ADOPTW, PowerClip
from sharded_adopt.interop.config_options import names, problems, read_options


def made(text: str, optimizer_class: type[ADOPT] = ADOPT) -> dict[str, Any]:
    """The options of an optimizer that is made from JSON."""
    options = read_options(optimizer_class, json.loads(text))
    return optimizer_class([torch.zeros(1, requires_grad=True)], **options).param_groups[0]


@pytest.mark.parametrize("optimizer_class", [ADOPT, ADOPTW])
def test_every_argument_of_the_optimizer_can_be_said(optimizer_class: type[ADOPT]) -> None:
    arguments = inspect.signature(ADOPT).parameters
    assert set(names(optimizer_class)) == set(arguments) - {"params"}
    group = optimizer_class([torch.zeros(1, requires_grad=True)]).param_groups[0]
    assert set(names(optimizer_class)) == set(group) - {"params"}


@pytest.mark.parametrize(
    ("text", "option", "value"),
    [
        ('{"betas": [0.8, 0.5]}', "betas", (0.8, 0.5)),
        ('{"lr": 1}', "lr", 1.0),
        ('{"clip_lambda": 0.5}', "clip_lambda", PowerClip(0.5)),
        ('{"clip_lambda": null}', "clip_lambda", None),
        ('{"clip_lambda": {"exponent": 0.25, "scale": 3}}', "clip_lambda", PowerClip(0.25, 3.0)),
        ('{"state_dtype": "bf16"}', "state_dtype", torch.bfloat16),
        ('{"state_dtype": "torch.float64"}', "state_dtype", torch.float64),
        ('{"state_dtype": ["bfloat16", null]}', "state_dtype", (torch.bfloat16, None)),
        ('{"state_dtype": null}', "state_dtype", None),
    ],
)
def test_plain_data_becomes_what_the_optimizer_keeps(text: str, option: str, value: Any) -> None:
    assert made(text)[option] == value


def test_what_is_not_said_keeps_the_default_of_the_class() -> None:
    assert made("{}", ADOPTW)["weight_decay"] == 0.01
    assert made('{"decouple": false}', ADOPTW)["decouple"] is False
    assert made("{}")["betas"] == (0.9, 0.9999)


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("weight_dacay", 0.1, "ADOPT has no such option; did you mean 'weight_decay'?"),
        ("beta", [0.9, 0.99], "ADOPT has no such option; did you mean 'betas'?"),
        ("decoupled", True, "ADOPT has no such option; did you mean 'decouple'?"),
        ("adam_w_mode", True, "ADOPT has no such option; did you mean 'decouple'?"),
        ("params", [], "ADOPT has no such option; the options are lr, betas, eps"),
        ("lr", "auto", 'it is still "auto", which only transformers and accelerate fill in'),
        ("lr", "1e-3", "lr must be a number of at least 0 and finite, got '1e-3'"),
        ("clip_lambda", "lambda step: step**0.25", "a config is data and is never evaluated"),
        ("clip_lambda", "__import__('os').abort()", "a config is data and is never evaluated"),
        ("clip_lambda", {"exponent": "0.25"}, "clip_lambda: PowerClip: exponent must be a number, got '0.25'"),
        ("clip_lambda", {"power": 0.25}, "a mapping must hold 'exponent' and may hold 'scale'"),
        ("betas", [0.9], "betas must be two numbers (beta1, beta2), got [0.9]"),
        ("decouple", "true", "decouple must be True or False, got 'true'"),
        ("state_dtype", "int8", "state_dtype must be None, one of"),
        ("init", "elements", "init must be one of ('parameter', 'element'), got 'elements'"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_to_write(option: str, value: Any, problem: str) -> None:
    assert problem in problems(ADOPT, {option: value})[option]
    with pytest.raises(ValueError, match="the options of ADOPT in the config cannot be used") as error:
        read_options(ADOPT, {option: value})
    assert f"{option}: {problems(ADOPT, {option: value})[option]}" in str(error.value)


def test_all_problems_are_told_at_once() -> None:
    assert list(problems(ADOPTW, {"lr": -1, "beta": 1, "eps": 1e-6})) == ["lr", "beta"]


def test_values_that_go_alone_but_not_together_are_refused() -> None:
    wrong = problems(ADOPT, {"differentiable": True, "state_dtype": "bf16"})
    assert list(wrong) == ["together"]
    assert "differentiable=True needs a wider exp_avg_sq" in wrong["together"]
