"""Where a process stands, and the group made from it: alone, under torchrun, and after torchrun restarted the job."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from job import Job
from ranks import run_ranks

from sharded_adopt import init_distributed
from sharded_adopt.launch_env import LaunchEnv, _cuda_device, agree_on_round

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node-a",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "job",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


def test_torchrun_variables_are_read() -> None:
    assert LaunchEnv.from_mapping(TORCHRUN) == LaunchEnv(5, 8, 1, 4, "node-a", 29500, 2, "torchrun")


def test_nothing_set_is_a_lone_process() -> None:
    assert LaunchEnv.from_mapping({}) == LaunchEnv(0, 1, 0, 1, None, None, 0, "alone")


def test_an_address_left_in_the_shell_does_not_make_a_job() -> None:
    assert LaunchEnv.from_mapping({"MASTER_ADDR": "node-a", "MASTER_PORT": "29500"}).launcher == "alone"


def test_one_process_a_machine_needs_no_local_rank() -> None:
    place = LaunchEnv.from_mapping({"RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "a", "MASTER_PORT": "1"})
    assert (place.local_rank, place.local_world_size, place.launcher) == (0, 1, "env")


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_incomplete_variables_are_an_error_that_names_what_is_missing(missing: str) -> None:
    with pytest.raises(ValueError, match=f"set {missing} too"):
        LaunchEnv.from_mapping({name: value for name, value in TORCHRUN.items() if name != missing})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "two", "RANK must be an integer, got 'two'"),
        ("RANK", "8", "rank must be between 0 and 7 in a world of 8, got 8"),
        ("RANK", "-1", "rank must be between 0 and 7"),
        ("WORLD_SIZE", "0", "in a world of 0"),
        ("LOCAL_RANK", "4", "local rank must be between 0 and 3 in a world of 4, got 4"),
        ("MASTER_PORT", "70000", "port from 1 to 65535, got 70000"),
    ],
)
def test_malformed_variables_are_an_error_that_says_what_was_expected(name: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LaunchEnv.from_mapping({**TORCHRUN, name: value})


@pytest.mark.parametrize(
    "environ",
    [
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"},
        {"PMI_SIZE": "4", "PMI_RANK": "0"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},
        {"SLURM_PROCID": "3", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "4"},
    ],
)
def test_other_launchers_are_an_error_instead_of_separate_runs(environ: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"is one of 4 that .* would train alone; .* torchrun"):
        LaunchEnv.from_mapping(environ)


@pytest.mark.parametrize(
    "environ",
    [
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},  # a shell of salloc: nothing was started by srun
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
    ],
)
def test_a_single_task_of_another_launcher_is_a_lone_process(environ: dict[str, str]) -> None:
    assert LaunchEnv.from_mapping(environ).launcher == "alone"


def test_torchrun_inside_an_allocation_is_torchrun() -> None:
    assert LaunchEnv.from_mapping({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", **TORCHRUN}).launcher == "torchrun"


def test_cuda_device_is_the_local_rank_unless_each_process_sees_its_own_only() -> None:
    place = LaunchEnv.from_mapping(TORCHRUN)
    assert _cuda_device(place, 4, {}) == 1
    assert _cuda_device(place, 1, {"CUDA_VISIBLE_DEVICES": "3"}) == 0
    with pytest.raises(ValueError, match="local rank 1, but 1 are visible"):
        _cuda_device(place, 1, {})


def _alone_group(_rank: int, _world_size: int) -> list[object]:
    dist.destroy_process_group()
    before = dict(os.environ)
    first = init_distributed(environ={}, timeout=20)
    again = init_distributed(environ={})
    total = torch.ones(3)
    dist.all_reduce(total)
    facts = [first == again, dist.get_world_size(), dist.get_backend(), total.tolist(), dict(os.environ) == before]
    dist.destroy_process_group()
    init_distributed(environ={})  # and again from the start
    return [*facts, dist.is_initialized()]


def test_a_lone_process_needs_no_environment_and_leaves_it_alone() -> None:
    assert run_ranks(1, _alone_group) == [[True, 1, "gloo", [1.0, 1.0, 1.0], True, True]]


def _foreign_group(_rank: int, _world_size: int) -> str:
    try:
        init_distributed(environ={})
    except ValueError as error:
        return str(error)
    return ""


def test_a_group_that_disagrees_with_the_environment_is_an_error() -> None:
    for rank, message in enumerate(run_ranks(2, _foreign_group)):
        assert f"initialised as rank {rank} of 2" in message
        assert "says rank 0 of 1" in message


def _meet(store: dist.Store, world_size: int, names: dict[int, str], missing: tuple[int, ...] = ()) -> None:
    """Let the ranks of a round meet in threads; each gets its own view of the store, as its own process would."""

    def member(rank: int) -> None:
        names[rank] = agree_on_round(store, rank, world_size, 20.0)

    threads = [threading.Thread(target=member, args=(rank,)) for rank in range(world_size) if rank not in missing]
    for thread in threads:
        thread.start()
        time.sleep(0.002)
    for thread in threads:
        thread.join()


def test_every_round_on_one_store_gets_a_name_of_its_own() -> None:
    store = dist.HashStore()
    seen = set()
    for world_size in (4, 2, 1, 3):
        names: dict[int, str] = {}
        _meet(store, world_size, names)
        assert len(names) == world_size
        assert len(set(names.values())) == 1
        seen |= set(names.values())
    assert len(seen) == 4


def test_tickets_of_dead_ranks_do_not_stand_for_the_living() -> None:
    """A rank that died while it waited left its ticket; rank 0 must not take it for the rank that replaces it."""
    store = dist.HashStore()
    for rank in (1, 2):
        with pytest.raises(TimeoutError, match=f"rank {rank} of 3 got no answer from rank 0 within 0.01 s"):
            agree_on_round(store, rank, 3, 0.01)
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] of 3 did not come within 0.05 s"):
        agree_on_round(store, 0, 3, 0.05)
    names: dict[int, str] = {}
    _meet(store, 3, names)
    assert len(set(names.values())) == 1


KILLED_WORKERS = """
import json, os, pathlib, signal, sys
import torch, torch.distributed as dist
from sharded_adopt import init_distributed

