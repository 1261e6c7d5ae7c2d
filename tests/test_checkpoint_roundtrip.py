"""What is saved comes back bit for bit, at any world size."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpointing import ODD, PlainOptimizer, Spec, in_memory, logical, whole
from ranks import run_ranks
from torch import nn

from sharded_adopt import ShardedADOPT, ShardedOptimizer, checkpoint

PAIRS = [(saved, loaded) for saved in range(1, 5) for loaded in range(1, 5)]


def _save_plain(rank: int, world_size: int, root: Path, seed: int, options: dict[str, Any]) -> checkpoint.Saved:
    return checkpoint.save(root, step=seed, optimizer=PlainOptimizer(seed=seed), **options)


# The same parameters, one of which lies in memory in another order.
REORDERED = tuple(
    Spec(s.name, s.shape, s.dtype, (0, 1, 2, 3) if s.name == "conv" else s.dim_order, s.group) for s in ODD
)


def _load_plain(rank: int, world_size: int, root: Path, seed: int) -> set[int | None]:
    resharded_from = set()
    for specs in (ODD, REORDERED):
        # Another layout too: one large bucket instead of many small ones.
        optimizer = PlainOptimizer(specs, seed=1, bucket_cap_nbytes=1 << 20, lr=9.0)
        loaded = checkpoint.load(root, optimizer=optimizer)
        optimizer.assert_holds(seed, ODD)
        assert float(optimizer.live["pair"]["step"]) == seed
        assert [group["lr"] for group in optimizer.groups] == [0.5, 0.25]
        assert (loaded.step, loaded.skipped, loaded.missing, loaded.unexpected) == (seed, [], [], [])
        resharded_from.add(loaded.resharded_from)
    return resharded_from


@pytest.mark.parametrize(("saved", "loaded"), PAIRS)
def test_any_world_size_loads_any_other_bit_for_bit(tmp_path: Path, saved: int, loaded: int) -> None:
    # T21
    results = run_ranks(saved, _save_plain, tmp_path, 7, {"checksum": "crc32" if saved % 2 else "sha256"})
    assert len({(one.path, one.digest, one.nbytes) for one in results}) == 1
    assert run_ranks(loaded, _load_plain, tmp_path, 7) == [{None if saved == loaded else saved}] * loaded
    assert checkpoint.verify(tmp_path) == results[0].digest


def test_reordered_memory_holds_the_same_logical_tensor() -> None:
    """The check above rests on this: the helper's two orders differ in memory and agree logically."""
    # T11
    spec, plain = ODD[6], Spec("conv", ODD[6].shape)
    elements = whole(spec, "param", 0)
    assert not torch.equal(in_memory(plain, logical(spec, elements)), elements)
    assert torch.equal(in_memory(spec, logical(spec, elements)), elements)


