"""Measure whole train steps of two ranks on gloo: ours, DDP, torch's ZeRO, FSDP2 and DeepSpeed, interleaved in one run.

    python benchmarks/train_step.py                    # table, benchmarks/results/train-step-*.{json,md,png}
    python benchmarks/train_step.py --rounds 31 --only ours-zero1 ddp-adopt

A GPT of 42.0 M fp32 parameters (8 layers, width 512, 16,384 tokens), one sequence of 64 tokens a rank, one thread a
rank. All variants are set up in the same two processes; a round runs one step of each, in an order that rotates from
round to round, and a ratio is taken between two times of the same round. The time of a step is that of the slowest
rank, from before the forward to after `zero_grad`; so is its CPU time, of all threads of the process. Bytes on the wire
are those of the loopback interface of a network namespace of its own, all ranks together over their number; without the
right to make one they are left out.

A variant whose package is not installed is left out, and said so.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measured import machine, on_ranks, ratio
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from byte_gpt import Block, GPTConfig

REFERENCE = "ddp-adopt"
LAYERS, WIDTH, VOCABULARY, CONTEXT = 8, 512, 16384, 64
LR = 1e-6  # of a benchmark: the model shall not change much from round to round


class GPT(nn.Module):
    """The blocks of the example under a vocabulary of a real size; the output is not tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        config = GPTConfig(layers=LAYERS, heads=8, width=WIDTH, context=CONTEXT)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block(config) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean loss of predicting each next token; `tokens` is batch x (context + 1), int64."""
        x = self.embedding(tokens[:, :-1]) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to train: `backward(tokens)` leaves gradients, `step()` uses and drops them."""

    backward: Callable[[Tensor], None]
    step: Callable[[], None]
    optimizer: Any


def _variant(model: nn.Module, optimizer: Any) -> Variant:
    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Variant(lambda tokens: model(tokens).backward(), step, optimizer)


def _ddp(model: nn.Module, views: bool = False) -> DistributedDataParallel:
    return DistributedDataParallel(model, gradient_as_bucket_view=views)


def _adopt_class() -> Any:
    """The authors' class."""
    return importlib.import_module("adopt").ADOPT


def _torch_adopt(params: Any, **options: Any) -> Any:
    return _adopt_class()(params, lr=LR, **options)


def _adamw(params: Any) -> Any:
    return torch.optim.AdamW(params, lr=LR, fused=True)


def _zero(optimizer_class: Any, **options: Any) -> Callable[[], Variant]:
    def make() -> Variant:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        model = _ddp(GPT(), views=True)
        sharded = ZeroRedundancyOptimizer(
            model.parameters(), optimizer_class(), parameters_as_bucket_view=True, lr=LR, **options
        )
        return _variant(model, sharded)

    return make


def _fsdp2(make_optimizer: Callable[[Any], Any], reshard: bool) -> Callable[[], Variant]:
    def make() -> Variant:
        from torch.distributed.fsdp import fully_shard

        model = GPT()
        for block in model.blocks:
            fully_shard(block, reshard_after_forward=reshard)
        fully_shard(model, reshard_after_forward=reshard)
        return _variant(model, make_optimizer(model.parameters()))

    return make


def _deepspeed(stage: int) -> Callable[[], Variant]:
    def make() -> Variant:
        import deepspeed
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing to compile for two gloo ranks
        model = GPT()
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=_torch_adopt(model.parameters()), config=config)
        return Variant(lambda tokens: engine.backward(engine(tokens)), lambda: engine.step(), engine.optimizer)

    return make


def _ours(**options: Any) -> Callable[[], Variant]:
    def make() -> Variant:
        from sharded_adopt import ShardedADOPT

        model = GPT()
        return _variant(model, ShardedADOPT(model.parameters(), lr=LR, **options))

    return make


def _ours_adamw() -> Variant:
    from sharded_adopt import ShardedOptimizer

    model = GPT()
    return _variant(model, ShardedOptimizer(model.parameters(), torch.optim.AdamW, lr=LR, fused=True))


def _plain_adopt(params: Any) -> Any:
    from sharded_adopt import ADOPT

    return ADOPT(params, lr=LR)


