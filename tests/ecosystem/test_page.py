"""What docs/ecosystem.md shows is run, in each host, on one process as torchrun starts it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hosting import as_torchrun_rank
from ranks import run_ranks
from torch import Tensor, nn

PAGE = (Path(__file__).parents[2] / "docs" / "ecosystem.md").read_text(encoding="utf-8")
SHOWN = dict(re.findall(r"^## (.+?)\n\n```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.layer(x) - y).square().mean()}


def run(rank: int, world_size: int, host: str, directory: Path) -> float:
    """How far the weights have moved."""
    import os

    as_torchrun_rank(rank, world_size)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    os.chdir(directory)
    torch.manual_seed(0)
    model = Net()
    before = model.layer.weight.detach().clone()
    data: Any = [{"x": torch.randn(8, 4), "y": torch.randn(8, 1)} for _ in range(10)]
    if host == "Lightning":
        data = torch.utils.data.DataLoader(data, batch_size=None)
    names: dict[str, Any] = {"model": model, "data": data}
    exec(compile(SHOWN[host], host, "exec"), names)
    if host == "torchtitan":
        names["optimizers"].zero_grad()
        for batch in data:
            model(**batch)["loss"].backward()
            names["optimizers"].step()
    return (model.layer.weight - before).abs().max().item()


def test_the_page_shows_every_host_that_has_a_hook() -> None:
    assert list(SHOWN) == ["transformers", "accelerate", "Lightning", "torchtitan"]


@pytest.mark.parametrize("host", SHOWN)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # the hosts' advice on a run of a second
def test_what_the_page_shows_trains(host: str, tmp_path: Path) -> None:
    pytest.importorskip(host.lower(), reason=f"{host.lower()} is not installed: make ecosystem")
    pytest.importorskip("accelerate", reason="accelerate is not installed: make ecosystem")
    (moved,) = run_ranks(1, run, host, tmp_path)
    assert moved > 1e-4
