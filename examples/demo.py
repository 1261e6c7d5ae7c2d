"""The main job, once through: train on two ranks, kill -9 all of it part-way, go on with three, draw the loss curve.

`make demo` runs this. It exits 0 only if the job was really killed between two checkpoints, resumed from the newest one
at the other world size, and finished; it leaves nothing running.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from display import print_table, size
from job import Job
from journal import read as read_journal

from sharded_adopt import checkpoint

SCRIPT = Path(__file__).with_name("pretrain.py")


def main() -> None:
    """Run the demo as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="All other arguments go to pretrain.py."
    )
    parser.add_argument("--directory", type=Path, default=Path("runs/demo"), help="emptied first")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--kill-after", type=int, default=115, help="step after which the job is killed")
    parser.add_argument("--ranks", type=int, nargs=2, default=(2, 3), help="world size before and after the kill")
    args, others = parser.parse_known_args()
    if not args.save_every < args.kill_after < args.steps or args.kill_after % args.save_every == 0:
        parser.error("--kill-after must lie between two checkpoints: after the first, before the last step")

    directory: Path = args.directory
    if directory.exists():
        if not (directory / "metrics.jsonl").exists() and any(directory.iterdir()):
            parser.error(f"{directory} holds something else than a demo; it is not emptied")
        shutil.rmtree(directory)
    arguments = ["--steps", str(args.steps), "--save-every", str(args.save_every), "--checkpoint-dir", str(directory)]
    arguments += others
    before, after = args.ranks

    say(f"torchrun --nproc-per-node {before} examples/pretrain.py {' '.join(arguments)}")
    with Job(before, SCRIPT, arguments) as job:
        wait_for_step(job, directory, args.kill_after)
        killed = job.kill()
    if sys.stdout.isatty():
        print("\x1b[?25h")  # the bar had hidden the cursor, and was not asked before it died
    newest = checkpoint.latest(directory)
    if newest is None:
        raise SystemExit("the job was killed, but no checkpoint was committed before")
    say(f"kill -9 {' '.join(map(str, killed))}: the whole job is gone; newest checkpoint: {Path(newest).name}")

    say(f"torchrun --nproc-per-node {after} examples/pretrain.py {' '.join(arguments)}")
    with Job(after, SCRIPT, arguments) as job:
        code = job.wait(1800)
    if code != 0:
        raise SystemExit(f"the resumed job ended with exit code {code}")
    report(directory, args.steps, before, after)


def wait_for_step(job: Job, directory: Path, step: int) -> None:
    """Wait until `job` has taken `step` updates; raises `SystemExit` if it ends before."""
    deadline = time.monotonic() + 1800
    while True:
        lines = read_journal(directory / "metrics.jsonl")
        if lines and lines[-1]["step"] >= step:
            return
        if not job.running():
            raise SystemExit(f"the job ended with exit code {job.wait(0)} before step {step}, nothing was killed")
        if time.monotonic() > deadline:
            raise SystemExit(f"the job did not reach step {step} within half an hour")
        time.sleep(0.05)


def report(directory: Path, steps: int, before: int, after: int) -> None:
    """Check the history that both runs left, print the table and draw the curve."""
    summary = json.loads((directory / "summary.json").read_text())
    history = read_journal(directory / "metrics.jsonl")
    lost = read_journal(directory / "metrics.lost.jsonl")
    resumed = summary["resumed_from"]
    problems = []
    if [line["step"] for line in history] != list(range(1, steps + 1)):
        problems.append("metrics.jsonl does not hold every step exactly once")
    if [line["world_size"] for line in history] != [before] * resumed + [after] * (steps - resumed):
        problems.append(f"not all steps up to {resumed} ran on {before} ranks and the others on {after}")
    if not lost or lost[0]["step"] != resumed + 1:
        problems.append(f"the steps lost in the kill do not follow step {resumed}, from which the job resumed")
    if summary["final_loss"] > 0.7 * history[0]["loss"]:
        problems.append(f"the loss fell from {history[0]['loss']:.3f} to {summary['final_loss']:.3f} only")
    if problems:
        raise SystemExit("the demo went wrong: " + "; ".join(problems))

    again = {line["step"]: line["loss"] for line in history}
    difference = max(abs(line["loss"] - again[line["step"]]) for line in lost)
    share = summary["state_nbytes_rank"] / summary["state_nbytes_unsharded"]
    print_table(
        "demo",
        [
            ("final loss (mean of the last 10 steps)", f"{summary['final_loss']:.4f}"),
            ("killed after step / resumed from step", f"{lost[-1]['step']} / {resumed}"),
            ("ranks before / after", f"{before} / {after}"),
            ("steps taken again: largest change in loss", f"{difference:.1e}"),
            ("optimizer state, unsharded", size(summary["state_nbytes_unsharded"])),
            ("optimizer state, a rank", f"{size(summary['state_nbytes_rank'])} ({share:.1%})"),
            ("checkpoint, time to save it", f"{size(summary['checkpoint_nbytes'])}, {summary['save_seconds']:.3f} s"),
        ],
    )
    picture = directory / "loss.png"
    draw(picture, history, lost, resumed, before, after)
    say(f"loss curve: {picture.resolve()}")


def draw(
    picture: Path, history: list[dict[str, Any]], lost: list[dict[str, Any]], resumed: int, before: int, after: int
) -> None:
    """Draw the loss over the steps: each run in its colour, the lost steps pale, the kill as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    blue, orange, red = "#1f5fa8", "#d9730d", "#b3261e"
    killed = lost[-1]["step"]
    figure, (axes, close) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=(2.2, 1), layout="constrained")
    for panel in (axes, close):
        for lines, style in (
            (lost, {"color": blue, "alpha": 0.3, "linewidth": 6, "label": f"{len(lost)} steps lost in the kill"}),
            (history[:resumed], {"color": blue, "label": f"{before} ranks"}),
            (history[max(0, resumed - 1) :], {"color": orange, "label": f"{after} ranks"}),
        ):
            panel.plot([line["step"] for line in lines], [line["loss"] for line in lines], **style)
        panel.axvline(killed, color=red, linestyle="--", linewidth=1.2, label=f"kill -9 after step {killed}")
        panel.axvline(resumed, color="black", linestyle=":", linewidth=1.2, label=f"checkpoint of step {resumed}")
        panel.set_xlabel("step")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel("loss over the global batch (nats a byte)")
    axes.set_xlim(0, len(history))
    axes.legend(frameon=False)
    axes.set_title(f"Byte-level GPT: killed on {before} ranks, resumed on {after}", loc="left", fontweight="bold")
    margin = max(3, len(lost) // 2)
    window = [line["loss"] for line in history + lost if resumed - margin <= line["step"] <= killed + margin]
    close.set_xlim(resumed - margin, killed + margin)
    close.set_ylim(min(window) - 0.05, max(window) + 0.05)
    close.set_title("Near the kill", loc="left")
    figure.savefig(picture, dpi=130)
    plt.close(figure)


def say(text: str) -> None:
    """Print what the demo itself does, apart from what the jobs print."""
    print(f"\n==> {text}", flush=True)


if __name__ == "__main__":
    main()
