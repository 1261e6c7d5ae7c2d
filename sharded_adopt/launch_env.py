"""Rank, world size and meeting point of this process, and the process group made from them.

Reading the environment is a pure function of a mapping (`LaunchEnv.from_mapping`): it writes nothing, so a test passes
a dict and a library that calls it changes nothing for others. One small reader a launcher; the first that knows itself
wins.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # public, but torch does not list it

__all__ = ["LaunchEnv", "init_distributed"]


@dataclass(frozen=True, slots=True)
class LaunchEnv:
    """Where this process stands in its job.

    Attributes:
        rank: number of this process in the job, from 0.
        world_size: processes in the job.
        local_rank: number of this process on its machine, from 0; it picks the CUDA device.
        local_world_size: processes of the job on this machine.
        master_addr: host that all ranks can reach, `None` for a lone process.
        master_port: port of the store on that host, `None` for a lone process.
        restart_count: restarts of the job as its launcher counts them, 0 where it does not. Not the same on all
            ranks: a torchrun agent counts only the failures of its own workers.
        launcher: `"torchrun"`, `"env"` (torch's variables, set by somebody else) or `"alone"`.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str | None
    master_port: int | None
    restart_count: int
    launcher: str

    def __post_init__(self) -> None:
        for what, number, count in (
            ("rank", self.rank, self.world_size),
            ("local rank", self.local_rank, self.local_world_size),
        ):
            if not 0 <= number < count:
                raise ValueError(
                    f"{what} must be between 0 and {count - 1} in a world of {count}, got {number}; "
                    f"check what {self.launcher} exported"
                )
        if self.master_port is not None and not 0 < self.master_port < 2**16:
            raise ValueError(f"MASTER_PORT must be a port from 1 to 65535, got {self.master_port}")

    @classmethod
    def from_mapping(cls, environ: Mapping[str, str]) -> LaunchEnv:
        """Read the place of this process from `environ`, which is not modified.

        Raises `ValueError` where the variables of a launcher are incomplete, malformed or of a launcher that is not
        supported: running alone by mistake would train as many separate models as there are processes.
        """
        for reader in _READERS:
            found = reader(environ)
            if found is not None:
                return found
        return cls(
            rank=0,
            world_size=1,
            local_rank=0,
            local_world_size=1,
            master_addr=None,
            master_port=None,
            restart_count=0,
            launcher="alone",
        )


def _torch_variables(environ: Mapping[str, str]) -> LaunchEnv | None:
    """Torch's own variables: torchrun sets all of them, Kubernetes operators those that have no LOCAL in the name."""
    required = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    # MASTER_ADDR and MASTER_PORT alone are no launcher: users export them for good, in their shell.
    if not environ.get("RANK") and not environ.get("WORLD_SIZE"):
        return None
    if missing := [name for name in required if not environ.get(name)]:
        present = [name for name in required if name not in missing]
        raise ValueError(
            f"expected RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT together, got only {', '.join(present)}; set "
            f"{', '.join(missing)} too, start with torchrun, or unset RANK and WORLD_SIZE to run alone"
        )
    # One process a machine where nobody says otherwise.
    local_rank = _integer(environ, "LOCAL_RANK", 0)
    return LaunchEnv(
        rank=_integer(environ, "RANK"),
        world_size=_integer(environ, "WORLD_SIZE"),
        local_rank=local_rank,
        local_world_size=_integer(environ, "LOCAL_WORLD_SIZE", local_rank + 1),
        master_addr=environ["MASTER_ADDR"],
        master_port=_integer(environ, "MASTER_PORT"),
        restart_count=_integer(environ, "TORCHELASTIC_RESTART_COUNT", 0),
        launcher="torchrun" if "TORCHELASTIC_RUN_ID" in environ else "env",
    )


def _open_mpi(environ: Mapping[str, str]) -> LaunchEnv | None:
    """Variables of Open MPI (OMPI_) and of MPICH's Hydra (PMI_)."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if _integer(environ, name, 1) > 1:
            raise _not_supported("mpirun", name, environ)
    return None


def _slurm(environ: Mapping[str, str]) -> LaunchEnv | None:
    """Variables that Slurm gives to each task of a step (SLURM_PROCID is not set in a shell of salloc)."""
    tasks = "SLURM_STEP_NUM_TASKS" if environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    if environ.get("SLURM_PROCID") and _integer(environ, tasks, 1) > 1:
        raise _not_supported("Slurm", tasks, environ)
    return None


# Torch's variables first: inside an allocation, torchrun's workers see Slurm's variables as well.
_READERS: tuple[Callable[[Mapping[str, str]], LaunchEnv | None], ...] = (_torch_variables, _open_mpi, _slurm)


def _not_supported(launcher: str, name: str, environ: Mapping[str, str]) -> ValueError:
    return ValueError(
        f"this process is one of {environ[name]} that {launcher} started ({name}), and without RANK and WORLD_SIZE "
        f"each would train alone; {launcher} is not read yet: start one torchrun a machine instead, or export RANK, "
        "WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each process"
    )


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if not text and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ValueError(f"environment variable {name} must be an integer, got {text!r}") from None


def init_distributed(
    backend: str | None = None,
    timeout: datetime.timedelta | float | None = None,
    *,
    environ: Mapping[str, str] | None = None,
) -> LaunchEnv:
    """Initialise torch.distributed for this process, however it was started, and say where it stands.

    Works under torchrun, with torch's variables set by others, and alone: then the group has one rank and its store
    lives in the process, so no variable, port or file is needed. A second call returns the same and does nothing.
    Survives restarts by torchrun, see [Note: the store outlives the job].

    Args:
        backend: as in `torch.distributed.init_process_group`. `None` takes `"cpu:gloo,cuda:nccl"` where CUDA is
            available, else `"gloo"`. Where it names NCCL, the CUDA device of the local rank is made the current one.
        timeout: for the meeting and for collectives on the default group, in seconds or as a timedelta; `None` takes
            torch's defaults.
        environ: what to read instead of `os.environ`; never written.

    Raises:
        ValueError: the variables are incomplete or malformed, or disagree with a group that exists already.
        TimeoutError: some ranks did not come; the message of rank 0 names them.
    """
    import torch
    import torch.distributed as dist

    environ = os.environ if environ is None else environ
    place = LaunchEnv.from_mapping(environ)
    if dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) != (place.rank, place.world_size):
            raise ValueError(
                f"torch.distributed is initialised as rank {dist.get_rank()} of {dist.get_world_size()}, but the "
                f"environment ({place.launcher}) says rank {place.rank} of {place.world_size}; initialise it once, "
                "with init_distributed() or with torch"
            )
        return place
    if backend is None:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if timeout is not None and not isinstance(timeout, datetime.timedelta):
        timeout = datetime.timedelta(seconds=timeout)
    if "nccl" in backend:
        torch.cuda.set_device(_cuda_device(place, torch.cuda.device_count(), environ))
    dist.init_process_group(
        backend, store=_meeting_point(place, timeout), rank=place.rank, world_size=place.world_size, timeout=timeout
    )
    return place


def _cuda_device(place: LaunchEnv, devices: int, environ: Mapping[str, str]) -> int:
    """Index of the CUDA device of this rank, among the `devices` that it can see."""
    if place.local_rank < devices:
        return place.local_rank
    # Some launchers show each process its own device only.
    if devices == 1 and environ.get("CUDA_VISIBLE_DEVICES"):
        return 0
    raise ValueError(
        f"expected a CUDA device for local rank {place.local_rank}, but {devices} are visible; start at most one "
        "process a device, or pass backend='gloo' to train on the CPU"
    )


def _meeting_point(place: LaunchEnv, timeout: datetime.timedelta | None) -> Store:
    """The store through which the ranks find each other; one process needs none but its own memory."""
    from torch.distributed import HashStore, PrefixStore, rendezvous  # type: ignore[attr-defined]

    if place.master_addr is None:
        return HashStore()
    host = f"[{place.master_addr}]" if ":" in place.master_addr else place.master_addr
    options = {} if timeout is None else {"timeout": timeout}
    # With a tcp:// address torch decides, as with env://, whether rank 0 serves the store or torchrun's agent does.
    store, _, _ = next(
        rendezvous(f"tcp://{host}:{place.master_port}", rank=place.rank, world_size=place.world_size, **options)
    )
    seconds = (timeout or store.timeout).total_seconds()
    return PrefixStore(agree_on_round(store, place.rank, place.world_size, seconds), store)


def agree_on_round(store: Store, rank: int, world_size: int, timeout: float) -> str:
    """Agree on a name that no earlier attempt of this job used; collective over all ranks, through `store` alone.

    [Note: the store outlives the job]
    The agent of torchrun serves the store, and the store lives on when the workers are restarted (torch 2.13), so a
    restarted rank may read the address of a peer that is dead. TORCHELASTIC_RESTART_COUNT cannot tell the attempts
    apart: an agent whose own workers were well restarts them without counting. So rank 0 draws a fresh number, and
    every other rank asks for it under a ticket of its own: an answer to a ticket can come only from a rank 0 that
    lives. Rank 0 may meet the tickets of ranks that died; it answers those too, nobody reads it, and it waits until
    each rank of *this* round has signed.

    Raises `TimeoutError` after `timeout` seconds; on rank 0 it names the ranks that did not come.
    """
    root = "sharded_adopt"
    if rank == 0:
        name = f"{root}/round-{store.add(f'{root}/rounds', 1)}"
        signatures = {peer: f"{name}/signed-{peer}" for peer in range(1, world_size)}
        answered = 0
        deadline = time.monotonic() + timeout
        while not store.check(list(signatures.values())):
            tickets = store.add(f"{root}/tickets", 0)
            for ticket in range(answered + 1, tickets + 1):
                store.set(f"{root}/answer-{ticket}", name)
            answered = tickets
            if time.monotonic() > deadline:
                missing = [peer for peer, signature in signatures.items() if not store.check([signature])]
                raise TimeoutError(
                    f"ranks {missing} of {world_size} did not come within {timeout:g} s; look at why they ended, or "
                    "pass a longer timeout"
                )
            time.sleep(0.01)
        return name
    ticket = store.add(f"{root}/tickets", 1)
    try:
        store.wait([f"{root}/answer-{ticket}"], datetime.timedelta(seconds=timeout))
    except RuntimeError as error:  # torch's DistStoreError
        raise TimeoutError(
            f"rank {rank} of {world_size} got no answer from rank 0 within {timeout:g} s; look at why rank 0 ended"
        ) from error
    name = store.get(f"{root}/answer-{ticket}").decode()
    store.set(f"{name}/signed-{rank}", "here")
    return name
