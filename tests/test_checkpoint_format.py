"""What is on the disk, read here without the package: by hashlib, zlib, json and the safetensors library."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from checkpointing import ODD, PlainOptimizer, Spec, bits, logical, manifest_of, whole
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from sharded_adopt import checkpoint
from sharded_adopt.checkpoint.manifest import Manifest, parse_manifest
from sharded_adopt.checkpoint.plain import dumps, from_plain, loads, to_plain

CHUNK = 1 << 20
LARGE = (Spec("large", (700_001,)), *ODD)


def _save(rank: int, world_size: int, root: Path, specs: tuple[Spec, ...], checksum: str) -> checkpoint.Saved:
    model = nn.BatchNorm1d(3)
    return checkpoint.save(
        root, step=1234, optimizer=PlainOptimizer(specs, seed=3), model=model, extra={"a": 1}, checksum=checksum
    )


@pytest.mark.parametrize(("world_size", "checksum"), [(1, "crc32"), (3, "sha256"), (4, "crc32")])
def test_the_directory_is_what_the_specification_says(tmp_path: Path, world_size: int, checksum: str) -> None:
    saved = run_ranks(world_size, _save, tmp_path, LARGE, checksum)[0]
    path = saved.path
    assert path == tmp_path / "ckpt-00000001-step-000000001234"
    names = [f"rank-{rank:05d}-of-{world_size:05d}.safetensors" for rank in range(world_size)]
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", *names]
    assert saved.nbytes == sum(file.stat().st_size for file in path.iterdir())

    data = (path / "manifest.json").read_bytes()
    text, digest, end = data[:-65], data[-65:-1], data[-1:]
    assert text.endswith(b"\n")
    assert text.count(b"\n") == 1
    assert end == b"\n"
    assert digest.decode() == hashlib.sha256(text).hexdigest() == saved.digest
    manifest = json.loads(text)
    assert (manifest["format"], manifest["version"]) == ("sharded_adopt checkpoint", 1)
    assert (manifest["step"], manifest["counter"], manifest["world_size"]) == (1234, 1, world_size)
    assert manifest["chunk_nbytes"] == CHUNK
    assert manifest["extra"] == {"a": 1}

    for name, file in zip(names, manifest["files"], strict=True):
        content = (path / name).read_bytes()
        assert (file["name"], file["nbytes"]) == (name, len(content))
        chunks = [content[start : start + CHUNK] for start in range(0, len(content), CHUNK)]
        hashes = [
            f"{zlib.crc32(chunk):08x}" if checksum == "crc32" else hashlib.sha256(chunk).hexdigest() for chunk in chunks
        ]
        assert file["checksums"] == "".join(hashes)


def test_the_safetensors_library_reads_every_element(tmp_path: Path) -> None:
    """And a few lines put a parameter together: the elements are in the order in which they lay in memory."""
    path = run_ranks(3, _save, tmp_path, LARGE, "crc32")[0].path
    manifest = json.loads((path / "manifest.json").read_bytes()[:-65])
    files = [load_file(path / file["name"]) for file in manifest["files"]]
    for number, (spec, param) in enumerate(zip(LARGE, manifest["params"], strict=True)):
        assert (param["name"], param["shape"]) == (spec.name, list(spec.shape))
        for key, dtype in param["tensors"].items():
            pieces = []
            for file, tensors in zip(manifest["files"], files, strict=True):
                for index, start, stop in file["segments"]:
                    if index == number:
                        pieces.append((start, stop, tensors[f"{key}/{spec.name}"]))
            pieces.sort(key=lambda piece: piece[0])
            assert [p[0] for p in pieces[1:]] == [p[1] for p in pieces[:-1]]
            expected = whole(spec, key, 3)
            assert str(expected.dtype) == f"torch.{dtype}"
            if not pieces:
                assert expected.numel() == 0
                continue
            elements = torch.cat([piece for _, _, piece in pieces])
            if expected.is_complex():
                elements = torch.view_as_complex(elements)
            assert bits(elements) == bits(expected)
            shape = [spec.shape[dim] for dim in param["dim_order"]]
            order = [param["dim_order"].index(dim) for dim in range(len(shape))]
            assert torch.equal(elements.view(shape).permute(order), logical(spec, expected))
    assert torch.equal(files[0]["model/running_var"], torch.ones(3))
    assert not any(name.startswith("model/") for tensors in files[1:] for name in tensors)
    assert all({"rng/torch", "rng/python", "rng/numpy"} <= set(tensors) for tensors in files)


def test_the_recipe_in_the_documentation_puts_a_parameter_together(tmp_path: Path) -> None:
    spec = Spec("conv.weight", (4, 3, 2, 5), dim_order=(0, 2, 3, 1))
    path = run_ranks(3, _save, tmp_path, (Spec("a", (5,)), spec), "crc32")[0].path
    text = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text()
    recipes = [block.split("```")[0] for block in text.split("```python")[1:] if "safe_open" in block]
    assert len(recipes) == 1
    names: dict[str, Any] = {"path": path, "json": json, "torch": torch, "safetensors": safetensors}
    exec(recipes[0], names)
    assert torch.equal(names["exp_avg"], logical(spec, whole(spec, "exp_avg", 3)))


def test_every_tensor_starts_on_a_multiple_of_its_element(tmp_path: Path) -> None:
    """Programs that map a file into memory may otherwise not look at it as what it is."""
    path = run_ranks(2, _save, tmp_path, LARGE, "crc32")[0].path
    for file in path.glob("*.safetensors"):
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        assert length % 8 == 0
        header = json.loads(content[8 : 8 + length])
        sizes = {"F64": 8, "I64": 8, "F32": 4, "BF16": 2, "U8": 1}
        for name, tensor in header.items():
            if name != "__metadata__":
                assert tensor["data_offsets"][0] % sizes[tensor["dtype"]] == 0, name
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_padding_of_buckets_is_not_stored(tmp_path: Path) -> None:
    # T38
    path = run_ranks(3, _save, tmp_path, LARGE, "crc32")[0].path
    manifest = json.loads((path / "manifest.json").read_bytes()[:-65])
    stored = sum(stop - start for file in manifest["files"] for _, start, stop in file["segments"])
    assert stored == sum(whole(spec, "param", 0).numel() for spec in LARGE)


def test_a_manifest_says_nothing_of_the_machine(tmp_path: Path) -> None:
    text = (run_ranks(1, _save, tmp_path, LARGE, "crc32")[0].path / "manifest.json").read_text()
    assert str(tmp_path) not in text
    manifest = json.loads(text.splitlines()[0])
    fields = "format version counter step run_id parent created written_by world_size checksum chunk_nbytes"
    assert set(manifest) == {*fields.split(), "optimizer", "params", "groups", "model", "extra", "files"}
    assert set(manifest["written_by"]) == {"sharded_adopt", "torch"}


def test_inspect_is_the_manifest_as_plain_data(tmp_path: Path) -> None:
    saved = run_ranks(2, _save, tmp_path, ODD, "crc32")[0]
    found = checkpoint.inspect(tmp_path)
    assert json.loads(json.dumps(found)) == found
    assert found["path"] == str(saved.path)
    assert (found["digest"], found["nbytes"], found["step"]) == (saved.digest, saved.nbytes, 1234)
    assert [param["name"] for param in found["params"]] == [spec.name for spec in ODD]
    assert found["params"][0]["scalars"] == {"step": {"dtype": "float32", "value": 3.0}}
    assert found["groups"][1] == {
        "params": ["scale", "pair"],
        "hyperparameters": {"lr": 0.25, "betas": [0.9, 0.99], "clip_lambda": {"exponent": 0.25, "scale": 1.0}},
    }


def test_a_manifest_reads_back_as_it_was(tmp_path: Path) -> None:
    path = run_ranks(3, _save, tmp_path, ODD, "sha256")[0].path
    manifest = manifest_of(path)
    assert isinstance(manifest, Manifest)
    assert parse_manifest(manifest.to_bytes()) == manifest
    assert manifest.to_bytes() == (path / "manifest.json").read_bytes()


def test_a_manifest_that_no_reader_would_take_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(checkpoint.CheckpointWriteError, match="67108864 are the most"):
        checkpoint.save(tmp_path, step=1, optimizer=PlainOptimizer(ODD), extra="x" * (64 << 20))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [None, True, 0, -(2**80), 0.1, 1e300, float("inf"), "ü\n", [], {"": [{}, [[]]]}])
def test_plain_data_survives(value: Any) -> None:
    assert from_plain(loads(dumps(to_plain(value, "value")))) == value


def test_nan_and_minus_zero_survive_in_plain_data() -> None:
    found = from_plain(loads(dumps(to_plain([float("nan"), -0.0, float("-inf")], "value"))))
    assert str(found) == "[nan, -0.0, -inf]"


def test_keys_that_are_numbers_counters_and_scalars_survive_in_plain_data() -> None:
    value = {
        "milestones": Counter({3: 2, 40: 1}),
        "by step": {3: {4: float("inf")}, "x": []},
        "lr": torch.tensor(0.1),
        "count": torch.tensor(2**40),
    }
    found = from_plain(loads(dumps(to_plain(value, "value"))))
    assert found == value
    assert type(found["milestones"]) is Counter
    assert (found["lr"].dtype, found["count"].dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"$float": "1"}, "'inf', '-inf' or 'nan' must"),
        ({"$pairs": {}}, "pairs of a key and a value must"),
        ({"$pairs": [[1, 2, 3]]}, "pairs of a key and a value must"),
        ({"$pairs": [[1.5, 2]]}, "must be strings or whole numbers"),
        ({"$pairs": [[True, 2]]}, "must be strings or whole numbers"),
        ({"$pairs": [[1, 2], [1, 3]]}, "appears twice"),
        ({"$counter": [[1, "2"]]}, "counts of .* must be whole numbers"),
        ({"$scalar": ["float32"]}, "name of a dtype and a number must"),
        ({"$scalar": ["path", 1.0]}, "name of a dtype and a number must"),
        ({"$scalar": ["float32", "1"]}, "1 is not a float32"),
        ({"$scalar": [["float32"], 1.0]}, "name of a dtype and a number must"),
    ],
)
def test_a_reserved_key_with_what_is_never_written_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_plain(value)


def test_what_contains_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ValueError, match="nested more than 100 levels deep"):
        to_plain(endless, "extra")


def test_the_names_of_directories_sort_as_their_counters() -> None:
    from sharded_adopt.checkpoint.root import Entry, parse_name

    assert Entry(123, 1000).name == "ckpt-00000123-step-000000001000"
    for entry in (Entry(1, 0), Entry(10**8, 10**12), Entry(99_999_999, 1)):
        assert parse_name(entry.name) == entry
    for name in (
        "ckpt-1-step-000000000001",
        "ckpt-000000001-step-000000000001",  # a second name of counter 1
        "ckpt-00000001-step-000000000001\n",
        "ckpt-００００0001-step-000000000001",
        ".tmp-ckpt-00000001-step-000000000001",
        f"ckpt-{'9' * 4000}-step-000000000001",
    ):
        assert parse_name(name) is None
    assert re.fullmatch(r"ckpt-\d{8}-step-\d{12}", Entry(1, 1).name)
