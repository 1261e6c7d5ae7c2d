"""An optimizer made of plain tensors, for the tests of checkpoints: every value is known, any dtype and order goes."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # torch.optim imports it when first used, which takes seconds: not in every forked rank
from torch import Tensor

from sharded_adopt.checkpoint.manifest import digest_of, parse_manifest
from sharded_adopt.sharding.collectives import Collectives
from sharded_adopt.sharding.layout import BucketKey, Layout, ParamSpec, make_layout


@dataclass(frozen=True)
class Spec:
    """A parameter of the plain optimizer."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    dim_order: tuple[int, ...] = ()
    group: int = 0


# Odd sizes, smaller than a world, 0-dim, empty, several groups and dtypes.
ODD = (
    Spec("embedding", (13, 7)),
    Spec("scale", (), group=1),
    Spec("nothing", (0, 4)),
    Spec("half", (11, 3), torch.bfloat16),
    Spec("pair", (2,), group=1),
    Spec("double", (3, 5), torch.float64),
    Spec("conv", (4, 3, 2, 5), dim_order=(0, 2, 3, 1)),
    Spec("complex", (5,), torch.complex64),
)


class PlainOptimizer:
    """The contents are a function of `seed`, the name, the key and the place of the element; see `whole`."""

    def __init__(
        self,
        specs: Sequence[Spec] = ODD,
        seed: int = 0,
        states: Sequence[str] = ("exp_avg", "exp_avg_sq"),
        scalars: Mapping[str, Any] | None = None,
        bucket_cap_nbytes: int = 256,
        collectives: Collectives | None = None,
        lr: float = 0.5,
    ) -> None:
        self.specs, self.seed, self.states = specs, seed, states
        self.scalars = {"step": torch.tensor(float(seed))} if scalars is None else dict(scalars)
        self.collectives = collectives or Collectives()
        self.layout: Layout = make_layout([self._layout_spec(s) for s in specs], self.world_size, bucket_cap_nbytes)
        self.params = {spec.name: torch.nn.Parameter(logical(spec, whole(spec, "param", seed))) for spec in specs}
        self.groups: list[dict[str, Any]] = [
            {"lr": lr / (1 + number), "betas": [0.9, 0.99], "clip_lambda": {"exponent": 0.25, "scale": 1.0}}
            for number in sorted({spec.group for spec in specs})
        ]
        for number, group in enumerate(self.groups):
            group["params"] = [spec.name for spec in specs if spec.group == number]
        self.loads = 0
        self.live: dict[str, dict[str, Tensor]] = {}
        for spec, segment in zip(specs, self.layout.segments(self.collectives.rank), strict=True):
            self.live[spec.name] = {
                key: whole(spec, key, seed)[segment.start : segment.stop].clone() for key in ("param", *states)
            }
            self.live[spec.name].update({key: value.clone() for key, value in self.scalars.items()})

    @property
    def world_size(self) -> int:
        return self.collectives.world_size

    @staticmethod
    def _layout_spec(spec: Spec) -> ParamSpec:
        key = BucketKey(str(spec.dtype), "cpu")
        return ParamSpec(spec.name, spec.shape, key, spec.dtype.itemsize, spec.group, spec.dim_order)

    def local_shards(self) -> dict[str, dict[str, Tensor]]:
        return {name: dict(tensors) for name, tensors in self.live.items()}

    def load_shards(self, shards: Mapping[str, Mapping[str, Tensor]], groups: Sequence[Mapping[str, object]]) -> None:
        assert set(shards) == set(self.live)
        for name, tensors in shards.items():
            assert tensors["param"].shape == self.live[name]["param"].shape
            self.live[name] = {key: tensor.clone() for key, tensor in tensors.items()}
        self.groups = [dict(group) for group in groups]
        self.loads += 1
        self.collectives.all_gather_bytes(b"")

    def check_groups(self, groups: Sequence[Mapping[str, object]]) -> None:
        if any(group["lr"] == 0.0 for group in groups):
            raise ValueError("lr must be positive here")

    def plain_groups(self) -> list[dict[str, object]]:
        return [dict(group) for group in self.groups]

    def param_for(self, name: str) -> Tensor:
        return self.params[name]

    def assert_holds(self, seed: int, specs: Sequence[Spec] | None = None) -> None:
        """Every value is, bit for bit, that of a `PlainOptimizer` of this seed whose parameters lay as in `specs`."""
        for spec, was, segment in zip(
            self.specs, specs or self.specs, self.layout.segments(self.collectives.rank), strict=True
        ):
            for key in ("param", *self.states):
                expected = in_memory(spec, logical(was, whole(was, key, seed)))[segment.start : segment.stop]
                found = self.live[spec.name][key]
                assert found.dtype == expected.dtype, (spec.name, key)
                assert bits(found) == bits(expected), (spec.name, key)


