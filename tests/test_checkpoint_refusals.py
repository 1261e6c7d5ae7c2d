"""What does not fit is refused in full, on every rank, with nothing changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointing import PlainOptimizer, Spec, state_hash
from ranks import run_ranks
from torch import nn

from sharded_adopt import ADOPT, ADOPTW, ShardedADOPT, ShardedOptimizer, checkpoint
from sharded_adopt.checkpoint import CheckpointMismatch, CheckpointNotFound, CheckpointWriteError
from sharded_adopt.checkpoint.contents import rule_name

STORED = (Spec("a", (3, 5)), Spec("b", (7,)), Spec("c", (2, 2), group=1), Spec("d", (4,)))
OTHER = (
    Spec("a", (5, 3)),
    Spec("b", (7,), torch.float64),
    Spec("e", (2,)),
    Spec("c", (2, 2), torch.bfloat16, group=1),
    Spec("f", ()),
)


class Rest(nn.Module):
    """A model whose every entry is beside the optimizer."""

    def __init__(self, **buffers: torch.Tensor) -> None:
        super().__init__()
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)


def _save(rank: int, world_size: int, root: Path, options: dict[str, Any]) -> None:
    checkpoint.save(root, step=1, optimizer=PlainOptimizer(STORED, seed=1), **options)


def _mismatch(rank: int, world_size: int, root: Path) -> tuple[str, list[str], list[str], list[str]]:
    optimizer = PlainOptimizer(OTHER, seed=2)
    model = Rest(mean=torch.zeros(4), count=torch.zeros((), dtype=torch.int32), extra=torch.zeros(1))
    before = state_hash(optimizer, model)
    heard = []
    for strict in (True, False):
        with pytest.raises(CheckpointMismatch) as caught:
            checkpoint.load(root, optimizer=optimizer, model=model, strict=strict)
        error = caught.value
        heard.append((str(error), error.missing, error.unexpected, error.misshapen))
    assert state_hash(optimizer, model) == before
    assert optimizer.loads == 0
    assert heard[0][1:] == heard[1][1:]
    return heard[0]


def test_one_error_lists_every_missing_unexpected_and_misshapen_name_and_changes_nothing(tmp_path: Path) -> None:
    # T21
    model = Rest(mean=torch.ones(3), count=torch.ones((), dtype=torch.int64), gone=torch.ones(2))
    run_ranks(2, _save, tmp_path, {"model": model})
    heard = run_ranks(2, _mismatch, tmp_path)
    assert heard[0] == heard[1]
    text, missing, unexpected, misshapen = heard[0]
    assert missing == ["e", "f", "extra"]
    assert unexpected == ["d", "gone"]
    assert misshapen == [
        "a: float32 [3, 5] in the checkpoint, float32 [5, 3] here",
        "b: float32 [7] in the checkpoint, float64 [7] here",
        "c: float32 [2, 2] in the checkpoint, bfloat16 [2, 2] here",
        "count: int64 [] in the checkpoint, int32 [] here",
        "mean: float32 [3] in the checkpoint, float32 [4] here",
    ]
    assert all(line in text for line in (*missing, *unexpected, *misshapen))
    assert "gone (beside the optimizer)" in text


def test_not_strict_loads_the_names_that_both_have_and_returns_the_rest(tmp_path: Path) -> None:
    kept = Rest(mean=torch.ones(3), gone=torch.ones(2))
    checkpoint.save(tmp_path, step=1, optimizer=PlainOptimizer(STORED, seed=1), model=kept)
    optimizer = PlainOptimizer((Spec("e", (2,), group=2), STORED[1], STORED[2]), seed=2, lr=3.0)
    model = Rest(mean=torch.zeros(3), extra=torch.zeros(1))
    own = optimizer.local_shards()["e"]
    with pytest.raises(CheckpointMismatch, match="strict=False loads the names that both have"):
        checkpoint.load(tmp_path, optimizer=optimizer, model=model)
    loaded = checkpoint.load(tmp_path, optimizer=optimizer, model=model, strict=False)
    assert loaded.missing == ["e", "extra"]
    assert loaded.unexpected == ["a", "d", "gone"]
    twin = PlainOptimizer(STORED, seed=1)
    for name in ("b", "c"):
        assert torch.equal(optimizer.live[name]["param"], twin.live[name]["param"])
    assert torch.equal(optimizer.live["e"]["param"], own["param"])
    assert torch.equal(model.mean, torch.ones(3))
    # The groups that have something in the checkpoint take its values, the other keeps its own.
    assert [group["lr"] for group in optimizer.groups] == [0.5, 0.25, 1.0]


def test_groups_may_come_in_another_order_or_be_split_but_not_merged_across_values(tmp_path: Path) -> None:
    # T21
    checkpoint.save(tmp_path, step=1, optimizer=PlainOptimizer(STORED, seed=1, lr=0.5))

    def regrouped(*groups: int) -> PlainOptimizer:
        specs = [Spec(s.name, s.shape, s.dtype, (), group) for s, group in zip(STORED, groups, strict=True)]
        return PlainOptimizer(tuple(specs), seed=2, lr=7.0)

    for groups, rates in (((1, 1, 0, 1), [0.25, 0.5]), ((0, 1, 2, 3), [0.5, 0.5, 0.25, 0.5])):
        optimizer = regrouped(*groups)
        checkpoint.load(tmp_path, optimizer=optimizer)
        assert [group["lr"] for group in optimizer.groups] == rates
        assert optimizer.groups[groups[2]]["params"] == ["c"]
    optimizer = regrouped(0, 0, 0, 0)
    with pytest.raises(CheckpointMismatch, match="group 0: its parameters are of groups with different lr"):
        checkpoint.load(tmp_path, optimizer=optimizer)
    assert optimizer.loads == 0


def test_a_hyperparameter_of_another_kind_is_refused(tmp_path: Path) -> None:
    optimizer = PlainOptimizer(STORED)
    checkpoint.save(tmp_path, step=1, optimizer=optimizer)
    for key, value in (("betas", [0.9, 0.99, 0.999]), ("lr", "fast"), ("betas", 0.9)):
        other = PlainOptimizer(STORED)
        other.groups[1][key] = value
        with pytest.raises(CheckpointMismatch, match=f"group 1: {key} is"):
            checkpoint.load(tmp_path, optimizer=other)
    optimizer.groups[0]["lr"] = 0.0
    checkpoint.save(tmp_path / "zero", step=1, optimizer=optimizer)
    other = PlainOptimizer(STORED)
    with pytest.raises(CheckpointMismatch, match="the hyperparameters in the checkpoint: lr must be positive here"):
        checkpoint.load(tmp_path / "zero", optimizer=other)
    assert other.loads == 0
    # A tensor for a number, a schedule for none: the values of a checkpoint win.
    other = PlainOptimizer(STORED)
    other.groups[1]["lr"], other.groups[0]["clip_lambda"] = {"tensor": 1.0, "dtype": "float32"}, None
    checkpoint.load(tmp_path, optimizer=other)
    assert other.groups[1]["lr"] == 0.25
    assert other.groups[0]["clip_lambda"] == {"exponent": 0.25, "scale": 1.0}


def test_state_of_another_kind_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, step=1, optimizer=PlainOptimizer(STORED, states=("exp_avg",)))
    for states, scalars, text in (
        (("momentum",), None, "a: state exp_avg, step in the checkpoint, momentum, step here"),
        (("exp_avg",), {"step": torch.tensor(1)}, "a: step is float32 in the checkpoint, int64 here"),
    ):
        other = PlainOptimizer(STORED, states=states, scalars=scalars)
        before = state_hash(other)
        with pytest.raises(CheckpointMismatch) as caught:
            checkpoint.load(tmp_path, optimizer=other)
        assert text in caught.value.misshapen
        assert state_hash(other) == before


@pytest.mark.parametrize("saved_with", [True, False])
def test_a_model_on_one_side_only_is_no_silent_loss(tmp_path: Path, saved_with: bool) -> None:
    model = Rest(mean=torch.ones(3))
    checkpoint.save(tmp_path, step=1, optimizer=PlainOptimizer(STORED), model=model if saved_with else None)
    with pytest.raises(CheckpointMismatch, match="mean"):
        checkpoint.load(tmp_path, optimizer=PlainOptimizer(STORED), model=None if saved_with else model)


class Adam(torch.optim.AdamW):
    pass


def test_the_state_of_one_rule_is_not_loaded_into_another(tmp_path: Path) -> None:
    """ADOPT and AdamW name their state alike and mean different things."""
    model = nn.Linear(3, 2)
    adopt = ShardedADOPT(model.named_parameters())
    checkpoint.save(tmp_path, step=1, optimizer=adopt)
    adamw = ShardedOptimizer(nn.Linear(3, 2).named_parameters(), torch.optim.AdamW)
    with pytest.raises(CheckpointMismatch, match="state of ADOPT in the checkpoint, Adam here"):
        checkpoint.load(tmp_path, optimizer=adamw)
    checkpoint.load(tmp_path, optimizer=ShardedOptimizer(nn.Linear(3, 2).named_parameters(), ADOPTW))


@pytest.mark.parametrize(
    ("cls", "name"), [(ADOPT, "ADOPT"), (ADOPTW, "ADOPT"), (Adam, "Adam"), (torch.optim.SGD, "SGD"), (None, None)]
)
def test_a_rule_is_named_by_its_first_class(cls: Any, name: str | None) -> None:
    optimizer = PlainOptimizer(STORED)
    if cls is not None:
        optimizer.optimizer_class = cls  # type: ignore[attr-defined]
    assert rule_name(optimizer) == name


def test_no_checkpoint_is_not_found_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other" / "notes").mkdir(parents=True)
    for name in ("empty", "other", "missing", "ckpt-00000001-step-000000000001"):
        assert run_ranks(2, _not_found, tmp_path / name) == ["CheckpointNotFound"] * 2
        assert checkpoint.committed(tmp_path / name) == []
        assert checkpoint.latest(tmp_path / name) is None
        for use in (checkpoint.inspect, checkpoint.verify):
            with pytest.raises(CheckpointNotFound):
                use(tmp_path / name)


def _not_found(rank: int, world_size: int, root: Path) -> str:
    optimizer = PlainOptimizer(STORED)
    with pytest.raises(CheckpointNotFound) as caught:
        checkpoint.load(root, optimizer=optimizer)
    assert optimizer.loads == 0
    return type(caught.value).__name__


BAD_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"step": -1}, ValueError, "step must be"),
    ({"step": True}, ValueError, "step must be"),
    ({"step": 1.5}, TypeError, "float"),
    ({"checksum": "md5"}, ValueError, "checksum must be one of crc32, sha256, got 'md5'"),
    ({"keep": 3}, TypeError, "keep must be a checkpoint.Keep or None, got int"),
    ({"extra": {"a": [1, {2.5: 3}]}}, TypeError, r"extra\['a'\]\[1\] has the key 2.5"),
    ({"extra": {True: 3}}, TypeError, "extra has the key True, a bool"),
    ({"extra": {"t": torch.ones(2)}}, TypeError, r"extra\['t'\] is a torch.Tensor"),
    ({"extra": {1, 2}}, TypeError, "extra is a builtins.set"),
    ({"extra": b"bytes"}, TypeError, "extra is a builtins.bytes"),
    ({"extra": {"$float": 1}}, ValueError, "reserved"),
    ({"extra": {"$pairs": []}}, ValueError, "reserved"),
    ({"model": Rest(mean=torch.zeros(3, device="meta"))}, TypeError, "'mean' has no values yet"),
    ({"model": Rest(mean=torch.eye(3).to_sparse())}, TypeError, "'mean' is a Tensor of layout torch.sparse_coo"),
    ({"model": Rest(mean=torch.zeros(3, dtype=torch.float8_e5m2fnuz))}, TypeError, "cannot be stored"),
]


@pytest.mark.parametrize("number", range(len(BAD_ARGUMENTS)))
def test_wrong_arguments_raise_before_anything_is_written(tmp_path: Path, number: int) -> None:
    options, kind, text = BAD_ARGUMENTS[number]
    root = tmp_path / "root"
    with pytest.raises(kind, match=text):
        checkpoint.save(root, **{"step": 1, "optimizer": PlainOptimizer(STORED), **options})
    assert not root.exists()


def test_a_wrong_argument_on_one_rank_raises_on_all(tmp_path: Path) -> None:
    heard = run_ranks(2, _wrong_on_one, tmp_path / "root")
    assert heard[0] == heard[1] == ["ValueError: rank 1: step must be a whole number of at least 0, got -1"]
    assert not (tmp_path / "root").exists()


def _wrong_on_one(rank: int, world_size: int, root: Path) -> list[str]:
    with pytest.raises(ValueError, match="step") as caught:
        checkpoint.save(root, step=-rank, optimizer=PlainOptimizer(STORED))
    return [f"{type(caught.value).__name__}: {caught.value}"]


@pytest.mark.parametrize("what", ["step", "lr", "scalar", "dtype"])
def test_ranks_that_would_write_different_things_are_told_what_differs(tmp_path: Path, what: str) -> None:
    heard = run_ranks(2, _different, tmp_path / "root", what)
    assert heard[0] == heard[1]
    text, ranks = heard[0]
    assert ranks == [1]
    expected = {
        "step": "'step': 1 against 2",
        "lr": "'hyperparameters' 'lr': 0.5 against 0.75",
        "scalar": "'c' 'scalars' 'step' 'value': 1.0 against 2.0",
        "dtype": "'c' 'tensors' 'exp_avg': float32 against float64",
    }
    assert expected[what] in text
    assert not (tmp_path / "root").exists()


def _different(rank: int, world_size: int, root: Path, what: str) -> tuple[str, list[int]]:
    optimizer = PlainOptimizer(STORED, seed=1)
    if rank == 1 and what == "lr":
        optimizer.groups[0]["lr"] = 0.75
    elif rank == 1 and what == "scalar":
        optimizer.live["c"]["step"] += 1
    elif rank == 1 and what == "dtype":
        optimizer.live["c"]["exp_avg"] = optimizer.live["c"]["exp_avg"].double()
    with pytest.raises(CheckpointWriteError) as caught:
        checkpoint.save(root, step=1 + rank if what == "step" else 1, optimizer=optimizer)
    return str(caught.value), list(caught.value.ranks)


def test_state_that_is_neither_a_number_nor_of_the_segments_size_is_refused(tmp_path: Path) -> None:
    optimizer = PlainOptimizer(STORED)
    optimizer.live["c"]["factor"] = torch.ones(2)
    with pytest.raises(ValueError, match="the state 'factor' of parameter 'c' has shape"):
        checkpoint.save(tmp_path, step=1, optimizer=optimizer)
    del optimizer.live["c"]["factor"]
    optimizer.live["c"]["a/b"] = torch.ones(())
    with pytest.raises(ValueError, match="'a/b' of parameter 'c' cannot be stored under that name"):
        checkpoint.save(tmp_path, step=1, optimizer=optimizer)


class Stateful(nn.Module):
    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        if state == "poison":
            raise KeyError("this module takes no poison")
        self.state = state


def test_extra_state_of_modules_is_json_or_a_tensor(tmp_path: Path) -> None:
    for state in ({"a": [1, None]}, torch.arange(3.0), None):
        checkpoint.save(tmp_path, step=1, optimizer=PlainOptimizer(STORED), model=Stateful(state))
        model = Stateful(torch.zeros(3) if isinstance(state, torch.Tensor) else 0)
        checkpoint.load(tmp_path, optimizer=PlainOptimizer(STORED), model=model)
        assert torch.equal(model.state, state) if isinstance(state, torch.Tensor) else model.state == state
    with pytest.raises(TypeError, match=r"entry '_extra_state' is a builtins.object"):
        checkpoint.save(tmp_path, step=1, optimizer=PlainOptimizer(STORED), model=Stateful(object()))
    with pytest.raises(CheckpointMismatch, match="_extra_state: a tensor in the model only"):
        checkpoint.load(tmp_path, optimizer=PlainOptimizer(STORED), model=Stateful(torch.ones(1)))


def test_a_module_that_takes_no_poison_leaves_the_optimizer_alone(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, step=1, optimizer=PlainOptimizer(STORED), model=Stateful("poison"))
    optimizer = PlainOptimizer(STORED, seed=2)
    before = state_hash(optimizer)
    with pytest.raises(checkpoint.CheckpointError, match="takes no poison"):
        checkpoint.load(tmp_path, optimizer=optimizer, model=Stateful(0))
    assert state_hash(optimizer) == before


def test_what_is_not_built_says_so() -> None:
    with pytest.raises(NotImplementedError, match="AsyncSaver is not built"):
        checkpoint.AsyncSaver("root")
    with pytest.raises(NotImplementedError, match="reshard is not built"):
        checkpoint.reshard("source", "target", 2)
    with pytest.raises(NotImplementedError, match="export is not built"):
        checkpoint.export("path", "out", "torch")


def _clip(step: float) -> float:
    return step**0.5


def test_a_custom_clip_bound_must_be_there_before_anything_is_loaded(tmp_path: Path) -> None:
    """Only its name is stored. The optimizer would refuse it after the model had been written: it is asked before."""
    # T40

    def made(**options: Any) -> tuple[nn.Module, ShardedADOPT]:
        model = nn.BatchNorm1d(2)
        return model, ShardedADOPT(model.named_parameters(), **options)

    model, optimizer = made(clip_lambda=_clip)
    model(torch.arange(6.0).view(3, 2)).sum().backward()
    optimizer.step()
    checkpoint.save(tmp_path, step=1, optimizer=optimizer, model=model)
    other, plain = made()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointMismatch, match="_clip"):
        checkpoint.load(tmp_path, optimizer=plain, model=other)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())
    other, same = made(clip_lambda=_clip)
    checkpoint.load(tmp_path, optimizer=same, model=other)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in other.state_dict().items())
