"""What a training run shows: a progress bar on a terminal, plain lines elsewhere, and a table at the end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

PLAIN_EVERY = 20
"""Steps between two lines where stdout is not a terminal."""


def size(nbytes: float) -> str:
    """Write a number of bytes for people; 1 MiB is 2**20 bytes, as in `sharded-adopt ckpt ls`."""
    if nbytes < 1024:
        return f"{nbytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        nbytes /= 1024
        if nbytes < 1024:
            return f"{nbytes:.2f} {unit}"
    return f"{nbytes / 1024:.2f} TiB"


class Display:
    """Shows the steps of a run from `start` to `steps`; on the ranks that are not `shown` no method does anything."""

    def __init__(self, start: int, steps: int, *, shown: bool) -> None:
        self._start = start
        self._steps = steps
        self._shown = shown
        self._progress: Progress | None = None
        if shown and sys.stdout.isatty():
            self._progress = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=None),  # what the text leaves of the line
                TextColumn("{task.description}"),
                expand=True,
            )

    def __enter__(self) -> Display:
        if self._progress:
            self._progress.start()
            self._task = self._progress.add_task("starting", completed=self._start, total=self._steps)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()

    def note(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if not self._shown:
            return
        if self._progress:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def step(
        self,
        step: int,
        *,
        loss: float,
        tokens_per_s: float,
        grad_norm: float,
        state_nbytes: int,
        update_rms: float | None = None,
        clipped_share: float | None = None,
    ) -> None:
        """Show that `step` updates are done; `state_nbytes` is what this rank holds of the optimizer's state."""
        if not self._shown:
            return
        text = f"loss {loss:.3f}  {tokens_per_s:,.0f} tokens/s  grad norm {grad_norm:.3f}  "
        if update_rms is not None and clipped_share is not None:
            text += f"update rms {update_rms:.2f}  clipped {clipped_share:.1%}  "
        text += f"state {size(state_nbytes)}"
        if self._progress:
            self._progress.update(self._task, completed=step, description=text)
        elif step % PLAIN_EVERY == 0 or step in (self._start + 1, self._steps):
            print(f"step {step}/{self._steps}  {text}", flush=True)


def print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print a table of two columns to stdout."""
    table = Table(title=title, show_header=False, title_justify="left", title_style="bold")
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console().print(table, highlight=False)
