"""Model files of parameters that are views of flat buffers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from sharded_adopt import ShardedADOPT
from sharded_adopt.interop.hosted import separate_storages


class Tied(nn.Module):
    def __init__(self, transposes: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 50)
        self.head.weight = self.embedding.weight
        self.part = nn.Linear(2, 3)
        if transposes:  # what safetensors does not take
            self.transposed = nn.Parameter(torch.randn(3, 4).t())
        self.empty = nn.Parameter(torch.empty(0, 2))
        self.narrow = nn.Parameter(torch.randn(3).bfloat16())


def bound(transposes: bool = False) -> tuple[Tied, ShardedADOPT]:
    torch.manual_seed(0)
    model = Tied(transposes)
    return model, ShardedADOPT(model.named_parameters(), lr=0.1)


def nbytes(state: Any) -> int:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.tell()


def test_a_state_dict_is_still_the_parameters_and_a_part_of_it_is_saved_alone() -> None:
    """torch.save of a part wrote the whole bucket: a view is pickled with its storage."""
    model, optimizer = bound(transposes=True)
    assert nbytes(model.part.state_dict()) > nbytes(nn.Linear(2, 3).state_dict()) + 1600
    for _ in range(2):
        separate_storages(model)
    assert nbytes(model.part.state_dict()) <= nbytes(nn.Linear(2, 3).state_dict()) + 64
    state = model.state_dict()
    assert list(state) == list(Tied(transposes=True).state_dict())
    for name, p in model.named_parameters():
        assert torch.equal(state[name], p)
        assert (state[name].stride(), state[name].dtype) == (p.stride(), p.dtype)
    state["part.weight"].fill_(2.0)
    assert model.part.weight.eq(2.0).all()
    model.load_state_dict(Tied(transposes=True).state_dict())
    model.part(torch.ones(2)).sum().backward()
    optimizer.step()


def test_safetensors_saves_and_loads_such_a_model_tied_weights_once(tmp_path: Path) -> None:
    model, _ = bound()
    with pytest.raises(RuntimeError, match="None is covering the entire storage"):
        save_model(model, str(tmp_path / "refused.safetensors"))
    separate_storages(model)
    save_model(model, str(tmp_path / "model.safetensors"))
    saved = load_file(tmp_path / "model.safetensors")
    assert set(model.state_dict()) - set(saved) in ({"head.weight"}, {"embedding.weight"})
    torch.manual_seed(1)
    other, _ = bound()
    separate_storages(other)
    nn.init.zeros_(other.embedding.weight)
    load_model(other, str(tmp_path / "model.safetensors"))
    for a, b in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    save_file({"part": model.part.state_dict()["weight"]}, tmp_path / "part.safetensors")
