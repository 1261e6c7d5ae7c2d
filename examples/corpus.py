"""Training text that needs no download, and the batches cut from it."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Corpus:
    """Text as bytes: `text` is 1-D, uint8; `sha256` is its hash in hex; `source` says where it came from."""

    text: Tensor
    sha256: str
    source: str

    def batch(self, *, seed: int, step: int, size: int, context: int, rows: range) -> tuple[Tensor, Tensor]:
        """Cut this rank's `rows` of the batch of `step`: inputs and next bytes, each len(rows) x context, int64.

        The batch is a pure function of (seed, step, size, context): whatever the world size, whatever was killed and
        resumed, step 1234 trains on the same `size` pieces of text. Nothing needs to be saved but the step.
        """
        key = hashlib.sha256(f"batch {seed} {step}".encode()).digest()
        random = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
        starts = torch.randint(len(self.text) - context, (size,), generator=random)[rows.start : rows.stop]
        pieces = self.text[starts[:, None] + torch.arange(context + 1)].long()
        return pieces[:, :-1], pieces[:, 1:]


def load(files: Sequence[Path], context: int) -> Corpus:
    """Read `files` one after the other, or the text that every Python carries where there are none.

    That text is the documentation in `pydoc_data.topics` and the standard library's own modules. It differs between
    versions of Python, so its hash is part of a checkpoint. Raises `ValueError` where it is no longer than `context`.
    """
    if files:
        data = b"".join(path.read_bytes() for path in files)
        source = ", ".join(path.name for path in files)
    else:
        from pydoc_data.topics import topics

        modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        texts = [topics[name].encode() for name in sorted(topics)]
        data = b"\n".join([*texts, *(path.read_bytes() for path in modules)])
        source = f"pydoc_data.topics and {len(modules)} modules of the standard library"
    if len(data) <= context:
        raise ValueError(
            f"expected a corpus longer than --context {context} bytes, got {len(data)} bytes from {source}"
        )
    text = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return Corpus(text=text, sha256=hashlib.sha256(data).hexdigest(), source=source)


def rows_of_rank(size: int, rank: int, world_size: int) -> range:
    """Return the rows of a global batch of `size` that belong to `rank`: contiguous, in order, as even as can be."""
    return range(size * rank // world_size, size * (rank + 1) // world_size)
