"""Tensors in a file: which, in what order, at which byte.

A file is what the safetensors format says: the length of the header as 8 bytes, the header (JSON, padded with spaces to
8 bytes), then the elements. Which tensors it holds follows from the manifest, so the header tells a reader of ours
nothing new: it is compared, not believed.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharded_adopt.checkpoint import dtypes
from sharded_adopt.checkpoint.errors import CheckpointCorrupt
from sharded_adopt.checkpoint.reading import CheckedFile
from sharded_adopt.checkpoint.records import StoredParam, StoredSegment, StoredTensor
from sharded_adopt.checkpoint.storage import empty_view

_MAX_HEADER_NBYTES = 100_000_000  # the limit of the safetensors library
_STAGED_NBYTES = 16 << 20  # of a tensor on another device, copied to the host at once


@dataclass(frozen=True, slots=True)
class FileTensor:
    """One tensor of a file, its first byte counted from the end of the header."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * dtypes.itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class FileTable:
    """The tensors of one file, in their order, by name."""

    tensors: Mapping[str, FileTensor]

    @property
    def data_nbytes(self) -> int:
        """Bytes behind the header."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def header(self) -> bytes:
        """Everything before the elements."""
        described = json.dumps({"__metadata__": {"format": "pt"}, **self._described()}, separators=(",", ":")).encode()
        described += b" " * (-len(described) % 8)
        return len(described).to_bytes(8, "little") + described

    def header_nbytes(self, file_nbytes: int, name: str) -> int:
        """Bytes before the elements of a file of `file_nbytes`. Raises `CheckpointCorrupt` where none can be."""
        nbytes = file_nbytes - self.data_nbytes
        if not 8 < nbytes <= _MAX_HEADER_NBYTES + 8:
            raise CheckpointCorrupt(f"{name} has {file_nbytes} bytes, but its tensors have {self.data_nbytes}")
        return nbytes

    def check_header(self, file: CheckedFile, file_nbytes: int, name: str) -> int:
        """Compare the header of `file` with this table and return its length.

        Raises `CheckpointCorrupt` where it names other tensors, or the same elsewhere.
        """
        nbytes = self.header_nbytes(file_nbytes, name)
        view = empty_view(nbytes)
        file.read([(0, view)])
        length, text = int.from_bytes(bytes(view[:8]), "little"), bytes(view[8:])
        try:
            found = json.loads(text) if length == len(text) else None
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict):
            found.pop("__metadata__", None)
        if found != self._described():
            raise CheckpointCorrupt(f"{name}: its header does not describe the tensors that the manifest promises")
        return nbytes

    def _described(self) -> dict[str, object]:
        return {
            tensor.name: {
                "dtype": dtypes.file_dtype(tensor.dtype),
                "shape": list(dtypes.file_shape(tensor.dtype, tensor.shape)),
                "data_offsets": [tensor.start, tensor.start + tensor.nbytes],
            }
            for tensor in self.tensors.values()
        }


def file_table(
    params: Sequence[StoredParam],
    segments: Iterable[StoredSegment],
    model_tensors: Iterable[StoredTensor],
    rng: Mapping[str, int],
) -> FileTable:
    """The tensors of the file that holds these.

    `param/NAME` and `STATE/NAME` for each segment (1-D), `model/NAME`, `rng/SOURCE` (bytes). Wider elements come first,
    so that each starts on a multiple of its own size; otherwise the order is the one given, states sorted by name.
    """
    found: list[tuple[str, tuple[int, ...], str]] = []
    for segment in segments:
        param = params[segment.param]
        for key, dtype in sorted(param.tensors.items()):
            found.append((f"{key}/{param.name}", (segment.numel,), dtype))
    found.extend((f"model/{tensor.name}", tensor.shape, tensor.dtype) for tensor in model_tensors)
    found.extend((f"rng/{source}", (nbytes,), "uint8") for source, nbytes in sorted(rng.items()))
    found.sort(key=lambda one: -dtypes.itemsize(one[2]))
    tensors, end = {}, 0
    for name, shape, dtype in found:
        tensors[name] = FileTensor(name, shape, dtype, end)
        end += tensors[name].nbytes
    return FileTable(tensors)


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it and keeping it alive."""
    assert tensor.is_contiguous()
    assert tensor.is_cpu
    if tensor.numel() == 0:
        return empty_view(0)
    raw = (ctypes.c_ubyte * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())
    raw.tensor = tensor  # type: ignore[attr-defined]
    return memoryview(raw)


def byte_views(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of `tensor` in row-major order; from another device they come in parts, so that few are in memory."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)
    if flat.device.type == "cpu":
        yield byte_view(flat)
        return
    for part in flat.split(_STAGED_NBYTES // flat.element_size()):
        yield byte_view(part.cpu())


def reorder(whole: Tensor, shape: Sequence[int], stored: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """The elements of `whole` (1-D, in memory order `stored`) in memory order `wanted`, 1-D."""
    in_file = whole.view([shape[dim] for dim in stored])
    logical = in_file.permute([list(stored).index(dim) for dim in range(len(shape))])
    return logical.permute(list(wanted)).reshape(-1)


def same_order(shape: Sequence[int], one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two dim_orders count the elements of `shape` alike: dimensions of size 1 do not matter."""
    return [dim for dim in one if shape[dim] != 1] == [dim for dim in other if shape[dim] != 1] or 0 in shape


def new_tensor(shape: Sequence[int], dtype: str) -> Tensor:
    """An uninitialised CPU tensor."""
    return torch.empty(tuple(shape), dtype=dtypes.torch_dtype(dtype))
