"""`sharded-adopt doctor ds_config.json`: what is found, from plain data; and the command around it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sharded_adopt import cli
from sharded_adopt.interop.deepspeed_config import STALE_SECONDS, exit_code, findings
from sharded_adopt.interop.deepspeed_host import Host, look

CLEAN: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_clipping": 0.0,
    "optimizer": {
        "type": "ADOPT",
        "params": {"lr": 1e-3, "betas": [0.9, 0.9999], "weight_decay": 0.1, "decouple": True},
    },
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "bf16": {"enabled": True},
}
GOOD_HOST = Host()
Change = Callable[[dict[str, Any]], object]


def found(change: Change = lambda config: None, host: Host = GOOD_HOST, hf: bool = False) -> list[tuple[str, str, str]]:
    """(severity, trap, where) of what is found after `change` to a clean config."""
    config = json.loads(json.dumps(CLEAN))
    change(config)
    return [(f.severity, f.trap, f.where) for f in findings(config, host, hf=hf)]


def params(**options: Any) -> Change:
    return lambda config: config["optimizer"]["params"].update(options)


def top(**keys: Any) -> Change:
    return lambda config: config.update(keys)


def zero(**keys: Any) -> Change:
    return lambda config: config["zero_optimization"].update(keys)


def offload(**keys: Any) -> Change:
    return lambda config: config["zero_optimization"]["offload_optimizer"].update(keys)


def without(*keys: str) -> Change:
    return lambda config: [config.pop(key) for key in keys]


def trainers(config: dict[str, Any]) -> None:
    """What a config for transformers says: its arguments decide."""
    config["optimizer"]["params"] = {"lr": "auto", "weight_decay": "auto", "decouple": True}
    config["gradient_clipping"] = "auto"


@pytest.mark.parametrize(("change", "hf"), [(lambda _: None, False), (trainers, True)])
def test_a_clean_config_on_a_good_host_has_no_findings(change: Change, hf: bool) -> None:
    assert found(change, hf=hf) == []
    assert exit_code(()) == 0


CONFIGS: list[tuple[Change, tuple[str, str, str]]] = [
    (without("gradient_clipping"), ("warning", "hidden-clipping", "gradient_clipping")),
    (lambda c: c["optimizer"].update(type="adopt"), ("error", "type", "optimizer.type")),
    (lambda c: c["optimizer"].update(type="AdamW", params={"lr": 1.0}), ("error", "type", "optimizer.type")),
    (lambda c: c["optimizer"].pop("type"), ("error", "type", "optimizer.type")),
    (params(weight_dacay=0.1), ("error", "option", "optimizer.params.weight_dacay")),
    (params(clip_lambda="step**0.25"), ("error", "option", "optimizer.params.clip_lambda")),
    (params(betas=[0.9, 1.0]), ("error", "option", "optimizer.params.betas")),
    (params(max_grad_norm=1.0), ("error", "option", "optimizer.params.max_grad_norm")),
    (params(lr="auto"), ("error", "option", "optimizer.params.lr")),
    (params(eps=1e-8), ("warning", "adams-constants", "optimizer.params.eps")),
    (lambda c: c["optimizer"]["params"].pop("decouple"), ("warning", "coupled-decay", "optimizer.params.weight_decay")),
    (top(train_micro_batch_size_per_gpu="auto"), ("error", "auto", "train_micro_batch_size_per_gpu")),
    (zero(reduce_bucket_size="auto"), ("error", "auto", "zero_optimization.reduce_bucket_size")),
    (without("optimizer"), ("error", "offloaded-client", "zero_force_ds_cpu_optimizer")),
    (offload(ratio=0.5), ("error", "adam-only", "zero_optimization.offload_optimizer.ratio")),
    (offload(super_offload=True), ("error", "adam-only", "zero_optimization.offload_optimizer.super_offload")),
    (offload(device="nvme"), ("warning", "untested", "zero_optimization.offload_optimizer.device")),
    (zero(zenflow={"topk_ratio": 0.1}), ("error", "adam-only", "zero_optimization.zenflow")),
    (zero(stage=0), ("note", "16-bit-without-zero", "bf16.enabled")),
    (
        lambda c: c.update(zero_optimization={}, bf16={}, fp16={"enabled": True}),
        ("warning", "16-bit-without-zero", "fp16.enabled"),
    ),
    (
        top(bf16={"enabled": True, "bf16_master_weights_and_grads": True}),
        ("error", "adam-only", "bf16.bf16_master_weights_and_grads"),
    ),
    (
        top(bf16={}, fp16={"enabled": True, "fp16_master_weights_and_grads": True}),
        ("error", "adam-only", "fp16.fp16_master_weights_and_grads"),
    ),
    (zero(elastic_checkpoint=True), ("error", "elastic-checkpoint", "zero_optimization.elastic_checkpoint")),
    (
        lambda c: (c["zero_optimization"].update(stage=3), c.update(checkpoint={"load_universal": True})),
        ("warning", "universal-groups", "checkpoint.load_universal"),
    ),
    (
        lambda c: (c["optimizer"]["params"].update(state_dtype="bf16"), c.update(checkpoint={"load_universal": True})),
        ("warning", "universal-state", "optimizer.params.state_dtype"),
    ),
]


@pytest.mark.parametrize(
    ("change", "expected"), CONFIGS, ids=[f"{e[1]}-{e[2]}-{n}" for n, (_, e) in enumerate(CONFIGS)]
)
def test_each_trap_of_a_config_is_found_and_nothing_else(change: Change, expected: tuple[str, str, str]) -> None:
    assert found(change) == [expected]


def optimizer(**keys: Any) -> Change:
    return lambda config: config["optimizer"].update(keys)


# The config as it is after a change, what is found, and the line to write.
FORMS: list[tuple[Change, tuple[str, str, str], str]] = [
    # names that nobody reads
    (optimizer(parms={"lr": 1e-2}), ("error", "key", "optimizer.parms"), '"params": {"lr": 0.01}'),
    (optimizer(lr=1e-2), ("error", "key", "optimizer.lr"), '"params": {"lr": 0.01}'),
    (optimizer(learning_rate=1e-2), ("error", "key", "optimizer.learning_rate"), '"params": {"lr": 0.01}'),
    (optimizer(comment="x"), ("warning", "key", "optimizer.comment"), 'into "params", or take "comment" out'),
    (top(gradient_cliping=1.0), ("error", "key", "gradient_cliping"), '"gradient_clipping": 1.0'),
    (top(optimzer={"type": "ADOPT"}), ("error", "key", "optimzer"), '"optimizer": {"type": "ADOPT"}'),
    (top(steps_per_prnt=10), ("warning", "key", "steps_per_prnt"), '"steps_per_print": 10'),
    (zero(stgae=3), ("error", "key", "zero_optimization.stgae"), '"stage": 3'),
    (zero(zzz=3), ("error", "key", "zero_optimization.zzz"), 'take "zzz" out'),
    (offload(devise="cpu"), ("error", "key", "zero_optimization.offload_optimizer.devise"), '"device": "cpu"'),
    (top(bf16={"enabld": True}), ("error", "key", "bf16.enabld"), '"enabled": true'),
    (top(amp={}), ("error", "removed", "amp"), 'take "amp" out'),
    # no objects, no names
    (optimizer(params=["lr", 0.001]), ("error", "shape", "optimizer.params"), '"params": {...}'),
    (optimizer(params="x"), ("error", "shape", "optimizer.params"), '"params": {...}'),
    (optimizer(params=5), ("error", "shape", "optimizer.params"), '"params": {...}'),
    (optimizer(type=["ADOPT"]), ("error", "shape", "optimizer.type"), '"type": "ADOPT"'),
    (top(optimizer=[]), ("error", "shape", "optimizer"), '"optimizer": {...}'),
    (top(optimizer=None), ("error", "shape", "optimizer"), '"optimizer": {...}'),
    (top(zero_optimization=None), ("error", "shape", "zero_optimization"), '"zero_optimization": {...}'),
    (top(fp16=None), ("error", "shape", "fp16"), '"fp16": {...}'),
    (top(scheduler=None), ("error", "shape", "scheduler"), '"scheduler": {...}'),
    # values that DeepSpeed refuses
    (
        top(gradient_clipping=None),
        ("error", "value", "gradient_clipping"),
        '"gradient_clipping": 0.0 for none, or the bound as a number',
    ),
    (
        top(gradient_clipping="1.0"),
        ("error", "value", "gradient_clipping"),
        '"gradient_clipping": 0.0 for none, or the bound as a number',
    ),
    (zero(stage=5), ("error", "value", "zero_optimization.stage"), '"stage": 2'),
    (zero(stage=None), ("error", "value", "zero_optimization.stage"), '"stage": 2'),
    (
        without("train_micro_batch_size_per_gpu"),
        ("error", "value", "train_micro_batch_size_per_gpu"),
        '"train_micro_batch_size_per_gpu": 8',
    ),
    (top(train_batch_size="8"), ("error", "value", "train_batch_size"), '"train_batch_size": 8'),
    (top(fp16={"enabled": True}), ("error", "value", "fp16.enabled"), 'take "fp16" or "bf16" out'),
    (
        top(scheduler={"type": "WarmupLr", "params": {}}),
        ("error", "scheduler", "scheduler.type"),
        '"type": "WarmupLR"',
    ),
    (top(scheduler={"type": "WarmupLR"}), ("error", "scheduler", "scheduler.params"), '"params": {}'),
    (top(scheduler={"params": {}}), ("error", "scheduler", "scheduler.type"), '"type": "WarmupLR"'),
]


@pytest.mark.parametrize(
    ("change", "expected", "line"), FORMS, ids=[f"{e[1]}-{e[2]}-{n}" for n, (_, e, _line) in enumerate(FORMS)]
)
def test_what_deepspeed_refuses_or_passes_over_is_found_with_the_line_to_write(
    change: Change, expected: tuple[str, str, str], line: str
) -> None:
    config = json.loads(json.dumps(CLEAN))
    change(config)
    assert [((f.severity, f.trap, f.where), f.change) for f in findings(config, GOOD_HOST)] == [(expected, line)]


@pytest.mark.parametrize("config", [[], "x", 5, None])
def test_a_config_that_is_no_object_is_one_error(config: object) -> None:
    [finding] = findings(config, GOOD_HOST)
    assert (finding.severity, finding.trap, finding.where) == ("error", "shape", "config")


@pytest.mark.parametrize(
    "change",
    [
        top(scheduler={"type": "StepLR", "params": {"step_size": 1}}),  # torch's, which DeepSpeed takes too
        zero(stage3_max_live_parameters=1, max_reuse_distance=1),
        top(bf16=None),
        top(my_own_notes="x"),
    ],
)
def test_what_deepspeed_takes_is_not_complained_of(change: Change) -> None:
    assert found(change) == []


@pytest.mark.parametrize(
    ("stage", "traps"), [("2", []), (2.0, []), (3, ["universal-groups"]), ("3", ["universal-groups"])]
)
def test_a_stage_is_read_as_deepspeed_reads_it(stage: object, traps: list[str]) -> None:
    change = lambda c: (zero(stage=stage)(c), top(checkpoint={"load_universal": True})(c))  # noqa: E731
    assert [trap for _, trap, _ in found(change)] == traps


def test_the_old_key_of_offloading_counts_too() -> None:
    def change(config: dict[str, Any]) -> None:
        del config["optimizer"]
        config["zero_optimization"] = {"stage": 2, "cpu_offload": True}

    assert found(change) == [("error", "offloaded-client", "zero_force_ds_cpu_optimizer")]


TRAINERS: list[tuple[Change, tuple[str, str], str]] = [
    (
        lambda c: c["optimizer"]["params"].pop("lr"),
        ("trainer-passed-over", "optimizer.params.lr"),
        '"lr": "auto"',
    ),
    (
        lambda c: c["optimizer"]["params"].pop("weight_decay"),
        ("trainer-passed-over", "optimizer.params.weight_decay"),
        '"weight_decay": "auto"',
    ),
    (
        params(lr=0.001),
        ("trainer-refuses", "optimizer.params.lr"),
        '"lr": "auto", with TrainingArguments(learning_rate=0.001)',
    ),
    (
        params(betas=[0.9, 0.9999]),
        ("trainer-refuses", "optimizer.params.betas"),
        'take "betas" out (ADOPT\'s own is [0.9, 0.9999]), or "betas": "auto" with '
        "TrainingArguments(adam_beta1=0.9, adam_beta2=0.9999)",
    ),
    (
        params(eps=1e-6),
        ("trainer-refuses", "optimizer.params.eps"),
        'take "eps" out (ADOPT\'s own is 1e-06), or "eps": "auto" with TrainingArguments(adam_epsilon=1e-06)',
    ),
    (
        top(gradient_clipping=0.0),
        ("trainer-refuses", "gradient_clipping"),
        '"gradient_clipping": "auto", with TrainingArguments(max_grad_norm=0.0)',
    ),
    (without("gradient_clipping"), ("hidden-clipping", "gradient_clipping"), '"gradient_clipping": "auto"'),
    (
        params(eps=1e-8),
        ("adams-constants", "optimizer.params.eps"),
        'take "eps" out (ADOPT\'s own is 1e-06), or "eps": "auto" with TrainingArguments(adam_epsilon=1e-06)',
    ),
]


@pytest.mark.parametrize(
    ("change", "expected", "line"), TRAINERS, ids=[f"{e[0]}-{e[1]}-{n}" for n, (_, e, _line) in enumerate(TRAINERS)]
)
def test_with_hf_what_trainer_passes_over_or_refuses_is_warned_of(
    change: Change, expected: tuple[str, str], line: str
) -> None:
    config = json.loads(json.dumps(CLEAN))
    trainers(config)
    change(config)
    every = findings(config, GOOD_HOST, hf=True)
    assert [(f.severity, f.trap, f.where, f.change) for f in every] == [("warning", *expected, line)]


@pytest.mark.parametrize(
    ("change", "where", "line"),
    [
        (optimizer(lr=1e-3), "optimizer.lr", '"params": {"lr": "auto"}'),
        (top(gradient_cliping=1.0), "gradient_cliping", '"gradient_clipping": "auto"'),
        (
            params(beta2=0.95),
            "optimizer.params.beta2",
            'take "beta2" out (ADOPT\'s own is [0.9, 0.9999]), or "betas": "auto" with '
            "TrainingArguments(adam_beta1=0.9, adam_beta2=0.95)",
        ),
        (
            lambda c: c["optimizer"].update(params={"learning_rate": 0.1, "weight_decay": "auto", "decouple": True}),
            "optimizer.params.learning_rate",
            '"lr": "auto", with TrainingArguments(learning_rate=0.1)',
        ),
        (
            params(max_grad_norm=2.0),
            "optimizer.params.max_grad_norm",
            '"gradient_clipping": "auto", with TrainingArguments(max_grad_norm=2.0), at the top level',
        ),
    ],
)
def test_with_hf_no_line_is_given_that_trainer_refuses(change: Change, where: str, line: str) -> None:
    config = json.loads(json.dumps(CLEAN))
    trainers(config)
    change(config)
    assert [(f.severity, f.where, f.change) for f in findings(config, GOOD_HOST, hf=True)] == [("error", where, line)]


HOSTS: list[tuple[Host, tuple[str, str, str]]] = [
    (Host(has_deepspeed=False), ("error", "no-deepspeed", "host")),
    (Host(addresses=("127.0.1.1",)), ("warning", "host-name", "host")),
    (Host(addresses=()), ("warning", "host-name", "host")),
    (Host(missing_build_tools=("c++",)), ("error", "build-tools", "host")),
    (Host(locks=(("/tmp/ops/deepspeed_shm_comm/lock", STALE_SECONDS),)), ("error", "build-lock", "host")),
    (Host(locks=(("/tmp/ops/deepspeed_shm_comm/lock", 5.0),)), ("warning", "build-lock", "host")),
]


@pytest.mark.parametrize(("host", "expected"), HOSTS, ids=[f"{e[1]}-{n}" for n, (_, e) in enumerate(HOSTS)])
def test_each_trap_of_a_host_is_found_and_nothing_else(host: Host, expected: tuple[str, str, str]) -> None:
    assert found(host=host) == [expected]


@pytest.mark.parametrize(
    "host",
    [
        Host(addresses=("127.0.1.1",), gloo_interface="lo"),
        Host(addresses=("10.0.0.1", "fe80::1")),
        Host(missing_build_tools=("c++", "ninja"), extensions_are_shared=True, has_cuda=True),
        Host(extensions_are_shared=True),
    ],
)
def test_what_does_not_matter_there_is_not_told(host: Host) -> None:
    """With a device of its own, ADOPT under DeepSpeed compiles nothing."""
    assert found(host=host) == []


def test_that_the_build_folder_is_shared_is_told_where_a_lock_lies_in_it() -> None:
    lock = ("/tmp/ops/deepspeed_shm_comm/lock", 5.0)
    assert found(host=Host(locks=(lock,), extensions_are_shared=True)) == [
        ("warning", "build-lock", "host"),
        ("note", "shared-build-folder", "host"),
    ]


def test_with_hf_what_trainer_fills_in_is_no_error_but_adams_constants_are_told() -> None:
    def hf_with(**options: Any) -> list[tuple[str, str, str]]:
        return found(lambda config: (trainers(config), params(**options)(config)), hf=True)

    assert hf_with(betas="auto", eps="auto") == [
        ("warning", "adams-constants", "optimizer.params.betas"),
        ("warning", "adams-constants", "optimizer.params.eps"),
    ]
    assert hf_with(state_dtype="auto") == [("error", "option", "optimizer.params.state_dtype")]


def test_an_optimizer_made_in_python_is_swapped_or_dropped_and_that_is_told() -> None:
    def client(config: dict[str, Any]) -> None:
        del config["optimizer"], config["zero_optimization"]["offload_optimizer"]
        config["gradient_clipping"] = 1.0

    assert found(client) == [("note", "client", "optimizer")]
    assert found(client, hf=True) == [("warning", "client-dropped", "optimizer")]
    offloaded = lambda c: (c.pop("optimizer"), c.update(gradient_clipping="auto"))  # noqa: E731
    assert found(offloaded, hf=True) == [("error", "offloaded-client", "zero_force_ds_cpu_optimizer")]
    kept = lambda c: (c.pop("optimizer"), c.update(zero_force_ds_cpu_optimizer=False))  # noqa: E731
    assert found(kept) == [("note", "client", "optimizer")]


@pytest.mark.parametrize("kind", ["adoptw", "AdoptW", "ADOPTW "])
def test_a_type_in_other_letters_is_told_how_to_spell_it(kind: str) -> None:
    config = {**CLEAN, "optimizer": {"type": kind}}
    assert findings(config, GOOD_HOST)[0].change == '"type": "ADOPTW"'


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"weight_dacay": 0.1}, '"weight_decay": 0.1'),
        ({"beta": [0.8, 0.9]}, '"betas": [0.8, 0.9]'),
        ({"zzz": 1}, 'take "zzz" out'),
        ({"clip_lambda": "x"}, '"clip_lambda": {"exponent": 0.25, "scale": 1.0}, or another value that it may have'),
        ({"lr": "1e-3"}, '"lr": 0.001, or another value that it may have'),
        ({"max_grad_norm": 2.0}, '"gradient_clipping": 2.0, at the top level'),
        ({"beta2": 0.95}, '"betas": [0.9, 0.95]'),
        ({"beta1": 0.95}, '"betas": [0.95, 0.9999]'),
        ({"clip_exponent": 0.25}, '"clip_lambda": 0.25'),
        ({"clip_scale": 2.0}, '"clip_lambda": {"exponent": 0.25, "scale": 2.0}'),
        ({"learning_rate": 1e-2}, '"lr": 0.01'),
        ({"lr": 1e-3, "learning_rate": 1e-2}, 'take "learning_rate" out, "lr" is there'),
        ({"beta": 0.9}, '"betas": [0.9, 0.9999], or another value that it may have'),
    ],
)
def test_the_line_to_change_can_be_copied(options: dict[str, Any], change: str) -> None:
    config = json.loads(json.dumps(CLEAN))
    config["optimizer"]["params"] = options
    assert [finding.change for finding in findings(config, GOOD_HOST)] == [change]


def test_errors_come_first_and_decide_the_exit_code() -> None:
    def change(config: dict[str, Any]) -> None:
        del config["gradient_clipping"]
        config["optimizer"]["params"]["zzz"] = 1
        config["zero_optimization"]["stage"] = 0

    config = json.loads(json.dumps(CLEAN))
    change(config)
    every = findings(config, GOOD_HOST)
    assert [finding.severity for finding in every] == ["error", "warning", "note"]
    assert [exit_code(every), exit_code(every[1:]), exit_code(every[2:])] == [2, 1, 0]


@pytest.mark.parametrize("config", [{"zero_optimization": True}, {"optimizer": None, "bf16": []}, {}])
def test_a_config_of_other_shapes_is_examined_all_the_same(config: dict[str, Any]) -> None:
    assert "hidden-clipping" in {finding.trap for finding in findings(config, GOOD_HOST)}


def test_the_machine_is_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "deepspeed_shm_comm").mkdir()
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.touch()
    os.utime(lock, (0, 0))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("CXX", "no-such-compiler")
    host = look()
    assert host.gloo_interface == "lo"
    assert "no-such-compiler" in host.missing_build_tools
    assert (host.extensions, host.extensions_are_shared) == (str(tmp_path), False)
    [(path, age)] = host.locks
    assert path == str(lock)
    assert age > STALE_SECONDS
    assert ("error", "build-lock", "host") in found(host=host)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    assert look().extensions_are_shared


def test_the_folder_is_the_one_that_torch_builds_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.utils import cpp_extension

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Path(look().extensions) == Path(cpp_extension._get_build_directory("any", False)).parent


@pytest.fixture
def quiet_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing to complain of on this machine but what it lacks."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = cli.main(["doctor", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.usefixtures("quiet_host")
def test_the_command_shows_each_finding_with_the_line_to_change(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = {**CLEAN, "optimizer": {"type": "adopt"}}
    del config["gradient_clipping"]
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(config))
    code, out, _ = run(capsys, path)
    assert code == 2
    lines = out.splitlines()
    assert "error   optimizer.type: DeepSpeed looks 'adopt' up as it is written" in out
    assert lines[lines.index('         -> "type": "ADOPT"') - 1].startswith("error   optimizer.type: ")
    assert "warning gradient_clipping: left out, it is not off" in out
    code, out, _ = run(capsys, path, "--json")
    shown = json.loads(out)
    assert (code, shown["exit"], shown["hf"]) == (2, 2, False)
    assert shown["findings"][0]["change"] == '"type": "ADOPT"'
    assert {finding["trap"] for finding in shown["findings"]} >= {"type", "hidden-clipping"}


@pytest.mark.usefixtures("quiet_host")
def test_the_exit_code_is_that_of_the_worst_finding(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sharded_adopt.interop.deepspeed_host.look", lambda: GOOD_HOST)  # not this machine's faults
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(CLEAN))
    code, out, _ = run(capsys, path)
    assert (code, out) == (0, f"{path}: 0 errors, 0 warnings, 0 notes\n")
    path.write_text(json.dumps({**CLEAN, "optimizer": {"type": "ADOPT", "params": {"betas": "auto"}}}))
    assert run(capsys, path)[0] == 2
    assert run(capsys, path, "--hf")[0] == 1


@pytest.mark.usefixtures("quiet_host")
def test_no_object_in_the_file_is_an_error_in_json_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text("[1]")
    code, out, _ = run(capsys, path, "--json")
    assert code == 2
    assert json.loads(out)["findings"][0]["message"] == "expected an object with keys, got [1]"


def test_comments_are_deepspeeds_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("hjson")
    path = tmp_path / "ds_config.json"
    path.write_text("# how we train\n" + json.dumps(CLEAN))
    code, out, err = run(capsys, path)
    assert (f"{path}: " in out, err) == (True, "")
    code, out, err = run(capsys, path, "--hf")
    assert (code, out) == (2, "")
    assert "transformers and accelerate read plain JSON, without comments" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected a DeepSpeed config in JSON in"),
        ("", "it is empty"),
        (" \n", "it is empty"),
        ('{"a": 1, "a": 2}', "the key 'a' comes 2 times"),
        (None, "No such file or directory"),
    ],
)
def test_what_is_no_config_is_said_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "ds_config.json"
    if text is not None:
        path.write_text(text)
    code, out, err = run(capsys, path)
    assert (code, out) == (2, "")
    assert message in err


def test_hf_without_a_config_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "--hf")
    assert code == 2
    assert "expected a config before it" in err
