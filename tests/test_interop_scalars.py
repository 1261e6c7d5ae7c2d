"""Arguments that come as one string: what it means, and what is refused."""

from __future__ import annotations

import pytest
import torch

from sharded_adopt import ADOPT
from sharded_adopt.interop.scalars import from_scalars, parse


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", {}),
        ("beta2=0.999", {"betas": (0.9, 0.999)}),
        ("beta1=0.5, beta2=0", {"betas": (0.5, 0.0)}),
        ("clip_exponent=0.333", {"clip_lambda": {"exponent": 0.333, "scale": 1.0}}),
        ("clip_scale=2", {"clip_lambda": {"exponent": 0.25, "scale": 2.0}}),
        ("clip_exponent=none", {"clip_lambda": None}),
        (
            "lr=1e-3,decouple=True,foreach=none,init=element",
            {"lr": 1e-3, "decouple": True, "foreach": None, "init": "element"},
        ),
    ],
)
def test_a_string_says_what_the_arguments_say(text, options):
    assert from_scalars(parse(text)) == options
    ADOPT([torch.ones(1, requires_grad=True)], **from_scalars(parse(text)))


def test_values_that_are_no_strings_are_taken_as_they_are():
    assert from_scalars({"beta1": 0.8, "decouple": False}) == {"betas": (0.8, 0.9999), "decouple": False}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta3=0.9", "ADOPT has no option 'beta3'; did you mean 'beta"),
        ("decuple=true", "did you mean 'decouple'"),
        ("temperature=1", "the options are lr, betas"),
        ("lr", "expected name=value"),
        ("=1", "expected name=value"),
        ("lr=1,lr=2", "each name once"),
        ("betas=0.9,beta1=0.9", "give betas or beta1 and beta2, not both"),
        ("clip_lambda=none,clip_scale=2", "give clip_lambda or clip_exponent and clip_scale, not both"),
    ],
)
def test_what_cannot_be_meant_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        from_scalars(parse(text))


@pytest.mark.parametrize("text", ["clip_lambda=__import__('os').abort()", "clip_exponent=lambda_step:1", "lr=fast"])
def test_a_string_is_data_and_never_evaluated(text):
    with pytest.raises(ValueError, match=r"must be|expected"):
        from_scalars(parse(text))
