"""What a state dict holds, what loading keeps, and the state dicts of other ADOPTs."""

from __future__ import annotations

import copy
import io
import sys

import pytest
import torch
from adopt_cases import authors_adopt, same_bits
from torch import nn

from sharded_adopt import ADOPT, PowerClip
from sharded_adopt.clipping import clip_to_data

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def param(*shape, dtype=F32, seed=0):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def steps(optimizer, params, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def custom_clip(step):
    return 1.0 + step


def through_a_file(state_dict):
    """Saved, and read back by the loader that runs no code."""
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same_state(one, p, other, q):
    assert same_bits(p.detach(), q.detach())
    for key, value in one.state[p].items():
        assert same_bits(value, other.state[q][key]), key


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (F32, {}),
        (BF16, {}),
        (F16, {"state_dtype": (F32, BF16), "clip_lambda": None}),
        (BF16, {"state_dtype": BF16, "clip_lambda": PowerClip(0.5, 2.0)}),
        (F64, {"state_dtype": F32, "nesterov": True, "init": "element"}),
        (torch.complex64, {"weight_decay": 0.1, "decouple": True}),
        (F32, {"capturable": True, "lr": 0.25}),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(dtype, options):
    """The new optimizer is constructed with other values: the loaded ones win."""
    p = param(7, 3, dtype=dtype)
    whole = ADOPT([p], **{"lr": 0.1, **options})
    steps(whole, [p], 3)
    q = nn.Parameter(p.detach().clone())
    resumed = ADOPT([q], lr=9.0, clip_lambda=PowerClip(1.0), weight_decay=0.7)
    resumed.load_state_dict(through_a_file(whole.state_dict()))
    assert {k: v for k, v in resumed.param_groups[0].items() if k != "params"} == {
        k: v for k, v in whole.param_groups[0].items() if k != "params"
    }
    for optimizer, tensor in ((whole, p), (resumed, q)):
        steps(optimizer, [tensor], 4, seed=5)
    assert_same_state(whole, p, resumed, q)


def test_state_dict_is_plain_data_and_json_but_for_tensors():
    p = param(3)
    optimizer = ADOPT([p], clip_lambda=PowerClip(0.5, 2.0), state_dtype=(None, BF16))
    (group,) = optimizer.state_dict()["param_groups"]
    assert group["clip_lambda"] == {"exponent": 0.5, "scale": 2.0}
    assert group["state_dtype"] == [None, "bfloat16"]
    assert ADOPT([p], state_dtype=F16).state_dict()["param_groups"][0]["state_dtype"] == "float16"
    assert ADOPT([p], clip_lambda=None).state_dict()["param_groups"][0]["clip_lambda"] is None
    assert optimizer.param_groups[0]["clip_lambda"] == PowerClip(0.5, 2.0)  # the live group stays as it was


def test_groups_keep_their_own_clip():
    groups = [{"params": [param(2)], "clip_lambda": 0.5}, {"params": [param(2)], "clip_lambda": None}]
    optimizer = ADOPT(groups)
    other = ADOPT([{"params": [param(2)]}, {"params": [param(2)]}])
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert [g["clip_lambda"] for g in other.param_groups] == [PowerClip(0.5), None]


def test_a_dict_without_a_key_keeps_what_was_constructed():
    state_dict = ADOPT([param(2)], lr=0.5).state_dict()
    for key in ("clip_lambda", "state_dtype", "nesterov", "init"):
        del state_dict["param_groups"][0][key]
    other = ADOPT([param(2)], clip_lambda=0.7, nesterov=True, init="element", state_dtype=BF16)
    other.load_state_dict(state_dict)
    group = other.param_groups[0]
    assert (group["clip_lambda"], group["nesterov"], group["init"]) == (PowerClip(0.7), True, "element")
    assert group["state_dtype"] == BF16
    assert group["lr"] == 0.5


def test_custom_clip_leaves_its_name_and_needs_the_same_callable():
    optimizer = ADOPT([param(2)], clip_lambda=custom_clip)
    state_dict = through_a_file(optimizer.state_dict())
    assert state_dict["param_groups"][0]["clip_lambda"] == {"custom": f"{__name__}.custom_clip"}
    same = ADOPT([param(2)], clip_lambda=custom_clip)
    same.load_state_dict(state_dict)
    assert same.param_groups[0]["clip_lambda"] is custom_clip
    for clip in (PowerClip(0.25), None, lambda step: 2.0):
        other = ADOPT([param(2)], lr=0.7, clip_lambda=clip)
        with pytest.raises(ValueError, match="custom_clip"):
            other.load_state_dict(state_dict)
        assert other.param_groups[0]["lr"] == 0.7  # a refused load changes nothing
    assert copy.deepcopy(optimizer).param_groups[0]["clip_lambda"] is custom_clip


@pytest.mark.parametrize("saved", [BF16, F32])
def test_fp32_state_of_16_bit_parameters_survives_loading(saved):
    """torch casts loaded state to the parameter's dtype; a bf16 exp_avg_sq rounded to nearest would freeze."""
    p = param(50, dtype=BF16)
    optimizer = ADOPT([p])
    steps(optimizer, [p], 5)
    state_dict = optimizer.state_dict()
    state_dict["state"][0] = {k: v.to(saved) if k != "step" else v for k, v in state_dict["state"][0].items()}
    other = ADOPT([p])
    other.load_state_dict(state_dict)
    for key in ("exp_avg", "exp_avg_sq"):
        assert other.state[p][key].dtype == F32
        assert same_bits(other.state[p][key], optimizer.state[p][key].to(saved).float())


def test_loaded_state_is_a_copy():
    p, q = param(3), param(3)
    optimizer, other = ADOPT([p], lr=0.1), ADOPT([q], lr=0.1)
    steps(optimizer, [p], 2)
    other.load_state_dict(optimizer.state_dict())
    kept = {k: v.clone() for k, v in other.state[q].items()}
    steps(optimizer, [p], 2)
    assert all(same_bits(v, other.state[q][k]) for k, v in kept.items())


def test_step_goes_beside_the_parameter_only_where_it_must():
    p = param(3)
    optimizer = ADOPT([p])
    steps(optimizer, [p], 1)
    state_dict = optimizer.state_dict()
    state_dict["state"][0]["step"] = 7  # a number, as old checkpoints hold
    optimizer.load_state_dict(state_dict)
    assert same_bits(optimizer.state[p]["step"], torch.tensor(7.0))
    state_dict["state"][0]["step"] = torch.tensor([7.0], dtype=F64)
    optimizer.load_state_dict(state_dict)
    assert same_bits(optimizer.state[p]["step"], torch.tensor(7.0))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda s: s["state"][0].pop("exp_avg_sq"), "exp_avg_sq must be"),
        (lambda s: s["state"][0].pop("step"), "no step"),
        (lambda s: s["state"][0].update(exp_avg=torch.zeros(4)), r"exp_avg must be.*\(3,\).*\(4,\)"),
        (lambda s: s["state"][0].update(exp_avg=torch.zeros(3, dtype=torch.complex64)), "real"),
        (lambda s: s["param_groups"].append(s["param_groups"][0]), "different number of parameter groups"),
        (lambda s: s["param_groups"][0].update(params=[0, 1]), "doesn't match the size"),
        (lambda s: s["param_groups"][0].update(clip_lambda="step ** 0.25"), "clip_lambda"),
        (lambda s: s["param_groups"][0].update(betas=[0.9, 1.5]), "betas"),
        (lambda s: s["param_groups"][0].update(state_dtype="int8"), "state_dtype"),
        (lambda s: s["param_groups"][0].update(foreach=True, fused=True), "foreach=True and fused=True"),
    ],
)
def test_a_dict_that_does_not_fit_is_refused_and_changes_nothing(break_it, message):
    p = param(3)
    optimizer = ADOPT([("weight", p)], lr=0.1)
    steps(optimizer, [p], 2)
    before = copy.deepcopy(optimizer.state_dict())
    bad = copy.deepcopy(before)
    break_it(bad)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(bad)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(same_bits(v, after["state"][0][k]) for k, v in before["state"][0].items())


