"""The DeepSpeed example as a user runs it: real jobs, a real SIGKILL, the weights of the example without DeepSpeed."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import job as jobs
import pytest

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: make ecosystem")

import pretrain
from hosting import free_port
from job import Job
from journal import read as read_journal
from ranks import run_ranks

from sharded_adopt.interop.deepspeed_config import findings
from sharded_adopt.interop.deepspeed_host import Host

EXAMPLES = Path(jobs.__file__).parent
SCRIPT = EXAMPLES / "deepspeed_pretrain.py"
CONFIG = json.loads((EXAMPLES / "ds_config.json").read_text())
TINY = ["--layers", "1", "--heads", "2", "--width", "16", "--context", "16", "--warmup", "5", "--dropout", "0.2"]


@pytest.fixture(autouse=True)
def one_thread_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums must not depend on the machine's cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def start(directory: Path, ds_config: dict[str, Any], *arguments: str) -> Job:
    """Start the example on two ranks; what it prints goes to `printed` beside its directory."""
    path = directory.with_suffix(".json")
    path.write_text(json.dumps(ds_config))
    words = [*TINY, "--checkpoint-dir", str(directory), "--deepspeed_config", str(path), *arguments]
    with directory.with_suffix(".printed").open("a") as file:
        return Job(2, SCRIPT, words, output=file)


def train(directory: Path, ds_config: dict[str, Any], *arguments: str) -> dict[str, Any]:
    """Run the example to its end; returns its summary."""
    with start(directory, ds_config, *arguments) as job:
        code = job.wait(200)
    assert code == 0, directory.with_suffix(".printed").read_text()
    return json.loads((directory / "summary.json").read_text())


def test_the_config_of_the_example_is_one_that_the_doctor_has_nothing_against() -> None:
    assert findings(CONFIG, Host()) == ()


def test_deepspeeds_launcher_runs_it_as_its_first_line_says(tmp_path: Path) -> None:
    words = shlex.split(re.search(r"^    (deepspeed .*)$", SCRIPT.read_text(), re.MULTILINE)[1])
    words[words.index("--steps") + 1] = "3"
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--master_port", str(free_port())]
    (tmp_path / "examples").symlink_to(EXAMPLES)
    ran = subprocess.run(
        [*launcher, *words[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "1,298,880 parameters, ADOPT, ZeRO-2, world size 2, cpu" in ran.stdout
    assert "step 3/3  loss " in ran.stdout
    assert (tmp_path / "runs" / "deepspeed" / "latest").read_text() == "step-3"


def _pretrain(rank: int, world_size: int, arguments: list[str]) -> None:
    pretrain.train(pretrain.parse_arguments(arguments), rank, world_size)


@pytest.mark.parametrize("stage", [1, 3])
def test_under_deepspeed_the_weights_are_those_of_the_example_without_it(tmp_path: Path, stage: int) -> None:
    """Bit for bit, where nobody clips: the sum of squares for the norm is taken in another order."""
    ds_config = {**CONFIG, "gradient_clipping": 0.0, "zero_optimization": {"stage": stage}}
    without_dropout = ["--dropout", "0", "--steps", "30"]
    ours = train(tmp_path / "deepspeed", ds_config, *without_dropout)
    native = [*TINY, *without_dropout, "--clip", "inf", "--checkpoint-dir", str(tmp_path / "native")]
    run_ranks(2, _pretrain, native)
    assert ours["weights_sha256"] == json.loads((tmp_path / "native" / "summary.json").read_text())["weights_sha256"]
    history = read_journal(tmp_path / "deepspeed" / "metrics.jsonl")
    assert history[-1]["loss"] < history[0]["loss"] - 0.2


def test_a_killed_and_resumed_run_ends_bit_equal_to_one_that_was_not(tmp_path: Path) -> None:
    steps = ("--steps", "60", "--save-every", "20")
    calm = train(tmp_path / "calm", CONFIG, *steps)
    killed = tmp_path / "killed"
    with start(killed, CONFIG, *steps) as job:
        deadline = time.monotonic() + 200
        while max((line["step"] for line in read_journal(killed / "metrics.jsonl")), default=0) < 25:
            assert job.running(), killed.with_suffix(".printed").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert len(job.kill()) == 3
    resumed = train(killed, CONFIG, *steps)
    assert (calm["resumed_from"], resumed["resumed_from"]) == (0, 20)
    assert resumed["weights_sha256"] == calm["weights_sha256"]
    losses = [[line["loss"] for line in read_journal(d / "metrics.jsonl")] for d in (tmp_path / "calm", killed)]
    assert losses[0] == losses[1]
    with start(killed, CONFIG, *steps, "--seed", "1") as job:
        assert job.wait(200) != 0
    assert (
        "pass the same arguments and config, or another --checkpoint-dir" in killed.with_suffix(".printed").read_text()
    )