class Net(nn.Module):
    """Odd sizes, a tied weight, a frozen weight, buffers, and state that is no tensor."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 5)
        self.norm = nn.BatchNorm1d(5)
        self.hidden = nn.Linear(5, 5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embed.weight
        self.temperature = nn.Parameter(torch.ones(()))
        self.note: Any = {"seed": seed}

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.embed(tokens))
        return self.head(self.frozen(torch.tanh(self.hidden(hidden)))) * self.temperature

    def get_extra_state(self) -> Any:
        return self.note

    def set_extra_state(self, state: Any) -> None:
        self.note = state


def _optimizer(net: nn.Module, name: str) -> ShardedOptimizer:
    named = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    groups = [{"params": named[:2], "lr": 0.03}, {"params": named[2:], "weight_decay": 0.1}]
    if name == "adopt":
        return ShardedADOPT(groups, lr=0.05, bucket_cap_mb=1e-4)
    classes = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    options = {"adamw": {"amsgrad": True}, "sgd": {"momentum": 0.9}}
    return ShardedOptimizer(groups, classes[name], lr=0.05, bucket_cap_mb=1e-4, **options[name])


def _train(net: nn.Module, optimizer: ShardedOptimizer, scheduler: Any, rank: int, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(1000 * step + rank)
        tokens = torch.randint(11, (6,), generator=generator)
        # Draws from every generator that a checkpoint keeps.
        noise = random.random() + float(np.random.rand()) + torch.rand(()).item()
        loss = nn.functional.cross_entropy(net(tokens) + 0.01 * noise, tokens.roll(1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def _result(net: nn.Module, optimizer: ShardedOptimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    model = {name: value.clone() for name, value in net.state_dict().items() if isinstance(value, torch.Tensor)}
    return model, optimizer.full_state_dict(rank0_only=False)


def _run(rank: int, world_size: int, root: Path, name: str, stop: int | None, resume: bool) -> Any:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(rank)
    net = Net(seed=3 if not resume else 4)
    optimizer = _optimizer(net, name)
    scheduler = _scheduler(optimizer)
    first = 0
    if resume:
        pointers = {n: p.data_ptr() for n, p in net.named_parameters()}
        loaded = checkpoint.load(root, optimizer=optimizer, model=net)
        scheduler.load_state_dict(loaded.extra["scheduler"])
        first = loaded.step
        assert net.note == {"seed": 3}
        assert {n: p.data_ptr() for n, p in net.named_parameters()} == pointers
        assert net.head.weight is net.embed.weight
    _train(net, optimizer, scheduler, rank, first, 8 if stop is None else stop)
    if stop is not None:
        extra = {"scheduler": scheduler.state_dict()}
        checkpoint.save(root, step=stop, optimizer=optimizer, model=net, extra=extra)
    return _result(net, optimizer)


def _scheduler(optimizer: ShardedOptimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)


def _assert_equal(one: Any, other: Any, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            _assert_equal(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            _assert_equal(*pair, f"{where}[{index}]")
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=lambda text: f"{where}: {text}")
    else:
        assert one == other, where


@pytest.mark.parametrize("name", ["adopt", "adamw", "sgd"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_training_is_bit_equal_to_undisturbed(tmp_path: Path, world_size: int, name: str) -> None:
    undisturbed = run_ranks(world_size, _run, tmp_path, name, None, False)
    run_ranks(world_size, _run, tmp_path, name, 5, False)
    resumed = run_ranks(world_size, _run, tmp_path, name, None, True)
    _assert_equal(resumed[0], undisturbed[0])


def _load_net(rank: int, world_size: int, root: Path, name: str) -> Any:
    net = Net(seed=5)
    optimizer = _optimizer(net, name)
    checkpoint.load(root, optimizer=optimizer, model=net)
    return _result(net, optimizer)


@pytest.mark.parametrize("name", ["adopt", "adamw", "sgd"])
def test_the_sharded_optimizer_loads_at_every_world_size(tmp_path: Path, name: str) -> None:
    saved = run_ranks(3, _run, tmp_path, name, 4, False)
    for world_size in (1, 2, 4):
        for rank, (model, state) in enumerate(run_ranks(world_size, _load_net, tmp_path, name)):
            _assert_equal(model, saved[0][0])
            _assert_equal(state, saved[0][1])
            assert rank < world_size


def _save_fresh(rank: int, world_size: int, root: Path, name: str) -> Any:
    net = Net(seed=6)
    optimizer = _optimizer(net, name)
    checkpoint.save(root, step=0, optimizer=optimizer, model=net)
    return _result(net, optimizer)


@pytest.mark.parametrize("name", ["adopt", "sgd"])
def test_a_checkpoint_of_step_zero_takes_a_trained_optimizer_back(tmp_path: Path, name: str) -> None:
    """An optimizer that makes its state at its first step has none in the checkpoint, and must have none after it."""
    # T21
    fresh = run_ranks(2, _save_fresh, tmp_path, name)
    back = run_ranks(2, _train_then_load, tmp_path, name)
    _assert_equal(back[0][0], fresh[0][0])
    assert back[1][1] is True


def _train_then_load(rank: int, world_size: int, root: Path, name: str) -> Any:
    net = Net(seed=7)
    optimizer = _optimizer(net, name)
    _train(net, optimizer, _scheduler(optimizer), rank, 0, 3)
    checkpoint.load(root, optimizer=optimizer, model=net)
    states = optimizer.full_state_dict(rank0_only=False)["state"].values()
    zero = all(not torch.as_tensor(value).any() for state in states for value in state.values() if value is not None)
    return _result(net, optimizer)[0], zero


def _rng(rank: int, world_size: int, root: Path, do: str) -> list[float]:
    if do == "save":
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(100 + rank)
        random.gauss(0, 1)  # leaves a second number behind, which is part of the state
        np.random.randn()
        checkpoint.save(root, step=1, optimizer=PlainOptimizer())
    else:
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(0)
        checkpoint.load(root, optimizer=PlainOptimizer())
    return [
        random.gauss(0, 1),
        random.random(),
        float(np.random.randn()),
        float(torch.randn(())),
        float(np.random.rand()),
    ]


def test_every_rank_gets_its_own_random_numbers_back_at_the_same_world_size_only(tmp_path: Path) -> None:
    saved = run_ranks(2, _rng, tmp_path, "save")
    assert saved[0] != saved[1]
    assert run_ranks(2, _rng, tmp_path, "load") == saved
    fresh = run_ranks(3, _rng, tmp_path, "load")
    assert fresh[0] == fresh[1] == fresh[2]
    assert fresh[0] != saved[0]


def test_scalars_of_every_kind_come_back_exactly(tmp_path: Path) -> None:
    scalars = {
        "step": torch.tensor(2.0**24 + 2),
        "count": torch.tensor(-(2**63)),
        "flag": torch.tensor(True),
        "eta": torch.tensor(0.1, dtype=torch.float64),
        "half": torch.tensor(0.1, dtype=torch.bfloat16),
        "lost": torch.tensor(float("nan")),
        "far": torch.tensor(float("-inf")),
        "minus": torch.tensor(-0.0),
        "turn": torch.tensor(1 - 2j),
    }
    checkpoint.save(tmp_path, step=1, optimizer=PlainOptimizer(scalars=scalars))
    optimizer = PlainOptimizer(scalars={key: torch.zeros_like(value) for key, value in scalars.items()})
    checkpoint.load(tmp_path, optimizer=optimizer)
    for key, value in scalars.items():
        found = optimizer.live["pair"][key]
        assert (found.dtype, found.shape) == (value.dtype, value.shape)
        torch.testing.assert_close(found, value, rtol=0, atol=0, equal_nan=True)
        assert str(found) == str(value)  # the sign of zero


def test_extra_comes_back_as_json_gives_it(tmp_path: Path) -> None:
    extra = {
        "best": float("inf"),
        "lrs": (0.1, 1 / 3),
        "nested": {"": [None, True, 2**70, "ü\ud800"]},
        "n": np.float64(0.1),
    }
    checkpoint.save(tmp_path, step=1, optimizer=PlainOptimizer(), extra=extra)
    found = checkpoint.load(tmp_path, optimizer=PlainOptimizer()).extra
    assert found == {**extra, "lrs": [0.1, 1 / 3]}
    assert checkpoint.inspect(tmp_path)["extra"] == found


def test_a_checkpoints_own_directory_and_a_copy_of_any_name_load(tmp_path: Path) -> None:
    first = checkpoint.save(tmp_path / "a", step=1, optimizer=PlainOptimizer(seed=1))
    checkpoint.save(tmp_path / "a", step=2, optimizer=PlainOptimizer(seed=2))
    optimizer = PlainOptimizer()
    assert checkpoint.load(first.path, optimizer=optimizer).path == first.path
    optimizer.assert_holds(1)
    first.path.rename(tmp_path / "best")
    assert checkpoint.load(tmp_path / "best", optimizer=PlainOptimizer()).step == 1


def test_large_tensors_cross_chunks_and_reshard(tmp_path: Path) -> None:
    """More than one chunk of 1 MiB, and cuts that fall inside chunks."""
    run_ranks(2, _save_large, tmp_path)
    run_ranks(3, _load_large, tmp_path)


LARGE = (Spec("a", (701, 1001)), Spec("b", (33,)), Spec("c", (999, 403), torch.bfloat16))


def _save_large(rank: int, world_size: int, root: Path) -> None:
    checkpoint.save(root, step=1, optimizer=PlainOptimizer(LARGE, seed=5, bucket_cap_nbytes=1 << 22))


def _load_large(rank: int, world_size: int, root: Path) -> None:
    optimizer = PlainOptimizer(LARGE, seed=6, bucket_cap_nbytes=1 << 21)
    checkpoint.load(root, optimizer=optimizer)
    optimizer.assert_holds(5)


def test_main_values_of_16_bit_parameters_are_what_is_stored(tmp_path: Path) -> None:
    """An optimizer that trains fp32 values behind bf16 parameters gives the fp32 ones, and gets them back."""

    def with_main(seed: int) -> PlainOptimizer:
        optimizer = PlainOptimizer(seed=seed)
        optimizer.live["half"]["param"] = torch.randn(33, generator=torch.Generator().manual_seed(seed))
        return optimizer

    saved, loaded = with_main(1), with_main(2)
    checkpoint.save(tmp_path, step=1, optimizer=saved)
    checkpoint.load(tmp_path, optimizer=loaded)
    assert torch.equal(loaded.live["half"]["param"], saved.live["half"]["param"])
    with pytest.raises(checkpoint.CheckpointMismatch, match="half: param is float32 in the checkpoint, bfloat16 here"):
        checkpoint.load(tmp_path, optimizer=PlainOptimizer())


def _train_16_bit(rank: int, world_size: int, root: Path, load: bool) -> Any:
    torch.manual_seed(1 if load else 0)
    net = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)).to(torch.bfloat16)
    optimizer = ShardedADOPT(net.named_parameters(), lr=0.1, bucket_cap_mb=1e-4)
    if load:
        checkpoint.load(root, optimizer=optimizer, model=net)
    else:
        for _ in range(3):
            net(torch.ones(2, 7, dtype=torch.bfloat16)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        checkpoint.save(root, step=3, optimizer=optimizer, model=net)
    main = optimizer.collectives.all_gather_json(
        {name: tensors["param"].tolist() for name, tensors in optimizer.local_shards().items()}
    )
    whole = {name: [value for one in main for value in one[name]] for name in main[0]}
    return whole, *_result(net, optimizer)


def test_16_bit_training_comes_back_with_its_fp32_values(tmp_path: Path) -> None:
    saved = run_ranks(2, _train_16_bit, tmp_path, False)[0]
    stored = {param["name"]: param for param in checkpoint.inspect(tmp_path)["params"]}
    assert (stored["0.weight"]["dtype"], stored["0.weight"]["tensors"]["param"]) == ("bfloat16", "float32")
    for world_size in (1, 2, 3):
        for loaded in run_ranks(world_size, _train_16_bit, tmp_path, True):
            _assert_equal(loaded, saved)
