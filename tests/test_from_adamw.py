"""Coming from AdamW: ADOPT goes on where a torch Adam or AdamW stands."""

from __future__ import annotations

import copy

import pytest
import torch
from adopt_cases import same_bits
from torch import nn
from torch.optim import Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR

from sharded_adopt import ADOPT, ADOPTW, PowerClip, ShardedADOPT


def model_of(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def groups_of(model: nn.Module) -> list[dict]:
    named = list(model.named_parameters())
    return [
        {"params": [one for one in named if one[1].ndim >= 2]},
        {"params": [one for one in named if one[1].ndim < 2], "weight_decay": 0.0, "lr": 0.02},
    ]


def gradient(model: nn.Module, step: int) -> None:
    random = torch.Generator().manual_seed(100 + step)
    for param in model.parameters():
        dtype = torch.complex64 if param.is_complex() else torch.float32
        grad = torch.randn(param.shape, generator=random, dtype=dtype)
        param.grad = (grad * (1.0 + step)).to(param.dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        gradient(model, step)
        optimizer.step()


def trained(adam=AdamW, steps: int = 7, dtype=torch.float32, **options):
    model = model_of(dtype)
    optimizer = adam(groups_of(model), lr=0.01, **options)
    train(model, optimizer, range(steps))
    return model, optimizer


@pytest.mark.parametrize("adam", [Adam, AdamW])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True, "betas": (0.8, 0.97), "eps": 1e-3}])
def test_state_is_that_of_adam_without_its_bias(adam, options) -> None:
    model, optimizer = trained(adam, **options)
    ours = ADOPT.from_adamw(optimizer)
    beta1, beta2 = optimizer.defaults["betas"]
    for param in model.parameters():
        theirs, mine = optimizer.state[param], ours.state[param]
        v = theirs["max_exp_avg_sq" if options.get("amsgrad") else "exp_avg_sq"].double() / (1 - beta2**7)
        m = theirs["exp_avg"].double() / (1 - beta1**7)
        torch.testing.assert_close(mine["exp_avg_sq"].double(), v, rtol=1e-6, atol=0)
        torch.testing.assert_close(
            mine["exp_avg"].double(), m / (v.sqrt() + optimizer.defaults["eps"]), rtol=1e-6, atol=0
        )
        assert mine["step"] == 7
        assert mine["step"].dtype is torch.float32


@pytest.mark.parametrize("adam", [Adam, AdamW])
@pytest.mark.parametrize("maximize", [False, True])
def test_the_step_after_the_switch_is_the_one_that_adam_would_have_taken(adam, maximize) -> None:
    # A gradient whose square is v̂ leaves v̂ as it is: that ADOPT divides by the one of the step before is no difference.
    model, optimizer = trained(adam, steps=200, weight_decay=0.1, maximize=maximize)
    for group in optimizer.param_groups:
        for param in group["params"]:
            root = (optimizer.state[param]["exp_avg_sq"] / (1 - 0.999**200)).sqrt()
            coupled = 0.0 if group["decoupled_weight_decay"] else group["weight_decay"]
            param.grad = -root if maximize else root
            param.grad -= coupled * param.detach() * (-1.0 if maximize else 1.0)
    other_model, other = copy.deepcopy((model, optimizer))
    for param, copied in zip(model.parameters(), other_model.parameters(), strict=True):
        copied.grad = param.grad.clone()
    before = [param.detach().clone() for param in model.parameters()]
    ADOPT.from_adamw(optimizer).step()
    other.step()
    for old, mine, theirs in zip(before, model.parameters(), other_model.parameters(), strict=True):
        assert (theirs - old).abs().mean() > 1e-3
        torch.testing.assert_close(mine - old, theirs - old, rtol=1e-4, atol=1e-6)  # one parameter is about 1


