"""What goes over the wire: how many collectives, how many bytes, and no pickles."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_memory_plan import CASES, Model

from sharded_adopt import ShardedOptimizer


def train(model: Model, optimizer: ShardedOptimizer, rank: int, steps: int) -> None:
    for step in range(steps):
        with optimizer.no_sync():
            model(torch.tensor([7 * step + rank])).backward()
        model(torch.tensor([7 * step + rank + 1])).backward()
        optimizer.step()
        optimizer.zero_grad()


def count_messages(rank: int, world_size: int, name: str, steps: int) -> tuple[dict[str, int], int]:
    model, optimizer = CASES[name].make()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        train(model, optimizer, rank, steps)
    # Every message of torch.distributed, whoever sends it, is an operator of this namespace.
    counts = {one.key: one.count for one in profiler.key_averages() if one.key.startswith("c10d::")}
    return counts, len(optimizer.layout.buckets)


@pytest.mark.parametrize("name", ["ZeRO-1", "ZeRO-2", "ZeRO-2 without overlap", "bf16, main values", "AdamW amsgrad"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_step_is_two_collectives_a_bucket_and_one_more(world_size: int, name: str) -> None:
    steps, others = 3, world_size - 1
    for counts, buckets in run_ranks(world_size, count_messages, name, steps):
        # An exchange is one collective: a message to every other rank and one from each.
        assert counts.pop("c10d::recv_") == counts["c10d::send"]
        exchanges, rest = divmod(counts.pop("c10d::send"), others)
        assert rest == 0
        assert buckets > 3
        assert exchanges == steps * 2 * buckets
        assert counts == {"c10d::allreduce_": steps}


def never_pickle(rank: int, world_size: int, name: str) -> None:
    model, optimizer = CASES[name].make()

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was pickled")

    kept = pickle.dumps, pickle.Pickler, dist.distributed_c10d._object_to_tensor
    pickle.dumps = pickle.Pickler = dist.distributed_c10d._object_to_tensor = refuse  # type: ignore[misc, assignment]
    with pytest.raises(AssertionError, match="was pickled"):
        dist.all_gather_object([None] * world_size, rank)
    train(model, optimizer, rank, 2)
    optimizer.clip_grad_norm_(1.0)
    pickle.dumps, pickle.Pickler, dist.distributed_c10d._object_to_tensor = kept  # type: ignore[misc]


@pytest.mark.parametrize("name", ["ZeRO-1", "ZeRO-2", "given gradients"])
def test_after_construction_nothing_is_pickled(name: str) -> None:
    run_ranks(2, never_pickle, name)


def read_loopback() -> int:
    """Bytes that the loopback interface of this network namespace has sent."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    (line,) = (line for line in lines if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


WIDTH, LAYERS = 1024, 12


def count_on_loopback(rank: int, world_size: int, frees: bool, steps: int) -> tuple[float, int]:
    """Bytes on the wire in an undisturbed step, a rank and parameter, and bytes that the plan says a rank sends."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))  # 12.6 M parameters
    optimizer = ShardedOptimizer(model.named_parameters(), lr=1e-3, shard_gradients=frees)
    sent = []
    for _ in range(steps):
        dist.barrier()
        before = read_loopback()
        dist.barrier()
        model(torch.ones(1, WIDTH)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        sent.append(read_loopback() - before)
    # The least: at first, and where another process holds a rank up, TCP cuts its segments small.
    numel = sum(p.numel() for p in model.parameters())
    return min(sent) / (world_size * numel), optimizer.memory_plan().sent


OWN_NETWORK = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


def own_network_is_allowed() -> bool:
    if shutil.which("unshare") is None or not Path("/proc/self/net/dev").exists():
        return False
    return subprocess.run([*OWN_NETWORK, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not own_network_is_allowed(), reason="no right to make a network namespace of its own")
@pytest.mark.parametrize("frees", [False, True], ids=["kept", "freed"])
def test_two_ranks_send_at_most_4_02_bytes_a_parameter_by_the_loopback_counters(frees: bool) -> None:
    # Elsewhere other processes would be counted too.
    command = [*OWN_NETWORK, sys.executable, __file__, json.dumps(frees)]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(command, env=paths, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    for bytes_a_parameter, planned in json.loads(ran.stdout):
        assert 4.0 <= bytes_a_parameter <= 4.02
        assert planned == 4 * LAYERS * (WIDTH * WIDTH + WIDTH)


if __name__ == "__main__":
    print(json.dumps(run_ranks(2, count_on_loopback, json.loads(sys.argv[1]), 15)))