def _on_ddp(make_optimizer: Callable[[Any], Any], views: bool = False) -> Callable[[], Variant]:
    def make() -> Variant:
        model = _ddp(GPT(), views)
        return _variant(model, make_optimizer(model.parameters()))

    return make


def _alone() -> Variant:
    model = GPT()
    return Variant(lambda tokens: model(tokens).backward(), model.zero_grad, None)


def _by_hand() -> Variant:
    """What a user would write for two ranks: no buckets, no overlap, no checks, the fused kernel on half of everything.

    Gradients are moved into a flat buffer, halves exchanged and added, one half updated, and the halves exchanged.
    """
    from sharded_adopt import ADOPT

    model, rank = GPT(), dist.get_rank()
    numel = sum(param.numel() for param in model.parameters())
    flat, grads, arrived = torch.zeros(numel), torch.zeros(numel), torch.zeros(numel // 2)
    views = []
    for param, start in zip(model.parameters(), _starts(model), strict=True):
        views.append(grads[start : start + param.numel()].view_as(param))
        flat[start : start + param.numel()].view_as(param).copy_(param.detach())
        param.data = flat[start : start + param.numel()].view_as(param)
    mine, theirs = (half for half in (flat.chunk(2) if rank == 0 else flat.chunk(2)[::-1]))
    kept, sent = (half for half in (grads.chunk(2) if rank == 0 else grads.chunk(2)[::-1]))
    mine.grad = kept
    optimizer = ADOPT([mine], lr=LR)

    def exchange(send: Tensor, receive: Tensor) -> None:
        works = [dist.irecv(receive, 1 - rank), dist.isend(send, 1 - rank)]
        for work in works:
            assert work is not None
            work.wait()

    def step() -> None:
        for param, view in zip(model.parameters(), views, strict=True):
            assert param.grad is not None
            view.copy_(param.grad)
            param.grad = None
        exchange(sent, arrived)
        kept.add_(arrived).mul_(0.5)
        optimizer.step()
        exchange(mine, theirs)

    return Variant(lambda tokens: model(tokens).backward(), step, optimizer)


def _starts(model: nn.Module) -> list[int]:
    return list(itertools.accumulate((param.numel() for param in model.parameters()), initial=0))[:-1]


# name -> (what it is, how it is made)
VARIANTS: dict[str, tuple[str, Callable[[], Variant]]] = {
    "no-optimizer": ("forward and backward only, nothing sent", _alone),
    "ddp-adopt": ("DDP + torch-adopt", _on_ddp(_torch_adopt)),
    "ddp-adopt-foreach": ("DDP + torch-adopt, foreach", _on_ddp(lambda params: _torch_adopt(params, foreach=True))),
    "ddp-view-adopt": ("DDP, gradients as bucket views + torch-adopt", _on_ddp(_torch_adopt, views=True)),
    "ddp-adamw-fused": ("DDP + torch AdamW, fused", _on_ddp(_adamw)),
    "ddp-view-adamw-fused": ("DDP, gradients as bucket views + AdamW fused", _on_ddp(_adamw, views=True)),
    "ddp-ours": ("DDP + sharded_adopt.ADOPT", _on_ddp(_plain_adopt)),
    "by-hand": ("exchange by hand, no overlap, sharded_adopt's kernel", _by_hand),
    "ours-zero1": ("ShardedADOPT, ZeRO-1", _ours()),
    "ours-zero2": ("ShardedADOPT, ZeRO-2", _ours(shard_gradients=True)),
    "ours-adamw": ("ShardedOptimizer, torch AdamW fused", _ours_adamw),
    "zero-adopt": ("torch ZeRO + torch-adopt", _zero(_adopt_class)),
    "zero-adamw-fused": ("torch ZeRO + AdamW fused", _zero(lambda: torch.optim.AdamW, fused=True)),
    "fsdp2-adopt": ("FSDP2 + torch-adopt", _fsdp2(_torch_adopt, reshard=True)),
    "fsdp2-ours": ("FSDP2 + sharded_adopt.ADOPT", _fsdp2(_plain_adopt, reshard=False)),
    "ds1-adopt": ("DeepSpeed ZeRO-1 + torch-adopt", _deepspeed(1)),
    "ds2-adopt": ("DeepSpeed ZeRO-2 + torch-adopt", _deepspeed(2)),
}


def loopback_bytes() -> int:
    """Bytes that the loopback interface of this network namespace has sent."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name.strip() == "lo":
            return int(rest.split()[8])
    raise RuntimeError("this network namespace has no loopback interface")


def run_rank(rank: int, world_size: int, directory: str, names: list[str], rounds: int) -> None:
    """One rank: set every variant up, run the rounds, and (rank 0) write the times to a file."""
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo", DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    warnings.simplefilter("ignore")  # of what other packages use that torch deprecates
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world_size)
    tokens = torch.randint(VOCABULARY, (1, CONTEXT + 1), generator=torch.Generator().manual_seed(rank))
    variants: dict[str, Variant] = {}
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        for name in names:
            torch.manual_seed(0)
            variants[name] = VARIANTS[name][1]()
    seconds: dict[str, list[list[float]]] = {name: [] for name in names}
    sent: dict[str, list[float]] = {name: [] for name in names}
    order = list(names)
    for round_ in range(-2, rounds):  # the first rounds make state and find out sizes
        order = [*order[1:], order[0]]
        for name in order:
            variant = variants[name]
            dist.barrier()
            before = loopback_bytes()
            dist.barrier()
            used = resource.getrusage(resource.RUSAGE_SELF)
            start = time.perf_counter()
            variant.backward(tokens)
            middle = time.perf_counter()
            variant.step()
            end = time.perf_counter()
            cpu = resource.getrusage(resource.RUSAGE_SELF)
            user, system = cpu.ru_utime - used.ru_utime, cpu.ru_stime - used.ru_stime
            times = torch.tensor([end - start, end - middle, user, system], dtype=torch.float64)
            dist.barrier()
            after = loopback_bytes()
            dist.all_reduce(times, op=dist.ReduceOp.MAX)
            if round_ >= 0:
                seconds[name].append(times.tolist())
                sent[name].append((after - before) / world_size)
        if rank == 0:
            print(f"\rround {max(0, round_ + 1)}/{rounds}", end="", file=sys.stderr, flush=True)
    if rank == 0:
        print(file=sys.stderr)
        found = {"seconds": seconds, "sent": sent, "load": os.getloadavg()[0]}
        Path(directory, "found.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # the variants hold groups that end in no particular order


def measure(names: list[str], world_size: int, rounds: int) -> dict[str, Any]:
    """Run all variants on `world_size` processes; return times, ratios and bytes."""
    counts_bytes = os.environ.get("SHARDED_ADOPT_OWN_NETWORK") == "1"
    numel = sum(param.numel() for param in GPT().parameters())
    found = on_ranks(world_size, run_rank, names, rounds)
    totals = {name: [one[0] for one in each] for name, each in found["seconds"].items()}
    results: dict[str, Any] = {"numel": numel, "world_size": world_size, "rounds": rounds, "load": found["load"]}
    results["variants"] = {
        name: {
            "what": VARIANTS[name][0],
            "seconds": each,
            **{
                key: statistics.median(one[place] for one in found["seconds"][name])
                for place, key in enumerate(("step_seconds", "user_seconds", "system_seconds"), start=1)
            },
            "of": {other: ratio(each, totals[other]) for other in ("ddp-adopt", "ddp-adamw-fused") if other in totals},
            "bytes_sent": statistics.median(found["sent"][name]) / numel if counts_bytes else None,
        }
        for name, each in totals.items()
    }
    return results


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# A train step on two ranks", ""]
    lines += [", ".join(f"{key} {value}" for key, value in results["machine"].items() if value is not None) + ".", ""]
    lines += [
        f"A GPT of {results['numel'] / 1e6:.1f} M fp32 parameters, {results['world_size']} gloo ranks with one thread "
        f"each, one sequence of {CONTEXT} tokens a rank; {results['rounds']} rounds, load of the machine "
        f"{results['load']:.1f}. Ratios are medians over the rounds (least to most). Rerun: "
        "`python benchmarks/train_step.py`.",
        "",
        "| | x DDP + torch-adopt | x DDP + fused AdamW | ms | of it `step()` | CPU ms a rank, user + system | "
        "bytes sent, a rank and parameter |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in results["variants"].values():
        spreads = [
            f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else ""
            for ratio in (one["of"].get("ddp-adopt"), one["of"].get("ddp-adamw-fused"))
        ]
        sent = "" if one["bytes_sent"] is None else f"{one['bytes_sent']:.2f}"
        milliseconds = statistics.median(one["seconds"]) * 1e3
        lines.append(
            f"| {one['what']} | {spreads[0]} | {spreads[1]} | {milliseconds:.0f} | {one['step_seconds'] * 1e3:.0f} | "
            f"{one['user_seconds'] * 1e3:.0f} + {one['system_seconds'] * 1e3:.0f} | {sent} |"
        )
    left_out = results["left_out"]
    if left_out:
        lines += ["", "Left out, not installed: " + ", ".join(left_out) + "."]
    return "\n".join(lines) + "\n"


def chart(results: dict[str, Any], path: Path) -> None:
    """Draw the ratios to DDP + torch-adopt as bars with their spread between the quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    reference = results["variants"][REFERENCE]["seconds"]
    shown = {name: one for name, one in results["variants"].items() if name != "no-optimizer"}
    figure, axes = pyplot.subplots(figsize=(8.5, 0.9 + 0.38 * len(shown)), layout="constrained")
    for place, (name, one) in enumerate(shown.items()):
        ratios = [mine / theirs for mine, theirs in zip(one["seconds"], reference, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        color = "#08519c" if name.startswith("ours") else "#9ecae1"
        bar = axes.barh(place, middle, color=color, xerr=[[middle - low], [high - middle]], ecolor="#636363")
        axes.bar_label(bar, labels=[f"{middle:.2f}"], padding=6, fontsize=9)
    axes.axvline(0.6, color="black", linewidth=1, linestyle="--", label="bar: 0.60")
    axes.set_yticks(range(len(shown)), [one["what"] for one in shown.values()], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.margins(x=0.12)
    axes.set_xlabel("time of a train step, x DDP + torch-adopt (median; line: quartiles)", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _installed(names: list[str]) -> tuple[list[str], list[str]]:
    """Split the variants into those whose package is there and the titles of the others."""
    there, left_out = [], []
    for name in names:
        packages = {"torch-adopt": "torch-adopt" in VARIANTS[name][0], "deepspeed": name.startswith("ds")}
        try:
            for package, needed in packages.items():
                if needed:
                    version(package)
            there.append(name)
        except PackageNotFoundError:
            left_out.append(VARIANTS[name][0])
    return there, left_out


def _in_own_network() -> None:
    """Start again in a network namespace of one's own, where nobody else's bytes are counted, if that is allowed."""
    if os.environ.get("SHARDED_ADOPT_OWN_NETWORK") is not None or shutil.which("unshare") is None:
        return
    command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    allowed = subprocess.run([*command, "true"], capture_output=True).returncode == 0
    os.environ["SHARDED_ADOPT_OWN_NETWORK"] = "1" if allowed else "0"
    if allowed:
        os.execvp(command[0], [*command, sys.executable, *sys.argv])
    print("no network namespace of our own: bytes on the wire are left out", file=sys.stderr)


def main() -> None:
    """Parse the command line, measure, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=21, help="at least 15 for figures that are to be quoted")
    parser.add_argument("--name", default="cpu", help="results go to train-step-NAME.{json,md,png}")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--dry", action="store_true", help="print only")
    arguments = parser.parse_args()
    _in_own_network()
    names, left_out = _installed(arguments.only)
    results = {"machine": machine(), "left_out": left_out, **measure(names, 2, arguments.rounds)}
    text = report(results)
    print(text)
    if arguments.dry:
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / f"train-step-{arguments.name}"
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    stem.with_suffix(".md").write_text(text)
    chart(results, stem.with_suffix(".png"))
    print(f"written: {stem}.json, .md, .png")


if __name__ == "__main__":
    main()
