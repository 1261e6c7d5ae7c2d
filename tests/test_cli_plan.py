"""`sharded-adopt plan`: the figures of `memory_plan()` without an optimizer, and what it says to bad input."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import save_file
from test_layout import llama3_8b_shapes
from test_memory_plan import CASES, MIB, Case, Model

from sharded_adopt import cli

GIB = 2**30


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["plan", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    code, out, err = run(capsys, *arguments, "--json")
    assert err == ""
    return code, json.loads(out)


def shapes_of(model: torch.nn.Module, path: Path) -> Path:
    path.write_text(json.dumps({name: list(p.shape) for name, p in model.named_parameters()}))
    return path


def as_options(case: Case) -> list[str]:
    """The command line that says what a case of the tests of `memory_plan()` says."""
    said = {"dtype": case.dtype, "bucket_cap_mb": case.cap / MIB, "optimizer": case.cls.__name__, **case.engine}
    said |= {"state_dtype": case.defaults["state_dtype"]} if "state_dtype" in case.defaults else {}
    options: list[str] = []
    for name, value in said.items():
        option = "--" + name.replace("_", "-")
        if value is False:
            options.append("--no-" + option[2:])
        else:
            options += [option] if value is True else [option, str(value)]
    settings = [f"{key}={json.dumps(value)}" for key, value in case.defaults.items() if key != "state_dtype"]
    return [*options, *(["--set", *settings] if settings else [])]


def plans(rank: int, world_size: int) -> dict[str, dict[str, int]]:
    return {name: dataclasses.asdict(case.make()[1].memory_plan()) for name, case in CASES.items()}


def test_the_command_says_what_the_optimizer_says(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = shapes_of(Model(), tmp_path / "model.json")
    for world_size in (1, 3):
        expected = run_ranks(world_size, plans)[0]
        for name, case in CASES.items():
            arguments = ("--model", file, "--world-size", world_size, "--backend", "gloo", *as_options(case))
            code, found = run_json(capsys, *arguments)
            assert code == 0
            assert {key: found["plan"][key] for key in expected[name]} == expected[name], (name, world_size)


def test_seven_billion_parameters_are_counted_in_every_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    _, found = run_json(capsys, "--params", "7e9", "--world-size", 64, "--dtype", "bf16", "--shard-gradients")
    plan = found["plan"]
    assert found["params"] == 7_000_000_000
    assert plan["parameters"] == pytest.approx(14e9, rel=1e-3)
    assert plan["gradients"] == pytest.approx(14e9 / 64, rel=1e-3)
    assert plan["state"] == pytest.approx(56e9 / 64, rel=1e-3)
    assert plan["main_parameters"] == pytest.approx(28e9 / 64, rel=1e-3)
    assert plan["in_flight"] == pytest.approx(50 * MIB, rel=1e-3)
    assert plan["sent"] == pytest.approx(2 * 14e9 * 63 / 64, rel=1e-3)
    assert plan["peak"] == plan["resident"] + plan["largest_gradient"]
    assert found["peers"]["DDP"]["peak"] == pytest.approx(14e9 + 14e9 + 56e9 + 28e9, rel=1e-3)
    assert found["peers"]["FSDP2"]["peak"] == pytest.approx((28e9 + 28e9 + 56e9) / 64, rel=1e-3)


def test_the_table_shows_every_sum(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--params", "1G", "--world-size", 4, "--accumulate", "--activations", "3GiB", "--shard-gradients")
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    for shown in ("1,000,000,000 parameters in float32, adopt, 4 ranks, ZeRO-2", "unsharded in DDP", "3.725 GiB"):
        assert shown in out
    _, found = run_json(capsys, *arguments)
    assert f"{(found['plan']['peak_accumulating'] + 3 * GIB) / GIB:.4g} GiB" in out
    assert "Shapes are not known" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--params", "7e9", "--dtype", "bf16", "--world-size", "8", "--device-memory", "80GiB"], None),
        (
            ["--params", "7e9", "--world-size", "64", "--device-memory", "40GiB"],
            "--shard-gradients, with which it fits",
        ),
        (["--params", "7e9", "--world-size", "64", "--device-memory", "24GB"], "FSDP2 keeps at least"),
        (["--params", "70e9", "--world-size", "8", "--device-memory", "80GiB"], "Take more ranks, or larger devices"),
    ],
)
def test_what_is_too_large_for_the_device_exits_6_and_says_what_to_do(
    capsys: pytest.CaptureFixture[str], arguments: list[str], told: str | None
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, err) == (0 if told is None else 6, "")
    if told is None:
        assert "fits into 80 GiB" in out
    else:
        flat = " ".join(out.split())
        assert told in flat
        assert "FSDP2 with plain ADOPT" in flat
        assert "does not fit" in flat
    code, found = run_json(capsys, *arguments)
    assert code == (0 if told is None else 6)
    assert found["fits"] is (told is None)


def test_activations_and_accumulation_count_for_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "--params",
        "7e9",
        "--dtype",
        "bf16",
        "--world-size",
        64,
        "--shard-gradients",
        "--device-memory",
        "20GiB",
    )
    assert run(capsys, *arguments)[0] == 0
    assert run(capsys, *arguments, "--activations", "6GiB")[0] == 6
    assert run(capsys, *arguments, "--accumulate")[0] == 6  # 13 GiB of gradients wait in param.grad


def test_a_model_is_read_from_json_and_from_safetensors(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.bfloat16), "steps": torch.zeros(2).long()}
    save_file({"a": tensors["a"], "steps": tensors["steps"]}, tmp_path / "one.safetensors", metadata={"by": "us"})
    save_file({"b": tensors["b"]}, tmp_path / "two.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "one.safetensors", "steps": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "index.json").write_text(json.dumps(index))
    (tmp_path / "plain.json").write_text('{"a": [3, 5], "b": {"shape": [7], "dtype": "bf16"}}')
    ways = [
        [tmp_path],
        [tmp_path / "one.safetensors", tmp_path / "two.safetensors"],
        [tmp_path / "index.json"],
        [tmp_path / "plain.json"],
    ]
    found = [run_json(capsys, "--model", *files, "--world-size", 2)[1] for files in ways]
    assert all(one == found[0] for one in found)
    assert (found[0]["params"], found[0]["tensors"], found[0]["buckets"]) == (22, 2, 2)
    assert found[0]["plan"]["largest_gradient"] == 3 * 5 * 4
    code, overridden = run_json(capsys, "--model", tmp_path, "--world-size", 2, "--dtype", "fp64")
    assert (code, overridden["plan"]["largest_gradient"]) == (0, 3 * 5 * 8)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is neither a .safetensors file nor JSON"),
        ("[" * 100_000, "is neither a .safetensors file nor JSON"),
        ("[[3]]", "got a list"),
        ('{"a": [3], "a": [4]}', "'a' is there twice"),
        ('{"a": [-3]}', "got 'a': [-3]"),
        ('{"a": [true]}', "got 'a': [true]"),
        ('{"a": 3}', "got 'a': 3"),
        ('{"a": {"size": [3]}}', "got 'a': {\"size\": [3]}"),
        ('{"a": {"shape": [3], "dtype": "int4"}}', "'a': unknown dtype 'int4'"),
        ("{}", "there are no parameters in"),
        ('{"a": {"shape": [3], "dtype": [1]}}', "'a': unknown dtype '[1]'"),
        (f'{{"a": [{"9" * 3000}]}}', "'a' must have fewer than 2**63 elements, got [9999"),
        (f'{{"a": [{"9" * 3000}, 0]}}', "'a' must have fewer than 2**63 elements, got [9999"),
        (f'{{"a": [{2**32}, {2**31}]}}', "'a' must have fewer than 2**63 elements, got [4294967296, 2147483648]"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors cannot be read: No such file"),
        (
            '{"weight_map": {"a": "gone\\u0000.safetensors"}}',
            "gone\\x00.safetensors' cannot be read: embedded null byte",
        ),
        *(
            (
                json.dumps({"weight_map": {"a": file}}),
                f"expected a .safetensors file beside the index for 'a', got {json.dumps(file)}",
            )
            for file in ("../x.safetensors", "", ".", "..", "[model].json", 3, None)
        ),
    ],
)
def test_a_file_that_is_no_model_is_named_with_the_reason(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, told: str
) -> None:
    file = tmp_path / "[model].json"  # what users wrote is not markup
    file.write_text(content)
    code, out, err = run(capsys, "--model", file, "--world-size", 2)
    assert (code, out) == (2, "")
    assert told in err
    if "gone" not in content:
        assert str(file) in err


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}", b"\xff" * 20, b"\x02\0\0\0\0\0\0\0[]"])
def test_a_damaged_safetensors_header_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    code, out, err = run(capsys, "--model", file, "--world-size", 2)
    assert (code, out) == (2, "")
    assert f"{file} is no safetensors file" in err


def test_a_safetensors_header_with_a_dtype_that_is_no_text_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    header = b'{"a": {"shape": [2], "dtype": [1]}}'
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    code, out, err = run(capsys, "--model", file, "--world-size", 2)
    assert (code, out) == (2, "")
    assert f"{file}: 'a': unknown dtype '[1]'" in err


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "nadam", "rprop", "asgd"])
def test_what_only_cuda_can_capture_is_planned_like_the_same_without(
    capsys: pytest.CaptureFixture[str], optimizer: str
) -> None:
    arguments = ("--params", "7e6", "--world-size", 2, "--optimizer", optimizer)
    code, captured = run_json(capsys, *arguments, "--set", "capturable=true")
    assert (code, captured) == run_json(capsys, *arguments)
    assert captured["plan"]["state"] > 0


def test_options_that_take_several_values_add_up_when_they_are_repeated(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps({name: [8]}))
    arguments = ("--world-size", 2, "--optimizer", "rmsprop", "--set", "momentum=0.9", "--set", "centered=true")
    code, found = run_json(
        capsys, "--model", tmp_path / "a.json", "--model", tmp_path / "b.json", *arguments, "--backend", "gloo"
    )
    assert (code, found["tensors"]) == (0, 2)
    counters = 2 * 4
    assert found["plan"]["state"] == 3 * 4 * 16 // 2 + counters


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--params", "0"], "a number of parameters like 7e9, 124M or 7B"),
        (["--params", "nan"], "got 'nan'"),
        (["--params", "-5"], "got '-5'"),
        (["--params", "7Q"], "got '7Q'"),
        (["--params", "1e9", "--world-size", "0"], "--world-size: must be a whole number of at least 1, got '0'"),
        (["--params", "1e9", "--world-size", "two"], "got 'two'"),
        (["--params", "1e9", "--world-size", "9" * 4000], "--world-size: must be below 2**31, got 99999"),
        (["--params", "1e9", "--device-memory", "80XB"], "a size like 80GiB"),
        (["--params", "1e9", "--model", "x.json"], "not allowed with argument"),
        ([], "--params --model is required"),
    ],
)
def test_wrong_numbers_are_refused_with_what_was_expected(
    capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    world_size = [] if "--world-size" in arguments else ["--world-size", "2"]
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", *arguments, *world_size])
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--dtype", "int8"], "unknown dtype 'int8': expected fp64, fp32, bf16 or fp16"),
        (["--optimizer", "adoqt"], "unknown optimizer 'adoqt': expected one of"),
        (["--optimizer", "muon"], "Muon cannot be sharded by elements"),
        (["--set", "momentum=0.9"], "--optimizer adopt with momentum 0.9"),
        (["--set", "lr"], "expected --set KEY=VALUE, got 'lr'"),
        (["--set", "lr=fast"], "--set lr: expected a number, true, false or null, got 'fast'"),
        (["--set", "lr=1e-3", "lr=2"], "lr is given twice, the second time by --set lr=2: give it once"),
        (["--set", "lr=1e-3", "--set", "lr=2"], "lr is given twice, the second time by --set lr=2: give it once"),
        (["--state-dtype", "bf16", "--set", "state_dtype=null"], "state_dtype is given twice"),
        (["--optimizer", "adamw", "--set", "betas=[]"], "--optimizer adamw with betas []: IndexError("),
        (["--optimizer", "rprop", "--set", "etas=[]"], "--optimizer rprop with etas []: IndexError("),
        (["--optimizer", "adamw", "--set", "capturable=true", "lr=-1"], "Invalid learning rate: -1"),
        (["--optimizer", "sgd", "--state-dtype", "bf16"], "state_dtype"),
        (["--bucket-cap-mb", "-1"], "bucket_cap_mb must be positive and finite, got -1"),
        (["--bucket-cap-mb", "inf"], "bucket_cap_mb must be positive and finite, got inf"),
        (
            ["--bucket-cap-mb", "1e303"],
            "bucket_cap_mb is in units of 2**20 bytes, which must be finite too, got 1e+303",
        ),
        (["--bucket-cap-mb", "0.001"], "are too many to plan"),
        (["--main-params", "bf16"], "main_params must be 'auto', 'fp32' or 'none', got 'bf16'"),
        (["--shard-gradients", "--no-reduce-gradients"], "choose one of the two"),
    ],
)
def test_options_that_the_engine_refuses_are_refused_with_its_words(
    capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    code, out, err = run(capsys, "--params", "7e9", "--world-size", "2", *arguments)
    assert (code, out) == (2, "")
    assert told in err


def test_a_thousand_ranks_and_thousands_of_parameters_take_no_time(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shapes = [[n % 7 + 1, 64] for n in range(20_000)] + [list(shape) for shape in llama3_8b_shapes()]
    file = tmp_path / "model.json"
    file.write_text(json.dumps({f"p{i}": shape for i, shape in enumerate(shapes)}))
    begin = time.process_time()
    code, found = run_json(capsys, "--model", file, "--world-size", 1024)
    assert (code, found["tensors"]) == (0, len(shapes))
    assert time.process_time() - begin < 5  # about 0.4 s; a second pass over the ranks would take minutes
