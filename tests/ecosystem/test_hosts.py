"""The hosts that are there: each missing one is a skip with its name, and the versions are those that were tested."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PINS = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
HOSTS = ["transformers", "accelerate", "lightning", "torchtitan", "tensorboard", "optax", "jax", "deepspeed"]


@pytest.mark.parametrize("host", HOSTS)
def test_the_host_is_the_version_that_the_documentation_speaks_of(host: str) -> None:
    try:
        installed = importlib.metadata.version(host)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{host} is not installed: make ecosystem")
    assert installed == PINS[host], "constraints.txt has the version that was tested: rm -r .venv; make ecosystem"


def test_torch_is_still_the_pinned_one() -> None:
    """A host that is installed later may bring another torch, and with it gigabytes of CUDA."""
    assert importlib.metadata.version("torch").partition("+")[0] == PINS["torch"]