def test_live_adam_is_only_read() -> None:
    model, optimizer = trained()
    before, params = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in model.parameters()]
    ours = ADOPT.from_adamw(optimizer)
    ours.param_groups[0]["lr"] = 7.0
    ours.state[model[0].weight]["exp_avg"].zero_()
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for key, entries in before["state"].items():
        assert all(same_bits(value, after["state"][key][name]) for name, value in entries.items())
    assert all(same_bits(a, b) for a, b in zip(params, model.parameters(), strict=True))


def test_groups_go_on_with_their_names_and_values() -> None:
    _, optimizer = trained(weight_decay=0.3, maximize=True, betas=(0.8, 0.95), eps=1e-7)
    ours = ADOPT.from_adamw(optimizer)
    assert type(ours) is ADOPT
    for mine, theirs in zip(ours.param_groups, optimizer.param_groups, strict=True):
        assert [id(p) for p in mine["params"]] == [id(p) for p in theirs["params"]]
        for key in ("param_names", "lr", "betas", "eps", "weight_decay", "maximize"):
            assert mine[key] == theirs[key], key
        assert mine["decouple"] is True
        assert mine["clip_lambda"] == PowerClip(0.25)
        assert not {"amsgrad", "decoupled_weight_decay"} & set(mine)
    assert [group["weight_decay"] for group in ours.param_groups] == [0.3, 0.0]
    assert [group["lr"] for group in ours.param_groups] == [0.01, 0.02]
    added = nn.Parameter(torch.zeros(2))
    ours.add_param_group({"params": [("added", added)]})  # by Adam's defaults, as Adam would have
    assert ours.param_groups[2]["betas"] == (0.8, 0.95)
    assert ours.param_groups[2]["weight_decay"] == 0.3


def test_l2_of_adam_stays_in_the_gradient() -> None:
    _, optimizer = trained(Adam, weight_decay=0.1)
    assert [group["decouple"] for group in ADOPT.from_adamw(optimizer).param_groups] == [False, False]
    ours = ADOPTW.from_adamw(optimizer)
    assert type(ours) is ADOPTW
    assert [group["decouple"] for group in ours.param_groups] == [False, False]
    turned = ADOPTW.from_adamw(optimizer, decouple=True)
    assert [group["decouple"] for group in turned.param_groups] == [True, True]


def test_overrides_win_in_every_group() -> None:
    _, optimizer = trained()
    ours = ADOPT.from_adamw(
        optimizer, lr=0.5, betas=(0.5, 0.9999), clip_lambda=None, init="element", nesterov=True, eps=1e-6
    )
    for group in [*ours.param_groups, ours.defaults]:
        assert group["lr"] == 0.5
        assert group["betas"] == (0.5, 0.9999)
        assert group["clip_lambda"] is None
        assert (group["init"], group["nesterov"], group["eps"]) == ("element", True, 1e-6)


def test_a_wrong_override_is_named() -> None:
    _, optimizer = trained()
    with pytest.raises(ValueError, match="betas"):
        ADOPT.from_adamw(optimizer, betas=(0.9, 1.5))
    with pytest.raises(TypeError, match="learning_rate"):
        ADOPT.from_adamw(optimizer, learning_rate=0.1)


