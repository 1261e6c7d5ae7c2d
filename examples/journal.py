"""One JSON line a training step, kept so that every step of the surviving history is there exactly once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """`metrics.jsonl` in `directory`, continued after `resumed_step`; the lines beyond it go to `metrics.lost.jsonl`.

    Steps that a killed run took after its last checkpoint are taken again by the run that resumes, so their lines are
    moved, not kept: `metrics.jsonl` reads as if nothing had happened, and what was lost can still be looked at. A line
    that the kill tore is dropped. Only one rank may open the journal.
    """

    def __init__(self, directory: Path, resumed_step: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "metrics.jsonl"
        lost_path = directory / "metrics.lost.jsonl"
        lines, lost = read(self.path), read(lost_path)
        # attempts count the starts in this directory, from 1
        self.attempt = 1 + max((line["attempt"] for line in lines + lost), default=0)
        kept = [line for line in lines if line["step"] <= resumed_step]
        # by (attempt, step): a kill between the two renames must not leave a line there twice
        moved = {(line["attempt"], line["step"]): line for line in lost}
        moved |= {(line["attempt"], line["step"]): line for line in lines if line["step"] > resumed_step}
        if moved:
            _replace(lost_path, list(moved.values()))
        _replace(self.path, kept)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, **line: Any) -> None:
        """Append one line and hand it to the operating system, so that a SIGKILL cannot take it back."""
        self._file.write(json.dumps({**line, "attempt": self.attempt}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Force the lines to disk; before a checkpoint, so that no committed step lacks its line after a power cut."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a journal; a missing file has none, and a torn last line is left out."""
    if not path.exists():
        return []
    whole, _, _torn = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def _replace(path: Path, lines: list[dict[str, Any]]) -> None:
    """Put `lines` in the place of the file in one rename, so that a kill leaves the old file or the new one."""
    new = path.with_suffix(".new")
    with new.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