log, kills, victim, survivors = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
place = init_distributed(timeout=60)
attempts = len(list(log.glob(f"*-of-rank-{place.rank}")))
group = dist.new_group()  # as the engine does: its addresses go through the same store
total = torch.tensor([float(place.rank + 1)])
dist.all_reduce(total, group=group)
(log / f"{attempts}-of-rank-{place.rank}").write_text(json.dumps([total.item(), place.restart_count]))
dist.barrier()
if attempts < kills and place.rank == victim:
    os.kill(os.getpid(), signal.SIGKILL)
if attempts < kills and survivors == "busy":
    signal.pause()  # until the agent ends this worker
dist.barrier()  # survivors that wait here get an error
dist.destroy_process_group()
"""


def test_a_job_whose_worker_is_killed_comes_up_again_under_torchrun(tmp_path: Path) -> None:
    """torch 2.13 itself fails here more often than not: restarted ranks read addresses of dead peers from the store."""
    script = tmp_path / "job.py"
    script.write_text(KILLED_WORKERS)
    (tmp_path / "log").mkdir()
    with (
        (tmp_path / "output").open("w+") as output,
        Job(
            2, script, [str(tmp_path / "log"), "4", "1", "waiting"], torchrun=["--max-restarts", "4"], output=output
        ) as job,
    ):
        code = job.wait(180)
    assert code == 0, (tmp_path / "output").read_text()
    attempts = [json.loads((tmp_path / "log" / f"{n}-of-rank-{r}").read_text()) for n in range(5) for r in range(2)]
    assert attempts == [[3.0, n] for n in range(5) for _ in range(2)]


def test_two_agents_that_count_restarts_differently_meet_again(tmp_path: Path) -> None:
    """The agent whose own worker was well restarts it without counting, so the restart count names no attempt."""
    script = tmp_path / "job.py"
    script.write_text(KILLED_WORKERS)
    (tmp_path / "log").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "pair", "--max-restarts", "2"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "output").open("w+") as output:
        agents = [
            subprocess.Popen(
                [*command, str(script), str(tmp_path / "log"), "1", "1", "busy"],
                env=environ,
                stdout=output,
                stderr=output,
            )
            for _ in range(2)
        ]
        try:
            codes = [agent.wait(120) for agent in agents]
        finally:
            for agent in agents:
                agent.terminate()  # a live agent ends its workers; an ended one is not signalled
                agent.wait()
    assert codes == [0, 0], (tmp_path / "output").read_text()
    sums, counts = zip(
        *(json.loads((tmp_path / "log" / f"1-of-rank-{rank}").read_text()) for rank in range(2)), strict=True
    )
    assert sums == (3.0, 3.0)
    assert sorted(counts) == [0, 1]