def test_each_parameter_keeps_its_own_step_and_one_without_state_starts_afresh() -> None:
    late, never, early = (nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = AdamW([late, never, early], lr=0.1)
    for step in range(4):
        early.grad = torch.full((3,), 1.0 + step)
        late.grad = torch.ones(3) if step == 3 else None
        optimizer.step()
    ours = ADOPT.from_adamw(optimizer)
    assert [float(ours.state[p]["step"]) for p in (late, early)] == [1, 4]
    assert never not in ours.state
    assert torch.equal(ours.state[late]["exp_avg_sq"], torch.ones(3))  # v̂ of one step is its g²
    for param in (late, never, early):
        param.grad = torch.ones(3)
    ours.step()
    assert torch.equal(never, torch.ones(3))  # its first gradient only initialises v
    assert torch.equal(ours.state[never]["exp_avg_sq"], torch.ones(3))
    assert [float(ours.state[p]["step"]) for p in (late, never, early)] == [2, 1, 5]


def test_a_zero_gradient_right_after_the_switch_is_a_step_and_no_dummy() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = AdamW([param], lr=0.1, weight_decay=0.0)
    param.grad = torch.ones(3)
    optimizer.step()
    ours = ADOPT.from_adamw(optimizer)
    param.grad = torch.zeros(3)
    before = param.detach().clone()
    ours.step()
    assert ours.state[param]["step"] == 2
    assert torch.allclose(param, before - 0.1 * 0.9)  # momentum goes on


def test_from_a_state_dict_equals_from_the_live_optimizer(tmp_path) -> None:
    model, optimizer = trained(amsgrad=True, weight_decay=0.1)
    torch.save(optimizer.state_dict(), tmp_path / "adamw.pt")
    loaded = torch.load(tmp_path / "adamw.pt", weights_only=True)
    for params in (groups_of(model), [{"params": [p for _, p in group["params"]]} for group in groups_of(model)]):
        ours, live = ADOPT.from_adamw(loaded, params=params), ADOPT.from_adamw(optimizer)
        for mine, theirs in zip(ours.param_groups, live.param_groups, strict=True):
            assert mine == theirs
        assert ours.defaults == live.defaults
        for param in model.parameters():
            assert all(same_bits(v, live.state[param][k]) for k, v in ours.state[param].items())
    one_group = AdamW(model.parameters())
    gradient(model, 0)
    one_group.step()
    assert ADOPT.from_adamw(one_group.state_dict(), params=model.parameters()).state[model[0].bias]["step"] == 1


def test_a_state_dict_keyed_by_names_is_read_by_position() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, optimizer = trained()
    by_name = get_optimizer_state_dict(model, optimizer)
    ours, live = ADOPT.from_adamw(by_name, params=groups_of(model)), ADOPT.from_adamw(optimizer)
    for param in model.parameters():
        assert all(same_bits(v, live.state[param][k]) for k, v in ours.state[param].items())


def other_optimizers():
    param = nn.Parameter(torch.ones(2))
    return {
        "SGD": torch.optim.SGD([param], lr=0.1),
        "NAdam": torch.optim.NAdam([param]),
        "RAdam": torch.optim.RAdam([param]),
        "ADOPT": ADOPT([param]),
        "model": nn.Linear(1, 1),
    }


@pytest.mark.parametrize("name", other_optimizers())
def test_anything_but_adam_is_refused_by_its_name(name) -> None:
    source = other_optimizers()[name]
    with pytest.raises(TypeError, match=type(source).__name__):
        ADOPT.from_adamw(source)
    if isinstance(source, torch.optim.Optimizer):
        with pytest.raises(ValueError, match="not the state dict of a torch Adam or AdamW"):
            ADOPT.from_adamw(source.state_dict(), params=[torch.ones(2, requires_grad=True)])


def test_a_state_dict_that_does_not_fit_says_what_does_not() -> None:
    model, optimizer = trained(weight_decay=0.1)
    groups, state_dict = groups_of(model), optimizer.state_dict()
    with pytest.raises(ValueError, match="params="):
        ADOPT.from_adamw(state_dict)
    with pytest.raises(ValueError, match="leave them out"):
        ADOPT.from_adamw(optimizer, params=groups)
    with pytest.raises(ValueError, match=r"\[2, 2\] parameters, params has \[4\]"):
        ADOPT.from_adamw(state_dict, params=model.parameters())
    with pytest.raises(ValueError, match=r"params holds '2.weight' where the state dict holds '0.weight'"):
        ADOPT.from_adamw(state_dict, params=[{"params": groups[0]["params"][::-1]}, groups[1]])
    with pytest.raises(ValueError, match="expected 'exp_avg' in its shape"):
        ADOPT.from_adamw(
            state_dict,
            params=[{"params": [p for _, p in groups[0]["params"]][::-1]}, {"params": [torch.ones(6), torch.ones(3)]}],
        )
    with pytest.raises(ValueError, match="'state' and 'param_groups'"):
        ADOPT.from_adamw({}, params=groups)
    with pytest.raises(TypeError, match="got one tensor"):
        ADOPT.from_adamw(state_dict, params=torch.ones(1))


def test_an_old_state_dict_that_does_not_say_how_it_decays_must_be_told() -> None:
    model, optimizer = trained(weight_decay=0.1)
    state_dict = optimizer.state_dict()
    for group in state_dict["param_groups"]:
        del group["decoupled_weight_decay"]
    with pytest.raises(ValueError, match="decouple=True"):
        ADOPT.from_adamw(state_dict, params=groups_of(model))
    for decouple in (True, False):
        ours = ADOPT.from_adamw(state_dict, params=groups_of(model), decouple=decouple)
        assert [group["decouple"] for group in ours.param_groups] == [decouple] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_state_has_the_dtype_that_adopt_would_have_made(dtype) -> None:
    param = nn.Parameter(torch.ones(5, dtype=dtype))
    optimizer = AdamW([param], lr=0.1, foreach=False)
    for step in range(3):
        param.grad = torch.linspace(0.5, 2.0 + step, 5).to(dtype) * (1 + 2j if dtype.is_complex else 1)
        optimizer.step()
    ours = ADOPT.from_adamw(optimizer)
    fresh = ADOPT([param])
    fresh.init_state(param)
    for key, value in fresh.state[param].items():
        assert (ours.state[param][key].dtype, ours.state[param][key].shape) == (value.dtype, value.shape)
    theirs = optimizer.state[param]
    wide = torch.complex128 if dtype.is_complex else torch.float64
    m, v = (theirs[key].to(wide) for key in ("exp_avg", "exp_avg_sq"))
    if dtype.is_complex:  # each part has a v of its own
        m, v = torch.view_as_real(m), torch.view_as_real(v)
    expected = (m / (1 - 0.9**3)) / ((v / (1 - 0.999**3)).sqrt() + 1e-8)
    mine = ours.state[param]["exp_avg"].to(wide)
    torch.testing.assert_close(torch.view_as_real(mine) if dtype.is_complex else mine, expected, rtol=1e-6, atol=1e-7)
    ours.step()


def test_a_16_bit_exp_avg_sq_is_rounded_stochastically() -> None:
    param = nn.Parameter(torch.ones(4096))
    optimizer = AdamW([param])
    param.grad = torch.full((4096,), 1.001)
    optimizer.step()
    ours = ADOPT.from_adamw(optimizer, state_dtype=torch.bfloat16)
    values = ours.state[param]["exp_avg_sq"].double()
    assert len(values.unique()) == 2  # to nearest all would be 1
    assert values.mean().item() == pytest.approx(1.001**2, rel=5e-4)


def test_a_schedule_goes_on_with_a_new_scheduler() -> None:
    def factor(step: int) -> float:
        return 1 / (1 + step)

    model = model_of()
    optimizer = AdamW(groups_of(model), lr=0.01)
    scheduler = LambdaLR(optimizer, factor)
    for step in range(5):
        train(model, optimizer, range(step, step + 1))
        scheduler.step()
    ours = ADOPT.from_adamw(optimizer)
    ours_scheduler = LambdaLR(ours, factor, last_epoch=scheduler.last_epoch - 1)
    assert ours_scheduler.get_last_lr() == scheduler.get_last_lr()
    train(model, ours, range(1))
    ours_scheduler.step()
    assert ours_scheduler.get_last_lr() == pytest.approx([0.01 / 7, 0.02 / 7])
    # with a learning rate of one's own, a new scheduler starts there
    assert LambdaLR(ADOPT.from_adamw(optimizer, lr=0.4), factor).get_last_lr() == [0.4, 0.4]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("adam", [Adam, AdamW])
def test_a_group_added_after_a_state_dict_is_as_one_added_to_adam(adam, sharded) -> None:
    model, optimizer = trained(adam, weight_decay=0.3, betas=(0.8, 0.95), eps=1e-7, maximize=True)
    scheduler = LambdaLR(optimizer, lambda step: 0.5)
    train(model, optimizer, range(1))
    scheduler.step()
    made = (ShardedADOPT if sharded else ADOPT).from_adamw(optimizer.state_dict(), params=groups_of(model))
    for each in (made, optimizer):
        each.add_param_group({"params": [("added", nn.Parameter(torch.zeros(2)))]})
    mine, theirs = made.param_groups[2], optimizer.param_groups[2]
    assert theirs["lr"] == 0.01, "not what the scheduler made of it"
    for key in ("lr", "betas", "eps", "weight_decay", "maximize"):
        assert mine[key] == theirs[key], key
    assert mine["decouple"] is theirs["decoupled_weight_decay"]
    over = ADOPT.from_adamw(
        optimizer.state_dict(), params=[{"params": g["params"]} for g in optimizer.param_groups], lr=0.5
    )
    assert over.defaults["lr"] == 0.5


@pytest.mark.parametrize("lr", [0.4, torch.tensor(0.4)], ids=["float", "tensor"])
def test_a_schedule_goes_on_from_a_learning_rate_of_ones_own(lr) -> None:
    model, optimizer = trained()
    LambdaLR(optimizer, lambda step: 1 / (1 + step))
    ours = ADOPT.from_adamw(optimizer, lr=lr)
    scheduler = LambdaLR(ours, lambda step: 1 / (1 + step), last_epoch=6)
    assert [float(each) for each in scheduler.get_last_lr()] == pytest.approx([0.4 / 8] * 2)
    never_scheduled = ADOPT.from_adamw(AdamW(model.parameters()), lr=0.4)
    assert "initial_lr" not in never_scheduled.param_groups[0]


def test_a_tensor_lr_is_carried_as_a_copy() -> None:
    model = model_of()
    lr = torch.tensor(0.01)
    optimizer = AdamW(model.parameters(), lr=lr)
    train(model, optimizer, range(2))
    ours = ADOPT.from_adamw(optimizer)
    lr.fill_(9.0)
    assert isinstance(ours.param_groups[0]["lr"], torch.Tensor)
    assert ours.param_groups[0]["lr"].item() == pytest.approx(0.01)
    train(model, ours, range(2, 3))


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_any_kernel_of_adam_can_be_left(options) -> None:
    model, optimizer = trained(**options)
    plain_model, plain = trained()
    ours, expected = ADOPT.from_adamw(optimizer), ADOPT.from_adamw(plain)
    for param, other in zip(model.parameters(), plain_model.parameters(), strict=True):
        for key, value in ours.state[param].items():
            torch.testing.assert_close(
                value, expected.state[other][key], rtol=1e-5, atol=1e-6
            )  # fused rounds otherwise
    train(model, ours, range(7, 9))


def test_flags_that_change_what_a_step_may_do_follow() -> None:
    ours = ADOPT.from_adamw(AdamW([nn.Parameter(torch.ones(2))], capturable=True, differentiable=True))
    assert (ours.param_groups[0]["capturable"], ours.param_groups[0]["differentiable"]) == (True, True)


def test_the_optimizer_saves_loads_and_copies_as_any_other() -> None:
    model, optimizer = trained()
    ours = ADOPT.from_adamw(optimizer)
    again = ADOPT(groups_of(model))
    again.load_state_dict(ours.state_dict())
    assert again.param_groups[0]["betas"] == (0.9, 0.999)
    other_model, other = copy.deepcopy((model, ours))
    train(model, ours, range(7, 10))
    train(other_model, other, range(7, 10))
    for a, b in zip(model.parameters(), other_model.parameters(), strict=True):
        assert same_bits(a, b)


def test_an_adam_that_never_stepped_gives_a_fresh_adopt() -> None:
    model = model_of()
    ours = ADOPT.from_adamw(AdamW(groups_of(model), lr=0.01, weight_decay=0.1))
    other_model = model_of()
    fresh = ADOPTW(groups_of(other_model), lr=0.01, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8)
    train(model, ours, range(4))
    train(other_model, fresh, range(4))
    for a, b in zip(model.parameters(), other_model.parameters(), strict=True):
        assert same_bits(a, b)
