"""What of a machine makes DeepSpeed runs fail or hang, looked at without importing DeepSpeed or starting anything."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Host:
    """The facts about a machine that the findings are drawn from.

    Attributes:
        name: the host name.
        addresses: what the name resolves to, sorted; empty where it does not.
        gloo_interface: GLOO_SOCKET_IFNAME, None where it is not set.
        has_deepspeed: DeepSpeed is installed for this Python.
        has_cuda: torch sees a CUDA device.
        missing_build_tools: what DeepSpeed would need to compile an operation and is not there.
        extensions: the folder in which torch builds such operations.
        extensions_are_shared: that is the default folder, which every virtual environment of this Python uses.
        locks: the lock files in it and their age, in seconds.
    """

    name: str = "localhost"
    addresses: tuple[str, ...] = ("127.0.0.1",)
    gloo_interface: str | None = None
    has_deepspeed: bool = True
    has_cuda: bool = False
    missing_build_tools: tuple[str, ...] = ()
    extensions: str = ""
    extensions_are_shared: bool = False
    locks: tuple[tuple[str, float], ...] = ()


def look() -> Host:
    """Look at this machine; reads its files and environment, writes nothing."""
    import torch

    name = socket.gethostname()
    addresses: set[str] = set()
    with contextlib.suppress(OSError):
        addresses.update(str(entry[4][0]) for entry in socket.getaddrinfo(name, None))
    compiler = os.environ.get("CXX", "c++")
    tools = (compiler, "ninja")
    # pip's ninja lies beside this Python, which need not be on the PATH
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    extensions = _extensions_folder()
    return Host(
        name=name,
        addresses=tuple(sorted(addresses)),
        gloo_interface=os.environ.get("GLOO_SOCKET_IFNAME"),
        has_deepspeed=importlib.util.find_spec("deepspeed") is not None,
        has_cuda=torch.cuda.is_available(),
        missing_build_tools=tuple(tool for tool in tools if shutil.which(tool, path=path) is None),
        extensions=str(extensions),
        extensions_are_shared=not os.environ.get("TORCH_EXTENSIONS_DIR"),
        locks=tuple(_locks(extensions)),
    )


def _extensions_folder() -> Path:
    """Where `torch.utils.cpp_extension` builds, by its rule; asking it would make the folder."""
    import torch
    from torch.utils.cpp_extension import get_default_build_root

    if folder := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(folder)
    cuda, hip = torch.version.cuda, torch.version.hip
    accelerator = f"rocm{hip}" if hip else f"cu{cuda}" if cuda else "cpu"
    python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    return Path(get_default_build_root(), f"{python}_{accelerator.replace('.', '')}")


def _locks(extensions: Path) -> list[tuple[str, float]]:
    found = []
    for lock in sorted(extensions.glob("*/lock")):
        with contextlib.suppress(OSError):  # released while we looked
            found.append((str(lock), time.time() - lock.stat().st_mtime))
    return found