def whole(spec: Spec, key: str, seed: int) -> Tensor:
    """The elements of a parameter or a state, 1-D, in memory order. States of 16-bit parameters are fp32."""
    numel = 1
    for size in spec.shape:
        numel *= size
    generator = torch.Generator().manual_seed(zlib.crc32(f"{spec.name}/{key}/{seed}".encode()))
    dtype = torch.float32 if key != "param" and spec.dtype is torch.bfloat16 else spec.dtype
    return torch.randn(numel, dtype=dtype, generator=generator)


def logical(spec: Spec, elements: Tensor) -> Tensor:
    """The tensor of the logical shape whose elements lie in memory as given."""
    order = spec.dim_order or tuple(range(len(spec.shape)))
    return elements.view([spec.shape[dim] for dim in order]).permute([order.index(dim) for dim in range(len(order))])


def in_memory(spec: Spec, tensor: Tensor) -> Tensor:
    """The inverse of `logical`."""
    return tensor.permute(spec.dim_order or tuple(range(tensor.dim()))).reshape(-1)


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor: equal NaNs are equal, and -0.0 is not 0.0."""
    flat = tensor.detach().contiguous().view(-1)
    return bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""


def state_hash(optimizer: PlainOptimizer, model: torch.nn.Module | None = None) -> str:
    """Changes with any bit of the optimizer, its groups, the model, or torch's random numbers."""
    hasher = hashlib.sha256(repr(optimizer.groups).encode())
    tensors = [(name, key, t) for name, found in sorted(optimizer.live.items()) for key, t in sorted(found.items())]
    if model is not None:
        tensors += [(name, "model", tensor) for name, tensor in sorted(model.state_dict().items())]
    tensors.append(("rng", "torch", torch.get_rng_state()))
    for name, key, tensor in tensors:
        hasher.update(f"{name}/{key}/{tensor.dtype}/{tuple(tensor.shape)}".encode() + bits(tensor))
    return hasher.hexdigest()


def rewrite_manifest(checkpoint: Path, change: Any) -> str:
    """Replace the JSON of a manifest by `change(json)` with a digest that fits, as an attacker would."""
    import json

    path = checkpoint / "manifest.json"
    value = json.loads(path.read_bytes().split(b"\n")[0])
    text = json.dumps(change(value)).encode() + b"\n"
    path.write_bytes(text + hashlib.sha256(text).hexdigest().encode() + b"\n")
    return digest_of(path.read_bytes())


def manifest_of(checkpoint: Path) -> Any:
    return parse_manifest((checkpoint / "manifest.json").read_bytes())


def tree(root: Path) -> dict[str, bytes]:
    """Every file below `root` with its contents, directories as empty names with a slash."""
    found: dict[str, bytes] = {}
    for directory, names, files in os.walk(root):
        for name in names:
            found[os.path.relpath(os.path.join(directory, name), root) + "/"] = b""
        for name in files:
            path = os.path.join(directory, name)
            found[os.path.relpath(path, root)] = Path(path).read_bytes()
    return found