def test_state_dict_and_load_hooks_see_and_change_plain_data():
    p = param(2)
    optimizer = ADOPT([p], clip_lambda=0.5)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre"))

    def drop_clip(o, state_dict):
        seen.append(state_dict["param_groups"][0]["clip_lambda"])
        return {**state_dict, "note": "kept"}

    optimizer.register_state_dict_post_hook(drop_clip)
    state_dict = optimizer.state_dict()
    assert seen == ["pre", {"exponent": 0.5, "scale": 1.0}]
    assert state_dict["note"] == "kept"

    def rename(o, state_dict):
        state_dict["param_groups"][0]["clip_lambda"] = state_dict["param_groups"][0].pop("clip")
        return state_dict

    state_dict["param_groups"][0]["clip"] = state_dict["param_groups"][0].pop("clip_lambda")
    other = ADOPT([p], clip_lambda=None)
    other.register_load_state_dict_pre_hook(rename)
    other.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["clip_lambda"]))
    other.load_state_dict(state_dict)
    assert seen[-1] == PowerClip(0.5)


def test_fused_in_a_dict_is_dropped_where_there_is_no_fused_kernel(monkeypatch):
    """Which kernel there is belongs to the machine; a checkpoint of one with a compiler must load on one without."""
    loading = sys.modules["sharded_adopt.loading"]
    state_dict = ADOPT([param(2)]).state_dict()
    state_dict["param_groups"][0]["fused"] = True
    other = ADOPT([param(2)])
    monkeypatch.setattr(loading, "fused_is_available", lambda: False)
    other.load_state_dict(state_dict)
    assert other.param_groups[0]["fused"] is None


