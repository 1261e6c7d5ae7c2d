from __future__ import annotations

import dataclasses
import functools
import math
import pickle

import pytest
import torch

from sharded_adopt import PowerClip
from sharded_adopt.clipping import as_clip, clip_bound, clip_from_data, clip_to_data


def custom(step):
    return 3.0


def test_bound_is_scale_times_step_to_the_exponent():
    clip = PowerClip(0.5, scale=3.0)
    assert clip(16) == 12.0
    assert clip(16.0) == 12.0
    assert PowerClip()(1) == 1.0
    assert PowerClip(0.0, scale=2.0)(0) == 2.0


@pytest.mark.parametrize("step", [1, 2, 7, 16, 1000, 123_457, 2**24])
def test_tensor_step_gives_a_0_dim_fp64_tensor_of_the_same_bound(step):
    bound = PowerClip(0.25, 1.5)(torch.tensor(float(step)))
    assert bound.dtype == torch.float64
    assert bound.shape == ()
    assert bound.item() == pytest.approx(1.5 * step**0.25, rel=1e-15)


def test_bound_is_that_of_the_authors_lambda_to_the_bit():
    assert all(PowerClip(0.25)(step) == float(step) ** 0.25 for step in range(1, 5000))


def test_overflow_means_no_bound_as_it_does_for_tensors():
    assert PowerClip(400.0)(10) == math.inf
    assert PowerClip(400.0)(torch.tensor(10.0)).item() == math.inf


def test_clip_is_frozen_hashable_comparable_and_pickles():
    clip = PowerClip(0.25)
    with pytest.raises(dataclasses.FrozenInstanceError):
        clip.exponent = 1.0
    assert pickle.loads(pickle.dumps(clip)) == clip == PowerClip(0.25, 1.0)
    assert len({clip, PowerClip(0.25), PowerClip(0.5)}) == 2


@pytest.mark.parametrize(
    ("exponent", "scale", "named"),
    [
        (-0.1, 1.0, "exponent"),
        (math.nan, 1.0, "exponent"),
        (math.inf, 1.0, "exponent"),
        (True, 1.0, "exponent"),
        ("0.25", 1.0, "exponent"),
        (None, 1.0, "exponent"),
        (0.25, 0.0, "scale"),
        (0.25, -1.0, "scale"),
        (0.25, math.nan, "scale"),
        (0.25, False, "scale"),
    ],
)
def test_bad_clip_is_an_error_that_names_the_argument_and_the_value(exponent, scale, named):
    bad = exponent if named == "exponent" else scale
    with pytest.raises(ValueError, match=named) as error:
        PowerClip(exponent, scale)
    assert repr(bad) in str(error.value)


def test_clip_may_be_given_as_exponent_mapping_none_or_callable():
    assert as_clip(0.25) == PowerClip(0.25)
    assert as_clip(1) == PowerClip(1.0)
    assert as_clip({"exponent": 0.5}) == PowerClip(0.5)
    assert as_clip({"exponent": 0.5, "scale": 2}) == PowerClip(0.5, 2.0)
    assert as_clip(None) is None
    assert as_clip(custom) is custom


@pytest.mark.parametrize("bad", ["step**0.25", "0.25", True, [0.25], {"scale": 1.0}, {"exponent": 1, "power": 2}, 1j])
def test_strings_and_other_things_are_refused_and_never_evaluated(bad):
    with pytest.raises(ValueError, match="clip_lambda"):
        as_clip(bad)


def test_data_form_is_plain_and_comes_back():
    assert clip_to_data(PowerClip(0.25)) == {"exponent": 0.25, "scale": 1.0}
    assert clip_to_data(None) is None
    for clip in (PowerClip(0.5, 2.0), None):
        assert clip_from_data(clip_to_data(clip), current=PowerClip(9.0)) == clip


def test_custom_callable_leaves_its_name_and_must_be_there_to_load():
    data = clip_to_data(custom)
    assert set(data) == {"custom"}
    assert data["custom"].endswith("test_clipping.custom")
    assert clip_from_data(data, current=custom) is custom
    for current in (PowerClip(0.25), None, functools.partial(custom)):
        with pytest.raises(ValueError, match="custom"):
            clip_from_data(data, current=current)


def test_a_callable_without_a_name_is_known_by_its_type():
    assert clip_to_data(functools.partial(custom))["custom"] == "functools.partial"


@pytest.mark.parametrize("answer", [math.nan, -1.0, None, "1", True])
def test_custom_callable_that_gives_no_bound_is_an_error(answer):
    with pytest.raises(ValueError, match="clip_lambda"):
        clip_bound(lambda step: answer, 3)


def test_custom_callable_may_give_a_tensor():
    bound = torch.tensor(2.0)
    assert clip_bound(lambda step: bound, 3) is bound
