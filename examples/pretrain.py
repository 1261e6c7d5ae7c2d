"""Train a small byte-level GPT with a sharded optimizer; kill it whenever you like and start it again.

    torchrun --nproc-per-node 2 examples/pretrain.py --steps 200 --checkpoint-dir runs/demo
    python examples/pretrain.py

The same command goes on from the newest checkpoint in the directory, at any number of processes. With the same
arguments and number of processes, a run that was killed and resumed ends with bit-equal weights to one that was not
(on CPUs): parameters, optimizer state, schedule and random numbers are one checkpoint, and the batches follow from the
step.

In the checkpoint directory: `metrics.jsonl` has one line a step of the surviving history (step, loss over the global
batch, lr, grad_norm before clipping, for ADOPT update_rms and clipped_share, tokens_per_s, seconds of that step,
world_size, attempt), `metrics.lost.jsonl` the steps that a kill undid and that were taken again, `summary.json` how the
run ended.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from byte_gpt import ByteGPT, GPTConfig
from corpus import load as load_corpus
from corpus import rows_of_rank
from display import Display, print_table, size
from journal import Journal
from journal import read as read_journal
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from sharded_adopt import ShardedADOPT, ShardedOptimizer, checkpoint, init_distributed

# What makes a run what it is: a checkpoint is not continued under other values of these.
RUN_ARGUMENTS = (
    *("seed", "batch", "layers", "heads", "width", "context", "dropout"),
    *("optimizer", "lr", "warmup", "weight_decay", "clip"),
)


def main() -> None:
    """Train as the command line says."""
    args = parse_arguments()
    place = init_distributed(backend="gloo" if args.device == "cpu" else None)
    try:
        train(args, place.rank, place.world_size)
    finally:
        dist.destroy_process_group()


def train(args: argparse.Namespace, rank: int, world_size: int) -> None:
    """Take this rank's part in the job up to `args.steps`, from the newest checkpoint if there is one."""
    corpus = load_corpus(args.corpus, args.context)
    torch.manual_seed(args.seed)
    model = ByteGPT(GPTConfig(args.layers, args.heads, args.width, args.context, args.dropout)).to(args.device)
    optimizer = make_optimizer(args, model)
    scheduler = LambdaLR(optimizer, learning_rate_factor(args.warmup, args.steps))
    seed_dropout(args.seed, rank, world_size, step=0)
    run = {name: getattr(args, name) for name in RUN_ARGUMENTS} | {"corpus_sha256": corpus.sha256}
    loaded = resume(args.checkpoint_dir, run, model, optimizer, scheduler)
    start = loaded.step if loaded else 0
    if loaded and loaded.resharded_from is not None:
        # Random numbers belong to one rank of one world size; draw new ones, not those of the first steps again.
        seed_dropout(args.seed, rank, world_size, start)

    rows = rows_of_rank(args.batch, rank, world_size)
    # The engine averages over the ranks. With this weight on a rank's own mean, the average is the mean over the global
    # batch, also where the rows do not divide evenly.
    weight = len(rows) * world_size / args.batch
    state_nbytes, unsharded_nbytes = count_state(optimizer)
    has_figures = args.optimizer == "adopt"
    if has_figures:
        optimizer.stats()  # from now on
    journal = Journal(args.checkpoint_dir, start) if rank == 0 else None
    saved: checkpoint.Saved | None = None
    with Display(start, args.steps, shown=rank == 0) as display:
        numel = sum(param.numel() for param in model.parameters())
        display.note(f"{numel:,} parameters, {args.optimizer}, world size {world_size}, {args.device}")
        display.note(f"corpus: {len(corpus.text):,} bytes of {corpus.source}")
        display.note(f"corpus sha256: {corpus.sha256}")
        display.note(f"resumed from {loaded.path}" if loaded else "starting at step 0")
        for step in range(start, args.steps):
            began = time.perf_counter()
            lr = scheduler.get_last_lr()[0]
            optimizer.zero_grad()
            loss = torch.zeros((), device=args.device)
            if rows:  # a rank without a batch just steps
                inputs, targets = corpus.batch(
                    seed=args.seed, step=step, size=args.batch, context=args.context, rows=rows
                )
                logits = model(inputs.to(args.device))
                loss = weight * F.cross_entropy(logits.flatten(0, 1), targets.to(args.device).flatten())
                loss.backward()
            grad_norm = optimizer.clip_grad_norm_(args.clip)
            optimizer.step()
            scheduler.step()

            mean_loss = loss.detach() / world_size
            dist.all_reduce(mean_loss)
            done = step + 1
            metrics = {"loss": mean_loss.item(), "grad_norm": grad_norm.item()}
            if has_figures:
                figures = optimizer.stats()
                metrics |= {name: figures[name].item() for name in ("update_rms", "clipped_share")}
            seconds = time.perf_counter() - began
            metrics["tokens_per_s"] = args.batch * args.context / seconds
            if journal:
                journal.write(step=done, **metrics, lr=lr, seconds=seconds, world_size=world_size)
            display.step(done, **metrics, state_nbytes=state_nbytes)
            if done % args.save_every == 0 or done == args.steps:
                if journal:
                    journal.sync()
                extra = {"run": run, "scheduler": scheduler.state_dict()}
                saved = checkpoint.save(args.checkpoint_dir, step=done, optimizer=optimizer, model=model, extra=extra)
    if journal:
        journal.close()
        last_losses = [line["loss"] for line in read_journal(journal.path)[-10:]]
        summary = {
            "steps": max(start, args.steps),
            "world_size": world_size,
            "attempt": journal.attempt,
            "resumed_from": start,
            "final_loss": sum(last_losses) / len(last_losses),
            "state_nbytes_rank": state_nbytes,
            "state_nbytes_unsharded": unsharded_nbytes,
            "checkpoint_nbytes": saved.nbytes if saved else None,
            "save_seconds": saved.seconds if saved else None,
            "weights_sha256": weights_sha256(model),
        }
        (args.checkpoint_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print_summary(summary)


def make_optimizer(args: argparse.Namespace, model: nn.Module) -> ShardedOptimizer:
    """Make the sharded optimizer: weights and embeddings decay, norms and biases do not."""
    decaying = [(name, param) for name, param in model.named_parameters() if param.ndim >= 2]
    others = [(name, param) for name, param in model.named_parameters() if param.ndim < 2]
    groups = [{"params": decaying}, {"params": others, "weight_decay": 0.0}]
    if args.optimizer == "adamw":
        return ShardedOptimizer(groups, torch.optim.AdamW, module=model, lr=args.lr, weight_decay=args.weight_decay)
    return ShardedADOPT(groups, module=model, lr=args.lr, weight_decay=args.weight_decay, decouple=True)


def learning_rate_factor(warmup: int, steps: int) -> Callable[[int], float]:
    """Return the schedule: a straight line up over `warmup` steps, then half a cosine down to a tenth at `steps`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return 0.55 + 0.45 * math.cos(math.pi * progress)

    return factor


def seed_dropout(seed: int, rank: int, world_size: int, step: int) -> None:
    """Seed torch for the training that starts after `step`, so that every rank drops other elements."""
    key = hashlib.sha256(f"dropout {seed} {rank} {world_size} {step}".encode()).digest()
    torch.manual_seed(int.from_bytes(key[:8], "big") >> 1)


def resume(
    directory: Path, run: dict[str, Any], model: nn.Module, optimizer: ShardedOptimizer, scheduler: LambdaLR
) -> checkpoint.Loaded | None:
    """Load the newest checkpoint, `None` where the directory holds none.

    Raises `SystemExit` where it is of a run with other arguments or another corpus than `run` says.
    """
    try:
        loaded = checkpoint.load(directory, optimizer=optimizer, model=model)
    except checkpoint.CheckpointNotFound:
        return None
    saved_run = loaded.extra["run"]
    if differing := [name for name in run if run[name] != saved_run.get(name)]:
        was = ", ".join(f"{name} {saved_run.get(name)}" for name in differing)
        now = ", ".join(f"{name} {run[name]}" for name in differing)
        raise SystemExit(
            f"{loaded.path} is of a run with {was}, but this one has {now}: "
            "pass the same arguments and corpus, or another --checkpoint-dir"
        )
    scheduler.load_state_dict(loaded.extra["scheduler"])
    return loaded


def count_state(optimizer: ShardedOptimizer) -> tuple[int, int]:
    """Return the bytes of optimizer state that this rank holds, and those that one process alone would."""
    held = whole = 0
    for entries in optimizer.state.values():
        for value in entries.values():
            whole += value.numel() * value.element_size()
            held += value.to_local().nbytes if hasattr(value, "to_local") else value.nbytes
    return held, whole


def weights_sha256(model: nn.Module) -> str:
    """Return the hash of all parameters' bytes, in their order in the model."""
    digest = hashlib.sha256()
    for param in model.parameters():
        flat = param.detach().cpu().contiguous()
        digest.update(ctypes.string_at(flat.data_ptr(), flat.nbytes))
    return digest.hexdigest()


def print_summary(summary: dict[str, Any]) -> None:
    """Print `summary` as a table."""
    share = f"{size(summary['state_nbytes_rank'])} / {size(summary['state_nbytes_unsharded'])}"
    rows = [
        ("final loss (mean of the last 10 steps)", f"{summary['final_loss']:.4f}"),
        ("resumed from step", str(summary["resumed_from"]) if summary["resumed_from"] else "not resumed"),
        ("optimizer state, this rank / unsharded", share),
    ]
    if summary["checkpoint_nbytes"] is not None:
        rows.append(("checkpoint", f"{size(summary['checkpoint_nbytes'])}, saved in {summary['save_seconds']:.3f} s"))
    rows.append(("weights sha256", summary["weights_sha256"][:16]))
    print_table(f"{summary['steps']} steps, world size {summary['world_size']}", rows)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read `arguments`, by default those of the command line; the same on every rank."""
    parser = argparse.ArgumentParser(
        description="Train a small byte-level GPT with a sharded optimizer, resuming from --checkpoint-dir.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=positive, default=200, help="updates in all, those before a resume included")
    parser.add_argument("--checkpoint-dir", type=Path, default=Path("runs/pretrain"), help="where to save and resume")
    parser.add_argument("--save-every", type=positive, default=50, help="updates between two checkpoints")
    parser.add_argument("--corpus", type=Path, nargs="+", default=[], metavar="FILE", help="text instead of Python's")
    parser.add_argument("--optimizer", choices=("adopt", "adamw"), default="adopt", help="sharded either way")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--warmup", type=int, default=20, help="updates until the highest learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="decoupled, of weights and embeddings")
    parser.add_argument("--clip", type=float, default=1.0, help="highest norm of the whole gradient")
    parser.add_argument("--batch", type=positive, default=12, help="sequences in the global batch, over all ranks")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and dropout")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    for field, what in (("layers", "blocks"), ("heads", "a block"), ("width", "elements"), ("context", "bytes")):
        parser.add_argument(f"--{field}", type=positive, default=getattr(GPTConfig, field, None), help=what)
    parser.add_argument("--dropout", type=float, default=0.0, help="probability")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    """Read an integer that is at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer that is at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    main()