def test_an_old_pickle_without_todays_options_gets_the_defaults():
    optimizer = ADOPT([param(2)], nesterov=True)
    state = optimizer.__getstate__()
    del state["param_groups"][0]["init"]
    other = ADOPT.__new__(ADOPT)
    other.__setstate__(state)
    assert other.param_groups[0]["init"] == "parameter"


def test_other_entries_of_groups_and_state_travel_along():
    p = param(2)
    optimizer = ADOPT([{"params": [p], "initial_lr": 0.5, "name": "head"}])
    steps(optimizer, [p], 1)
    state_dict = optimizer.state_dict()
    state_dict["state"]["extra"] = {"answer": 42}
    other = ADOPT([param(2)])
    other.load_state_dict(state_dict)
    assert other.param_groups[0]["name"] == "head"
    assert other.param_groups[0]["initial_lr"] == 0.5
    assert other.state["extra"] == {"answer": 42}


# --- other implementations
# ------------------------------------------------------------------------------------------------

GRADS = [[1.0, -2.0, 0.5], [2.0, 0.25, -3.0], [-0.5, 8.0, 1.0], [4.0, -1.0, 0.125], [1e-3, 2.0, -6.0]]


def goes_on(state_dict, theta, **constructed):
    """Load `state_dict`, taken after three steps of GRADS, and take the other two; returns θ, m, v.

    The second parameter never had a gradient, so it has no state.
    """
    p, q = nn.Parameter(torch.tensor(theta)), nn.Parameter(torch.tensor([3.0]))
    optimizer = ADOPT([p, q], **constructed)
    optimizer.load_state_dict(state_dict)
    for grad in GRADS[3:]:
        p.grad = torch.tensor(grad)
        optimizer.step()
    assert optimizer.state[p]["step"] == 5
    return p.detach(), optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"], optimizer


@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decouple": True}])
@pytest.mark.parametrize("old_spelling", [False, True])
def test_the_authors_state_dict_goes_on_to_the_bit(decay, old_spelling):
    theirs = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    optimizer = authors_adopt([theirs, nn.Parameter(torch.tensor([3.0]))], lr=0.1, foreach=False, **decay)
    for i, grad in enumerate(GRADS):
        if i == 3:
            state_dict, theta = copy.deepcopy(optimizer.state_dict()), theirs.tolist()
        theirs.grad = torch.tensor(grad)
        optimizer.step()
    if old_spelling:  # their first version said `decoupled`
        group = state_dict["param_groups"][0]
        group["decoupled"] = group.pop("decouple")
    p, m, v, loaded = goes_on(state_dict, theta)
    assert loaded.param_groups[0]["clip_lambda"] == PowerClip(0.25)  # not in their dict: the constructor's
    assert "decoupled" not in loaded.param_groups[0]
    assert same_bits(p, theirs.detach())
    assert same_bits(m, optimizer.state[theirs]["exp_avg"])
    assert same_bits(v, optimizer.state[theirs]["exp_avg_sq"])


def tensors(**values):
    return {k: torch.tensor(v) for k, v in values.items()}


