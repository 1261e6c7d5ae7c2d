"""The states of the random number generators that a training process draws from, as bytes.

`torch` (CPU), `cuda:N` for each device once CUDA is in use, `python` (the `random` module), `numpy` (its legacy global
generator, if numpy has been imported). The last two are JSON.
"""

from __future__ import annotations

import importlib
import json
import random
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sharded_adopt.checkpoint.errors import CheckpointCorrupt

_MAX_NBYTES = 1 << 20  # the largest of them, numpy's, has about 7,000


def rng_states() -> dict[str, Tensor]:
    """The present states of this process: 1-D uint8 CPU tensors."""
    states = {"torch": torch.get_rng_state(), "python": _to_tensor(random.getstate())}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.update((f"cuda:{index}", state) for index, state in enumerate(torch.cuda.get_rng_state_all()))
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        state = numpy.random.get_state(legacy=False)
        if state["bit_generator"] == "MT19937":
            key = [int(word) for word in state["state"]["key"]]
            states["numpy"] = _to_tensor([key, int(state["state"]["pos"]), state["has_gauss"], float(state["gauss"])])
    return states


def check_rng_sizes(rng: Mapping[str, int]) -> None:
    """Raise `CheckpointCorrupt` for a state larger than any generator's, before memory is taken for it."""
    for source, nbytes in rng.items():
        if nbytes > _MAX_NBYTES:
            raise CheckpointCorrupt(f"the state of the random numbers of {source} has {nbytes} bytes")


def prepare_rng(states: Mapping[str, Tensor]) -> list[Callable[[], None]]:
    """Check `states` and return what sets them; a generator that this process lacks is left out.

    Raises `CheckpointCorrupt` for a state that its generator does not take. Nothing is changed until the returned
    functions are called, and they do not fail.
    """
    setters: list[Callable[[], None]] = []
    for source, state in states.items():
        try:
            setters.extend(_prepare(source, state))
        except (ValueError, TypeError, OverflowError, RuntimeError, RecursionError, LookupError) as error:
            raise CheckpointCorrupt(f"rng/{source} is not a state of that generator: {error}") from error
    return setters


def _prepare(source: str, state: Tensor) -> list[Callable[[], None]]:
    """Try `state` on a generator made for the purpose."""
    if source == "torch":
        torch.Generator().set_state(state)
        return [lambda: torch.set_rng_state(state)]
    if source == "python":
        version, words, gauss = _from_tensor(state)
        found = (version, tuple(words), gauss)
        random.Random().setstate(found)
        return [lambda: random.setstate(found)]
    if source == "numpy":
        return _prepare_numpy(state)
    device = torch.device(source)
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        return []
    torch.Generator(device).set_state(state)
    return [lambda: torch.cuda.set_rng_state(state, device)]


def _prepare_numpy(state: Tensor) -> list[Callable[[], None]]:
    try:
        numpy = importlib.import_module("numpy")
    except ImportError:
        return []
    key, pos, has_gauss, gauss = _from_tensor(state)
    found = {
        "bit_generator": "MT19937",
        "state": {"key": numpy.asarray(key, dtype=numpy.uint32), "pos": int(pos)},
        "has_gauss": int(has_gauss),
        "gauss": float(gauss),
    }
    numpy.random.RandomState().set_state(found)
    return [lambda: numpy.random.set_state(found)]


def _to_tensor(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_tensor(state: Tensor) -> Any:
    return json.loads(bytes(state.tolist()))
