"""Scripts without a line of ours, started by real launchers through `sharded_adopt.run`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hosting import free_port

from sharded_adopt import ADOPT

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: make ecosystem")

SCRIPT = """
import argparse, json, os, sys

if os.environ.get("NO_BUILD"):
    os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported, as scripts do
started = {"modules": [m for m in ("torch", "deepspeed") if m in sys.modules], "name": __name__}
started |= {"path": sys.path[0], "argv": sys.argv[0], "arguments": sys.argv[1:]}
started |= {"main": sys.modules["__main__"].__file__}

import torch
import deepspeed
import helper

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--steps", type=int)
parser = deepspeed.add_config_arguments(parser)
args = parser.parse_args()
if os.environ.get("NO_BUILD"):
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
torch.manual_seed(0)
model = torch.nn.Linear(7, 3)
engine, *_ = deepspeed.initialize(args, model, model_parameters=model.parameters())
for step in range(args.steps):
    engine.backward(engine(torch.full((2, 7), 1.0 + step)).square().mean())
    engine.step()
optimizer = engine.optimizer.optimizer
started |= {"optimizer": type(optimizer).__module__ + "." + type(optimizer).__name__, "helper": helper.__file__}
started |= {"options": {"lr": optimizer.defaults["lr"], "betas": optimizer.defaults["betas"]}}
started |= {"weights": model.weight.flatten().tolist()}
rank = torch.distributed.get_rank()
json.dump(started, open(os.path.join(os.environ["RESULTS"], f"rank-{rank}.json"), "w"))
torch.distributed.destroy_process_group()
sys.stdout.flush()
# DeepSpeed keeps its group, whose thread may still be letting go of the last all-gather's tensors. torch 2.13 aborts if
# it comes to that while the interpreter ends (ProcessGroupGloo::runLoop waits for the GIL in a destructor).
os._exit(0)
"""
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.0,
    "optimizer": {"type": "ADOPT", "params": {"lr": 0.25, "betas": [0.5, 0.75]}},
    "zero_optimization": {"stage": 2},
}


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A user's directory: `code/train.py` and what it imports from beside it, a config, and where results go."""
    (tmp_path / "code").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "code" / "train.py").write_text(SCRIPT)
    (tmp_path / "code" / "helper.py").write_text("")
    (tmp_path / "ds_config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def launch(job: Path, *command: str, **environment: str) -> list[dict[str, Any]]:
    """Run a launcher in the user's directory; returns what each rank has seen."""
    ours = {"RESULTS": str(job / "results"), "GLOO_SOCKET_IFNAME": "lo", "NO_BUILD": "1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **ours, **environment}
    ran = subprocess.run(command, cwd=job, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-6000:]
    return [json.loads(path.read_text()) for path in sorted((job / "results").glob("rank-*.json"))]


def console_script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


DEEPSPEED = [console_script("deepspeed"), "--num_gpus", "2", "--module", "sharded_adopt.run"]
TORCHRUN = [console_script("torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "sharded_adopt.run"]
ARGUMENTS = ["--steps", "3", "--deepspeed_config", "ds_config.json"]


def expected_weights() -> list[float]:
    """The same in one process; both ranks see the same batches."""
    torch.manual_seed(0)
    model = torch.nn.Linear(7, 3)
    optimizer = ADOPT(model.parameters(), lr=0.25, betas=(0.5, 0.75))
    for step in range(3):
        optimizer.zero_grad()
        model(torch.full((2, 7), 1.0 + step)).square().mean().backward()
        optimizer.step()
    return model.weight.flatten().tolist()


def assert_ran_as_python_would(job: Path, ranks: list[dict[str, Any]]) -> None:
    assert len(ranks) == 2
    for seen in ranks:
        assert seen["modules"] == [], "imported before the script could set its environment"
        assert seen["name"] == "__main__"
        assert seen["path"] == str(job / "code")
        assert seen["helper"] == str(job / "code" / "helper.py")
        assert seen["main"] == seen["argv"] == "code/train.py"
        assert seen["optimizer"] == "sharded_adopt.adopt.ADOPT"
        assert seen["options"] == {"lr": 0.25, "betas": [0.5, 0.75]}
        assert seen["weights"] == expected_weights()


def test_torchrun_runs_a_script_that_does_not_know_of_us(job: Path) -> None:
    ranks = launch(job, *TORCHRUN, "code/train.py", *ARGUMENTS)
    assert_ran_as_python_would(job, ranks)
    assert [seen["arguments"] for seen in ranks] == [ARGUMENTS, ARGUMENTS]


def test_deepspeeds_launcher_runs_a_script_that_does_not_know_of_us(job: Path) -> None:
    ranks = launch(job, DEEPSPEED[0], "--master_port", str(free_port()), *DEEPSPEED[1:], "code/train.py", *ARGUMENTS)
    assert_ran_as_python_would(job, ranks)
    assert [seen["arguments"] for seen in ranks] == [["--local_rank=0", *ARGUMENTS], ["--local_rank=1", *ARGUMENTS]]


@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("ninja")), reason="needs g++ and ninja")
def test_the_operation_that_deepspeed_compiles_for_itself_gives_the_same(job: Path) -> None:
    """As users run it: initialize() builds its shared memory communication first, here into a folder of its own."""
    extensions = job / "extensions"
    building = {"NO_BUILD": "", "TORCH_EXTENSIONS_DIR": str(extensions)}
    ranks = launch(job, *TORCHRUN, "code/train.py", *ARGUMENTS, **building)
    assert list(extensions.rglob("deepspeed_shm_comm.so"))
    assert_ran_as_python_would(job, ranks)


def test_a_module_is_run_as_python_dash_m_would(job: Path) -> None:
    (job / "code" / "train.py").rename(job / "code" / "__main__.py")
    (job / "code" / "__init__.py").write_text("")
    (job / "code" / "helper.py").rename(job / "helper.py")
    for seen in launch(job, *TORCHRUN, "-m", "code", *ARGUMENTS):
        assert seen["name"] == "__main__"
        assert seen["path"] == str(job)
        assert seen["main"] == seen["argv"] == str(job / "code" / "__main__.py")
        assert seen["optimizer"] == "sharded_adopt.adopt.ADOPT"


def test_without_the_runner_deepspeed_does_not_know_the_name(job: Path) -> None:
    command = [word for word in TORCHRUN if word not in ("-m", "sharded_adopt.run")]
    with pytest.raises(AssertionError, match="ADOPT is not a supported DeepSpeed Optimizer"):
        launch(job, *command, "code/train.py", *ARGUMENTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a script, or -m and a module, got []"),
        (["--steps", "3"], "expected a script, or -m and a module, got ['--steps', '3']"),
        (["no_such.py"], "there is no file 'no_such.py' in"),
    ],
)
def test_the_runner_says_what_it_was_not_given(job: Path, arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "sharded_adopt.run", *arguments]
    ran = subprocess.run(command, cwd=job, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 2
    assert message in ran.stderr
    assert ran.stderr.startswith("usage: ")