M3 = [0.0400074981, 0.1372129917, 0.0359629989]
V3 = [1.0002249479, 4.0056061745, 0.2509498894]

# Printed by timm 1.0.31's `timm.optim.adopt.Adopt` (parameters as in `goes_on`, lr 0.1): the group, θ after 3 steps,
# m and v then, and θ, m, v after 5.
TIMM_GROUP = {
    "lr": 0.1, "betas": (0.9, 0.9999), "eps": 1e-06, "weight_decay": 0.0, "clip_exp": 0.333, "decoupled": False,
    "corrected_weight_decay": False, "max_lr_snapshot": 0.1, "caution": False, "maximize": False, "foreach": None,
    "capturable": False, "differentiable": False, "params": [0, 1],
}  # fmt: skip
TIMM = {
    "default": (
        {},
        [0.9859992861747742, -2.0149712562561035, 0.5064036846160889], M3, V3,
        [0.9517552852630615, -2.0389347076416016, 0.5113796591758728],
        [0.16226093471050262, 0.16610775887966156, -0.10707935690879822],
        [1.0016248226165771, 4.005305290222168, 0.25450125336647034],
    ),
    "decoupled": (
        {"weight_decay": 0.1, "decoupled": True},
        [0.9661992788314819, -1.975158929824829, 0.4963536858558655], M3, V3,
        [0.912908136844635, -1.9597432613372803, 0.4915095567703247],
        [0.16226093471050262, 0.16610775887966156, -0.10707935690879822],
        [1.0016248226165771, 4.005305290222168, 0.25450125336647034],
    ),
    "no clip": (
        {"clip_exp": None},
        [0.9669992923736572, -2.04237699508667, 0.5940349102020264],
        [0.1300075054, 0.4112696946, -0.3403491080], V3,
        [0.8687665462493896, -2.113204002380371, 0.767271876335144],
        [0.4653654992580414, 0.3880937099456787, -1.4510084390640259],
        [1.0016248226165771, 4.005305290222168, 0.25450125336647034],
    ),
    "L2": (
        {"weight_decay": 0.1},
        [0.9846450090408325, -2.013028144836426, 0.5064036846160889],
        [0.0535502769, 0.1280084550, 0.0359629989], [1.2102150917, 4.8451166153, 0.3034201264],
        [0.9472091197967529, -2.032717227935791, 0.5100623369216919],
        [0.18199151754379272, 0.13625970482826233, -0.10083919763565063],
        [1.2116535902023315, 4.844615459442139, 0.30690279603004456],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TIMM.values(), ids=TIMM)
def test_timms_state_dict_goes_on_as_timm_does(case):
    """The printed fixtures have 10 digits; fp32 has 7.2."""
    options, theta, m, v, *expected = case
    state_dict = {
        "state": {0: {"step": torch.tensor(3.0), **tensors(exp_avg=m, exp_avg_sq=v)}},
        "param_groups": [{**TIMM_GROUP, **options}],
    }
    before = copy.deepcopy(state_dict)
    *got, optimizer = goes_on(state_dict, theta, lr=9.0)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, torch.tensor(theirs), rtol=5e-7, atol=0)
    group = optimizer.param_groups[0]
    exponent = options.get("clip_exp", 0.333)
    assert clip_to_data(group["clip_lambda"]) == (None if exponent is None else {"exponent": exponent, "scale": 1.0})
    assert group["decouple"] == options.get("decoupled", False)
    assert not {"clip_exp", "decoupled", "caution", "corrected_weight_decay", "max_lr_snapshot"} & set(group)
    assert state_dict["param_groups"] == before["param_groups"]  # the input is not changed


