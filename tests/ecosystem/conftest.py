"""What the tests inside other frameworks share: nothing is downloaded, and whose warnings are no errors of ours."""

from __future__ import annotations

import os

import pytest

# The hosts' switches against the network, for this process and for the ranks that it starts.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "WANDB_MODE": "disabled"}
os.environ.update(OFFLINE)
# jax and DeepSpeed look for an accelerator and say so if there is none.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # accelerate warns of a guess

# Warnings are errors, except those that a host (or torch, for what a host uses of it) raises about itself.
FILTERS = [
    "ignore:`torch.distributed:FutureWarning",  # DeepSpeed calls all_gather_into_tensor by its old name
    "ignore:`isinstance.treespec:FutureWarning",  # Lightning flattens its loaders
    "ignore:Checkpoint directory:UserWarning",  # Lightning, of a run that goes on
    "ignore:The 'train_dataloader' does not have many workers:UserWarning",  # Lightning's advice
    "ignore:To get the last learning rate:UserWarning",  # torchtitan, loading its schedule
    "ignore:`torch.jit:DeprecationWarning",  # DeepSpeed compiles a function, and torch's compiler uses torch.jit
]


def pytest_configure(config: pytest.Config) -> None:
    for line in FILTERS:
        config.addinivalue_line("filterwarnings", line)
