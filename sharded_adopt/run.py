"""Run a training script with ADOPT known to DeepSpeed, without a line of code in it.

    deepspeed --module sharded_adopt.run train.py --deepspeed_config ds_config.json
    torchrun --nproc-per-node 2 -m sharded_adopt.run train.py ...
    python -m sharded_adopt.run -m package.train ...

The script, or with `-m` the module, is run as Python would run it: as `__main__`, with its own `sys.argv`, and its
directory (with `-m` the current one) first in `sys.path`.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

USAGE = "usage: python -m sharded_adopt.run (SCRIPT | -m MODULE) [ARGUMENT ...]"


def main(arguments: Sequence[str]) -> None:
    """Register ADOPT with DeepSpeed and run what `arguments` name. Exits with 2 where they name nothing to run."""
    # DeepSpeed's launcher puts this before everything else; a script expects it among its own arguments.
    local_rank = [argument for argument in arguments[:1] if argument.startswith("--local_rank")]
    rest = list(arguments[len(local_rank) :])
    if is_module := rest[:1] == ["-m"]:
        del rest[0]
    if not rest or rest[0].startswith("-"):
        _refuse(f"expected a script, or -m and a module, got {list(arguments)}")
    target = rest.pop(0)
    if not is_module and not os.path.exists(target):
        _refuse(f"there is no file {target!r} in {os.getcwd()}")

    import sharded_adopt.interop.deepspeed  # noqa: F401 - registers

    sys.argv = [target, *local_rank, *rest]
    if is_module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
        return
    # Python's own first entry is the current directory, because this module was started with -m; see `python -P` too.
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = target if os.path.isdir(target) else os.path.dirname(os.path.realpath(target))
    runpy.run_path(target, run_name="__main__")


def _refuse(message: str) -> None:
    print(f"{USAGE}\n{message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
