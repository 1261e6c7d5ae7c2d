"""Names, shapes and dtypes of a model's parameters from a file, without their values."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sharded_adopt.commands import UsageError
from sharded_adopt.sharding.layout import BucketKey, ParamSpec
from sharded_adopt.sharding.plan import Dtype

DTYPES = {
    short: Dtype(name, itemsize)
    for name, itemsize, shorts in (
        ("float64", 8, ("fp64", "float64", "F64")),
        ("float32", 4, ("fp32", "float32", "F32")),
        ("bfloat16", 2, ("bf16", "bfloat16", "BF16")),
        ("float16", 2, ("fp16", "float16", "half", "F16")),
    )
    for short in shorts
}
# What a safetensors file may hold that is no parameter.
_NO_PARAMETERS = frozenset({"I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"})
_MAX_HEADER_NBYTES = 100_000_000  # the limit of the format
_TOO_LARGE = 2**63  # torch counts elements in 64 bits
_EXPECTED = 'a JSON object {"name": [sizes], …} or {"name": {"shape": [sizes], "dtype": "bf16"}, …}'


def read_dtype(text: str) -> Dtype:
    """The dtype of that name, in torch's words, short, or as in safetensors. Raises `UsageError`."""
    try:
        return DTYPES[text.removeprefix("torch.")]
    except KeyError:
        raise UsageError(f"unknown dtype {text!r}: expected fp64, fp32, bf16 or fp16") from None


def read_model(paths: Iterable[str], dtype: Dtype | None) -> list[ParamSpec]:
    """The parameters in some files, in their order; `dtype` overrides what the files say (else fp32).

    A file is JSON, safetensors (of which only the header is read), or an index of safetensors files; a directory stands
    for all its safetensors files. Tensors of integers are left out. Raises `UsageError` for anything else.
    """
    params: list[ParamSpec] = []
    seen: dict[str, Path] = {}
    for path in _files(map(Path, paths)):
        for name, shape, own in _entries(path):
            if name in seen:
                raise UsageError(f"{path}: {name!r} is in {seen[name]} already")
            seen[name] = path
            found = dtype or own or DTYPES["fp32"]
            params.append(ParamSpec(name, shape, BucketKey(found.name, "device"), found.itemsize))
    if not params:
        raise UsageError(f"there are no parameters in {', '.join(map(str, paths))}")
    return params


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            found = sorted(path.glob("*.safetensors"))
            if not found:
                raise UsageError(f"{path} is a directory without a .safetensors file")
            yield from found
        else:
            yield path


def _entries(path: Path) -> Iterator[tuple[str, tuple[int, ...], Dtype | None]]:
    try:
        if path.suffix == ".safetensors":
            yield from _of_safetensors(path)
        else:
            yield from _of_json(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a name that no file can have
        raise UsageError(f"{str(path)!r} cannot be read: {error}") from error


def _of_safetensors(path: Path) -> Iterator[tuple[str, tuple[int, ...], Dtype | None]]:
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        header = file.read(length) if 2 <= length <= _MAX_HEADER_NBYTES else b""
    if len(header) < 2 or len(header) != length:
        raise UsageError(f"{path} is no safetensors file: its header is missing or cut short")
    data = _parsed(path, header)
    if not isinstance(data, dict):
        raise UsageError(f"{path} is no safetensors file: its header is no JSON object")
    for name, entry in data.items():
        if name == "__metadata__" or (isinstance(entry, dict) and str(entry.get("dtype")) in _NO_PARAMETERS):
            continue
        yield _entry(path, name, entry)


def _of_json(path: Path) -> Iterator[tuple[str, tuple[int, ...], Dtype | None]]:
    data = _parsed(path, path.read_bytes())
    if not isinstance(data, dict):
        raise UsageError(f"{path}: expected {_EXPECTED}, got a {type(data).__name__}")
    if isinstance(data.get("weight_map"), dict):
        for name in _files_of_index(path, data["weight_map"]):
            yield from _entries(path.with_name(name))
        return
    for name, entry in data.items():
        yield _entry(path, name, entry)


def _files_of_index(path: Path, weight_map: dict[str, Any]) -> Iterable[str]:
    for name, file in weight_map.items():
        # Nothing but safetensors: an index that names itself has no end.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UsageError(
                f"{path}: expected a .safetensors file beside the index for {name!r}, got {json.dumps(file):.80}"
            )
    return dict.fromkeys(weight_map.values())


def _parsed(path: Path, text: bytes) -> Any:
    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            name = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise UsageError(f"{path}: {name!r} is there twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is neither a .safetensors file nor JSON: {error}") from error


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], Dtype | None]:
    shape = entry.get("shape") if isinstance(entry, dict) else entry
    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in shape):
        raise UsageError(f"{path}: expected {_EXPECTED}, got {name!r}: {json.dumps(entry):.80}")
    if math.prod(shape) >= _TOO_LARGE or max(shape, default=0) >= _TOO_LARGE:
        raise UsageError(f"{path}: {name!r} must have fewer than 2**63 elements, got {json.dumps(shape):.80}")
    try:
        return name, tuple(shape), None if dtype is None else read_dtype(str(dtype))
    except UsageError as error:
        raise UsageError(f"{path}: {name!r}: {error}") from error
