"""Train the GPT of pretrain.py under DeepSpeed; kill it whenever you like and start it again.

    deepspeed --num_gpus 2 examples/deepspeed_pretrain.py --steps 200 --checkpoint-dir runs/deepspeed
    torchrun --nproc-per-node 2 examples/deepspeed_pretrain.py --deepspeed_config examples/ds_config.json

On CPUs as on GPUs. The optimizer, its learning rate, the batch over all ranks and the ZeRO stage are the config's. The
same command goes on from the newest checkpoint in the directory, with the same number of processes (DeepSpeed's
`ds_to_universal` makes a checkpoint for another number). `metrics.jsonl` there has one line a step.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from byte_gpt import ByteGPT, GPTConfig
from corpus import load as load_corpus
from corpus import rows_of_rank
from deepspeed.accelerator import get_accelerator
from display import Display
from journal import Journal
from pretrain import learning_rate_factor, positive, seed_dropout, weights_sha256
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from sharded_adopt.interop.deepspeed import assert_runs_adopt  # and "type": "ADOPT" is known to DeepSpeed

# What makes a run what it is: a checkpoint is not continued under other values of these.
RUN_ARGUMENTS = ("seed", "layers", "heads", "width", "context", "dropout", "warmup")


def main() -> None:
    """Train as the command line and the DeepSpeed config say."""
    args = parse_arguments()
    if get_accelerator().device_name() == "cpu":
        # Gloo does the same. Otherwise DeepSpeed would compile it first, half a minute and only with a C++ compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    try:
        train(args)
    finally:
        dist.destroy_process_group()


def train(args: argparse.Namespace) -> None:
    """Take this rank's part in the job up to `args.steps`, from the newest checkpoint if there is one."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    corpus = load_corpus([], args.context)
    torch.manual_seed(args.seed)
    model = ByteGPT(GPTConfig(args.layers, args.heads, args.width, args.context, args.dropout))
    engine, _, _, scheduler = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model),
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, learning_rate_factor(args.warmup, args.steps)),
        config=str(args.deepspeed_config),
    )
    assert_runs_adopt(engine)
    run = {name: getattr(args, name) for name in RUN_ARGUMENTS} | {"corpus_sha256": corpus.sha256}
    run["batch"] = engine.train_batch_size()
    start = resume(engine, args.checkpoint_dir, run)

    rows = rows_of_rank(engine.train_batch_size(), rank, world_size)
    micro = engine.train_micro_batch_size_per_gpu()
    journal = Journal(args.checkpoint_dir, start) if rank == 0 else None
    with Display(start, args.steps, shown=rank == 0) as display:
        numel = sum(getattr(param, "ds_numel", param.numel()) for param in model.parameters())
        stage = engine.zero_optimization_stage()
        display.note(f"{numel:,} parameters, ADOPT, ZeRO-{stage}, world size {world_size}, {engine.device}")
        display.note(f"resumed from step {start}" if start else "starting at step 0")
        for step in range(start, args.steps):
            began = time.perf_counter()
            lr = scheduler.get_last_lr()[0]
            seed_dropout(args.seed, rank, world_size, step)
            sizes = {"seed": args.seed, "step": step, "size": engine.train_batch_size(), "context": args.context}
            inputs, targets = corpus.batch(**sizes, rows=rows)
            mean_loss = torch.zeros((), device=engine.device)
            for first in range(0, len(rows), micro):
                piece = slice(first, first + micro)
                logits = engine(inputs[piece].to(engine.device)).float()
                loss = F.cross_entropy(logits.flatten(0, 1), targets[piece].to(engine.device).flatten())
                engine.backward(loss)
                engine.step()  # updates at the last piece
                mean_loss += loss.detach() * (micro / len(rows) / world_size)
            dist.all_reduce(mean_loss)
            done = step + 1
            seconds = time.perf_counter() - began
            metrics = {"loss": mean_loss.item(), "grad_norm": float(engine.get_global_grad_norm() or 0.0)}
            metrics["tokens_per_s"] = engine.train_batch_size() * args.context / seconds
            if journal:
                journal.write(step=done, **metrics, lr=lr, seconds=seconds, world_size=world_size)
            display.step(done, **metrics, state_nbytes=state_nbytes(engine))
            if done % args.save_every == 0 or done == args.steps:
                if journal:
                    journal.sync()
                client_state = {"step": done, "run": run}
                engine.save_checkpoint(str(args.checkpoint_dir), tag=f"step-{done}", client_state=client_state)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        digest = weights_sha256(model)
    if journal:
        journal.close()
        summary = {"steps": max(start, args.steps), "resumed_from": start, "weights_sha256": digest}
        (args.checkpoint_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(f"weights sha256: {digest[:16]}")


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weights and embeddings decay as the config says, norms and biases do not."""
    decaying = [param for param in model.parameters() if param.ndim >= 2]
    return [
        {"params": decaying},
        {"params": [param for param in model.parameters() if param.ndim < 2], "weight_decay": 0.0},
    ]


def resume(engine: Any, directory: Path, run: dict[str, Any]) -> int:
    """Load the newest checkpoint and return its step, 0 where the directory holds none.

    Raises `SystemExit` where it is of a run with other arguments or another corpus than `run` says.
    """
    if not (directory / "latest").exists():
        return 0
    _, client_state = engine.load_checkpoint(str(directory))
    if client_state["run"] != run:
        raise SystemExit(
            f"{directory} holds a run with {client_state['run']}, but this one has {run}: "
            "pass the same arguments and config, or another --checkpoint-dir"
        )
    return int(client_state["step"])


def state_nbytes(engine: Any) -> int:
    """Return the bytes of ADOPT's state that this rank holds."""
    entries = engine.optimizer.state.values()
    return sum(value.nbytes for held in entries for value in held.values() if isinstance(value, torch.Tensor))


def parse_arguments() -> argparse.Namespace:
    """Read the command line; the same on every rank but for what DeepSpeed's launcher adds."""
    parser = argparse.ArgumentParser(
        description="Train a small byte-level GPT under DeepSpeed, resuming from --checkpoint-dir.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    config = Path(__file__).with_name("ds_config.json")
    parser.add_argument("--deepspeed_config", type=Path, default=config, help="optimizer, batch, ZeRO stage")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by DeepSpeed's launcher")
    parser.add_argument("--steps", type=positive, default=200, help="updates in all, those before a resume included")
    parser.add_argument("--checkpoint-dir", type=Path, default=Path("runs/deepspeed"), help="where to save and resume")
    parser.add_argument("--save-every", type=positive, default=50, help="updates between two checkpoints")
    parser.add_argument("--warmup", type=int, default=20, help="updates until the highest learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and dropout")
    for field, what in (("layers", "blocks"), ("heads", "a block"), ("width", "elements"), ("context", "bytes")):
        parser.add_argument(f"--{field}", type=positive, default=getattr(GPTConfig, field, None), help=what)
    parser.add_argument("--dropout", type=float, default=0.0, help="probability")
    return parser.parse_args()


if __name__ == "__main__":
    main()