# Printed by pytorch_optimizer 4.1.0's `ADOPT` in the same way. Its clip bound runs one step ahead of everybody's.
KOZISTR_GROUP = {
    "lr": 0.1, "betas": (0.9, 0.9999), "weight_decay": 0.0, "weight_decouple": False, "fixed_decay": False,
    "foreach": None, "eps": 1e-06, "step": 3, "params": [0, 1],
}  # fmt: skip
KOZISTR = {
    "default": (
        {},
        [0.9824042916297913, -2.015535831451416, 0.5094342231750488],
        [0.0570361353, 0.1428574026, 0.0245787650], V3,
        [0.9457710981369019, -2.040464401245117, 0.515443742275238],
        [0.1735784113407135, 0.1706797331571579, -0.10716870427131653],
        [1.0016248226165771, 4.005305290222168, 0.25450125336647034],
    ),
    "decoupled": (
        {"weight_decay": 0.1, "weight_decouple": True},
        [0.9528222680091858, -1.9561213254928589, 0.49446478486061096],
        [0.0570361353, 0.1428574026, 0.0245787650], V3,
        [0.8974207043647766, -1.9420446157455444, 0.490681529045105],
        [0.1735784113407135, 0.1706797331571579, -0.10716870427131653],
        [1.0016248226165771, 4.005305290222168, 0.25450125336647034],
    ),
    "L2": (
        {"weight_decay": 0.1},
        [0.9810517430305481, -2.013592481613159, 0.5094342231750488],
        [0.0705617145, 0.1336528510, 0.0245787650], [1.2102150917, 4.8451166153, 0.3034201860],
        [0.9412339925765991, -2.034245729446411, 0.5141159296035767],
        [0.19325101375579834, 0.14082448184490204, -0.10087902843952179],
        [1.211653232574463, 4.844615459442139, 0.30690237879753113],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", KOZISTR.values(), ids=KOZISTR)
def test_pytorch_optimizers_state_dict_goes_on_as_it_does_with_its_clip_index(case):
    options, theta, m, v, *expected = case
    state_dict = {"state": {0: tensors(exp_avg=m, exp_avg_sq=v)}, "param_groups": [{**KOZISTR_GROUP, **options}]}
    *got, optimizer = goes_on(state_dict, theta, lr=9.0, clip_lambda=lambda step: (step + 1) ** 0.25)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, torch.tensor(theirs), rtol=5e-7, atol=0)
    group = optimizer.param_groups[0]
    assert group["decouple"] == options.get("weight_decouple", False)
    assert not {"step", "weight_decouple", "fixed_decay"} & set(group)
    q = group["params"][1]
    q.grad = torch.ones(1)  # no state of its own in the dict: it starts now, whatever the group's step is
    optimizer.step()
    assert optimizer.state[q]["step"] == 1
    assert q.item() == 3.0


@pytest.mark.parametrize(
    ("group", "named"),
    [
        ({**TIMM_GROUP, "caution": True}, "caution"),
        ({**TIMM_GROUP, "corrected_weight_decay": True, "decoupled": True, "weight_decay": 0.1}, "corrected_weight"),
        ({**KOZISTR_GROUP, "cautious": True}, "cautious"),
        ({**KOZISTR_GROUP, "stable_adamw": True}, "stable_adamw"),
        ({**KOZISTR_GROUP, "fixed_decay": True, "weight_decouple": True, "weight_decay": 0.1}, "fixed_decay"),
        ({k: v for k, v in KOZISTR_GROUP.items() if k != "step"}, "'step'"),
    ],
)
def test_what_cannot_be_carried_over_is_refused(group, named):
    state_dict = {"state": {0: tensors(step=3.0, exp_avg=M3, exp_avg_sq=V3)}, "param_groups": [group]}
    optimizer = ADOPT([param(3), param(1)])
    with pytest.raises(ValueError, match=named):
        optimizer.load_state_dict(state_dict)
    assert not optimizer.state


@pytest.mark.parametrize(
    "group",
    [
        {**TIMM_GROUP, "corrected_weight_decay": True, "decoupled": True},
        {**TIMM_GROUP, "corrected_weight_decay": True, "weight_decay": 0.1},
        {**KOZISTR_GROUP, "fixed_decay": True, "weight_decouple": True},
        {**KOZISTR_GROUP, "cautious": False},
    ],
)
def test_options_that_had_no_effect_do_not_stand_in_the_way(group):
    state_dict = {"state": {0: tensors(step=3.0, exp_avg=M3, exp_avg_sq=V3)}, "param_groups": [group]}
    ADOPT([param(3), param(1)]).load_state_dict(state_dict)


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
def test_adams_state_dict_is_refused_with_the_way_to_go(cls):
    p = param(3)
    adam = cls([p])
    steps(adam, [p], 2)
    with pytest.raises(ValueError, match="from_adamw"):
        ADOPT([p]).load_state_dict(adam.state_dict())
