"""Reading what one rank needs of a checkpoint into memory of its own, checked, before anything live is touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sharded_adopt.checkpoint import dtypes
from sharded_adopt.checkpoint.manifest import Manifest
from sharded_adopt.checkpoint.reading import CheckedFile
from sharded_adopt.checkpoint.records import StoredParam
from sharded_adopt.checkpoint.rng import check_rng_sizes, prepare_rng
from sharded_adopt.checkpoint.storage import open_directory
from sharded_adopt.checkpoint.tensors import FileTable, byte_view, file_table, new_tensor, reorder, same_order
from sharded_adopt.sharding.layout import ParamSpec, Segment, reshard_plan


@dataclass(frozen=True, slots=True)
class Staged:
    """What one rank has read: shards as `load_shards` takes them, whole tensors of the model, setters of generators."""

    shards: Mapping[str, Mapping[str, Tensor]]
    model: Mapping[str, Tensor]
    rng: list[Callable[[], None]]


def table_of(manifest: Manifest, index: int) -> FileTable:
    """The tensors of file number `index`."""
    file = manifest.files[index]
    return file_table(manifest.params, file.segments, manifest.model_tensors if index == 0 else (), file.rng)


class _Reads:
    """Wishes for parts of files, granted file by file."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._wanted: dict[int, list[tuple[str, int, Tensor]]] = {}

    def want(self, file: int, name: str, start: int, into: Tensor) -> None:
        """Ask for `into` (contiguous) to be filled with the elements of tensor `name` from `start`."""
        self._wanted.setdefault(file, []).append((name, start, into))

    def run(self, path: Path) -> None:
        """Fill everything. Raises `CheckpointCorrupt` where any of it is damaged."""
        with open_directory(path) as dir_fd:
            for index in sorted(self._wanted):
                stored, table = self._manifest.files[index], table_of(self._manifest, index)
                with CheckedFile(dir_fd, stored, self._manifest.checksum) as file:
                    header_nbytes = table.check_header(file, stored.nbytes, stored.name)
                    file.read(
                        (header_nbytes + table.tensors[name].start + start * into.element_size(), byte_view(into))
                        for name, start, into in self._wanted[index]
                    )


def stage(
    path: Path,
    manifest: Manifest,
    wanted: Mapping[str, tuple[ParamSpec, Segment]],
    model_names: set[str],
    rng_file: int | None,
) -> Staged:
    """Read the segments `wanted` of the parameters, the tensors `model_names`, and the generators of `rng_file`.

    Only the chunks that hold them are read, each is checked. Raises `CheckpointCorrupt` and other `CheckpointError`s.
    """
    reads = _Reads(manifest)
    finish: dict[str, Callable[[], Mapping[str, Tensor]]] = {}
    for param in manifest.params:
        if param.name in wanted:
            finish[param.name] = _want_param(reads, manifest, param, *wanted[param.name])
    model: dict[str, Tensor] = {}
    for one in manifest.model_tensors:
        if one.name in model_names:
            model[one.name] = new_tensor(one.shape, one.dtype)
            reads.want(0, f"model/{one.name}", 0, model[one.name])
    states: dict[str, Tensor] = {}
    if rng_file is not None:
        check_rng_sizes(manifest.files[rng_file].rng)
        for source, nbytes in manifest.files[rng_file].rng.items():
            states[source] = new_tensor((nbytes,), "uint8")
            reads.want(rng_file, f"rng/{source}", 0, states[source])
    reads.run(path)
    return Staged({name: done() for name, done in finish.items()}, model, prepare_rng(states))


def _want_param(
    reads: _Reads, manifest: Manifest, param: StoredParam, spec: ParamSpec, segment: Segment
) -> Callable[[], Mapping[str, Tensor]]:
    """Ask for the elements of one segment; the result gives them when the files have been read.

    A parameter that lies in memory in another order than it did (channels_last) is read whole and cut anew.
    """
    as_stored = same_order(param.shape, param.dim_order, spec.dim_order)
    start, stop = (segment.start, segment.stop) if as_stored or segment.numel == 0 else (0, param.numel)
    tensors = {key: new_tensor((stop - start,), dtype) for key, dtype in param.tensors.items()}
    for piece in reshard_plan(manifest.ranges[param.name], start, stop):
        for key, tensor in tensors.items():
            target = tensor[piece.target_start : piece.target_start + piece.numel]
            reads.want(piece.stored.source, f"{key}/{param.name}", piece.source_start, target)

    def finish() -> Mapping[str, Tensor]:
        scalars = {key: dtypes.scalar_tensor(dtype, value) for key, (dtype, value) in param.scalars.items()}
        if as_stored or segment.numel == 0:
            return {**tensors, **scalars}
        cut = {
            key: reorder(tensor, param.shape, param.dim_order, spec.dim_order)[segment.start : segment.stop].clone()
            for key, tensor in tensors.items()
        }
        return {**cut, **scalars}

    return finish
