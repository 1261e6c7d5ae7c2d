"""Train a tiny Llama over bytes with transformers' Trainer and ADOPT, sharded under torchrun; nothing is downloaded.

    python examples/trainer_pretrain.py
    torchrun --nproc-per-node 2 examples/trainer_pretrain.py --output runs/trainer
    torchrun --nproc-per-node 2 examples/trainer_pretrain.py --output runs/trainer --resume   # the last checkpoint

Needs `pip install 'sharded-adopt[transformers]'`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import corpus
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sharded_adopt import ADOPT
from sharded_adopt.interop.transformers import AdoptCallback, adopt_for


class Pieces(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The text cut into pieces of `context` bytes."""

    def __init__(self, text: torch.Tensor, context: int, count: int) -> None:
        self.pieces = text[: len(text) // context * context].view(-1, context)[:count].long()

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.pieces[index], "labels": self.pieces[index]}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/trainer"), help="where checkpoints go")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=16, help="pieces in a step, over all processes")
    parser.add_argument("--accumulate", type=int, default=1, help="backwards in a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--optim-args", default="decouple=true", help="ADOPT's arguments, name=value,name=value")
    parser.add_argument("--unsharded", action="store_true", help="keep all of the optimizer's state in each process")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --output")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    args = TrainingArguments(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch // world_size // options.accumulate,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        optim_args=options.optim_args,
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 10,
        max_grad_norm=1.0,
        save_steps=options.save_steps,
        logging_steps=max(1, options.steps // 10),
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        seed=1,
    )
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            attention_dropout=0.1,  # a resumed run must find the random numbers where they were
            tie_word_embeddings=True,
        )
    )
    optimizer_class, keywords = adopt_for(args)
    if options.unsharded:
        optimizer_class, keywords = ADOPT, {k: v for k, v in keywords.items() if k != "reduce_gradients"}
    data: Any = Pieces(corpus.load([], 64).text, 64, 4096)
    trainer = Trainer(
        model,
        args,
        train_dataset=data,
        optimizer_cls_and_kwargs=(optimizer_class, keywords),
        callbacks=[AdoptCallback()],
    )
    trainer.train(resume_from_checkpoint=options.resume or None)
    trainer.save_model(str(options.output / "final"))
    if trainer.is_world_process_zero():
        held = sum(t.numel() for s in trainer.optimizer.state.values() for t in map(local, s.values()))
        print(f"{optimizer_class.__name__}, {world_size} processes, {held:,} elements of optimizer state in this one")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor of the optimizer's state."""
    part: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
