"""Turn the runs of `from_adamw.py` into tables and figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from from_adamw_run import EVERY, MODEL, SWITCHES, Run, Switch

OURS, THEIRS = 0.001, 0.002
STAY, CARRIED, COLD = "AdamW goes on", "ADOPT.from_adamw", "cold ADOPT"
WINDOW = 25
"""Steps of the running mean in which a bump is looked for: shorter ones show the batches."""


def tables(results: dict[str, Any], seeds: Sequence[int], steps: int) -> str:
    """All tables, in Markdown."""
    facts = ", ".join(f"{name} {value}" for name, value in results["about"].items())
    lines = [
        "# From AdamW to ADOPT",
        "",
        f"{facts}.",
        "",
        "The byte GPT of examples/pretrain.py with "
        f"{MODEL.layers} layers of width {MODEL.width} and a context of {MODEL.context} (118,528 parameters, 512 bytes "
        "a step), its schedule, its clipping of the gradient's norm at 1 and decoupled decay of 0.1. "
        f"{steps} steps and 20 of warm-up where nothing else is said. Cells: loss on text that was not trained on, "
        f"mean ± standard deviation over {len(seeds)} seeds. Bold: the lowest of a row. β1 is 0.9; AdamW has eps 1e-8, "
        "ADOPT its defaults.",
        "",
    ]
    cells = _Cells(results, seeds, steps)
    for title, head, rows in _sections(cells, steps):
        lines += [f"## {title}", "", _row(head), _row(["---"] * len(head))]
        lines += [_row([name, *_with_best_in_bold(found)]) for name, found in rows] + [""]
    lines += ["## Update RMS at a learning rate of 0.001", "", _update_table(cells, steps), ""]
    lines += ["## The switch", "", _switch_table(results, seeds, steps), ""]
    return "\n".join(lines)


class _Cells:
    """Finds the final losses of a run over all seeds."""

    def __init__(self, results: dict[str, Any], seeds: Sequence[int], steps: int) -> None:
        self._runs, self._seeds, self._steps = results["runs"], seeds, steps

    def runs(self, optimizer: str, beta2: float, lr: float, **others: Any) -> list[dict[str, Any]]:
        run = Run(optimizer, lr, beta2, seed=0, **{"steps": self._steps, **others})
        found = [self._runs.get(replace(run, seed=seed).key) for seed in self._seeds]
        return [one for one in found if one is not None] if None not in found else []

    def loss(self, *args: Any, **others: Any) -> tuple[float, float] | None:
        """Mean and standard deviation; None where a run is missing, inf where one diverged."""
        finals = [float("inf") if run["final"] is None else run["final"] for run in self.runs(*args, **others)]
        if not finals:
            return None
        return statistics.mean(finals), (statistics.stdev(finals) if len(finals) > 1 else 0.0)


Section = tuple[str, list[str], list[tuple[str, list[Any]]]]


def _sections(cells: _Cells, steps: int) -> Iterable[Section]:
    lrs = (OURS / 2, OURS, THEIRS, 2 * THEIRS, 4 * THEIRS)

    def over_lrs(optimizer: str, beta2: float, **others: Any) -> list[Any]:
        return [cells.loss(optimizer, beta2, lr, **others) for lr in lrs]

    head = [*(f"lr {lr:g}" for lr in lrs)]
    yield (
        "Learning rate",
        ["", *head],
        [
            ("AdamW, β2 0.95", over_lrs("adamw", 0.95)),
            ("AdamW, β2 0.999", over_lrs("adamw", 0.999)),
            ("ADOPT, β2 0.999", over_lrs("adopt", 0.999)),
            ("ADOPT, β2 0.9999", over_lrs("adopt", 0.9999)),
        ],
    )
    rows = []
    for number, warmup in ((steps // 4, 20), (steps, 20), (steps, 150), (4 * steps, 20), (4 * steps, 150)):
        for optimizer, beta2, name in (("adamw", 0.999, "AdamW"), ("adopt", 0.9999, "ADOPT")):
            rows.append(
                (f"{number} steps, warm-up {warmup}, {name}", over_lrs(optimizer, beta2, steps=number, warmup=warmup))
            )
    yield "Learning rate by horizon and warm-up", ["", *head], rows
    yield (
        "β2 by horizon, ADOPT at lr 0.001",
        ["", *(f"β2 {beta2:g}" for beta2 in (0.9, 0.99, 0.999, 0.9999))],
        [
            (f"{n} steps", [cells.loss("adopt", beta2, OURS, steps=n) for beta2 in (0.9, 0.99, 0.999, 0.9999)])
            for n in (steps // 4, steps, 4 * steps)
        ],
    )
    clips = {"none": None, "1": 0.0, "step ** 0.25": 0.25, "step ** 0.5": 0.5}
    yield (
        "Clip, ADOPT",
        ["", *(f"clip {name}" for name in clips)],
        [
            (f"lr {lr:g}", [cells.loss("adopt", 0.9999, lr, clip=clip) for clip in clips.values()])
            for lr in (OURS, 4 * OURS)
        ],
    )
    warmups = (1, 20, 60, 150)
    yield (
        "Warm-up at lr 0.002",
        ["", *(f"{warmup} steps" for warmup in warmups)],
        [
            ("AdamW", [cells.loss("adamw", 0.999, THEIRS, warmup=warmup) for warmup in warmups]),
            ("ADOPT", [cells.loss("adopt", 0.9999, THEIRS, warmup=warmup) for warmup in warmups]),
        ],
    )
    decays = (0.0, 0.01, 0.1, 0.3)
    yield (
        "Weight decay",
        ["", *(f"decay {decay:g}" for decay in decays)],
        [
            ("AdamW, lr 0.002", [cells.loss("adamw", 0.999, THEIRS, weight_decay=decay) for decay in decays]),
            (
                "ADOPTW (decoupled), lr 0.001",
                [cells.loss("adopt", 0.9999, OURS, weight_decay=decay) for decay in decays],
            ),
            (
                "ADOPT (in the gradient), lr 0.001",
                [
                    None,
                    *(cells.loss("adopt", 0.9999, OURS, weight_decay=decay, decouple=False) for decay in decays[1:]),
                ],
            ),
        ],
    )


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _with_best_in_bold(found: Sequence[tuple[float, float] | None]) -> list[str]:
    best = min((cell[0] for cell in found if cell is not None), default=None)
    written = []
    for cell in found:
        if cell is None:
            written.append("")
        else:
            text = f"{cell[0]:.3f} ± {cell[1]:.3f}"
            written.append(f"**{text}**" if cell[0] == best else text)
    return written


UPDATES = {
    "AdamW, β2 0.999": ("adamw", 0.999),
    "AdamW, β2 0.95": ("adamw", 0.95),
    "ADOPT, β2 0.999": ("adopt", 0.999),
    "ADOPT, β2 0.9999": ("adopt", 0.9999),
}


def _update_table(cells: _Cells, steps: int) -> str:
    """Means of the update RMS over the quarters of a run."""
    lines = [_row(["", *(f"steps {steps * q // 4} to {steps * (q + 1) // 4}" for q in range(4))]), _row(["---"] * 5)]
    quarters: dict[str, list[float]] = {}
    for name, (optimizer, beta2) in UPDATES.items():
        runs = cells.runs(optimizer, beta2, OURS)
        if not runs:
            continue
        mean = [statistics.mean(values) for values in zip(*(run["update_rms"] for run in runs), strict=True)]
        # Not the first: a first step of ADOPT moves nothing.
        parts = [mean[max(1, len(mean) * q // 4) : max(2, len(mean) * (q + 1) // 4)] or mean for q in range(4)]
        quarters[name] = [statistics.mean(part) for part in parts]
        lines.append(_row([name, *(f"{value:.2f}" for value in quarters[name])]))
    if {"AdamW, β2 0.999", "ADOPT, β2 0.9999"} <= set(quarters):
        pairs = zip(quarters["ADOPT, β2 0.9999"], quarters["AdamW, β2 0.999"], strict=True)
        lines.append(_row(["ADOPT, β2 0.9999, over AdamW, β2 0.999", *(f"{a / b:.1f}" for a, b in pairs)]))
    return "\n".join(lines)


def switches(results: dict[str, Any], seeds: Sequence[int], steps: int, beta2: float) -> list[dict[str, Any]]:
    """The switches at one β2, by seed; none where one is missing."""
    runs = [Switch(THEIRS, beta2, seed, at=4 * steps // 5, after=2 * steps // 5) for seed in seeds]
    found = [results["runs"].get(run.key) for run in runs]
    return [one for one in found if one is not None] if None not in found else []


def _running(values: Sequence[float]) -> list[float]:
    window = min(WINDOW, len(values))
    return [statistics.mean(values[i : i + window]) for i in range(len(values) - window + 1)]


def differences(runs: Sequence[dict[str, Any]], name: str) -> list[list[float]]:
    """By seed: the running mean of a continuation's loss less that of AdamW, on the same batches."""
    return [_running([a - b for a, b in zip(run["after"][name], run["after"][STAY], strict=True)]) for run in runs]


def seed_noise(runs: Sequence[dict[str, Any]]) -> float:
    """The standard deviation over the seeds of the running mean of AdamW's loss, its mean over the steps."""
    if len(runs) < 2:
        return 0.0
    curves = [_running(run["after"][STAY]) for run in runs]
    return float(statistics.mean(statistics.stdev(values) for values in zip(*curves, strict=True)))


def _switch_table(results: dict[str, Any], seeds: Sequence[int], steps: int) -> str:
    head = ["", "highest above AdamW", "at the end above AdamW", "update RMS of the first step over AdamW's last"]
    lines = [
        f"AdamW for {4 * steps // 5} steps at a constant lr of 0.002 (after 20 of warm-up), then each of these for "
        f"{2 * steps // 5} more, on the same batches. Loss in the running mean of {WINDOW} steps less that of AdamW "
        "going on, mean over the seeds; at the end the loss on text that was not trained on, less AdamW's.",
        "",
    ]
    for beta2 in (0.999, 0.95):
        runs = switches(results, seeds, steps, beta2)
        if not runs:
            continue
        lines += [f"AdamW with β2 {beta2}; seed noise (standard deviation over the seeds) {seed_noise(runs):.3f}:", ""]
        lines += [_row(head), _row(["---"] * 4)]
        for name in SWITCHES:
            if name == STAY:
                continue
            mean = [statistics.mean(values) for values in zip(*differences(runs, name), strict=True)]
            final = statistics.mean(run["final"][name] - run["final"][STAY] for run in runs)
            size = statistics.mean(run["update_rms"][name][0] / run["update_rms"][STAY][0] for run in runs)
            lines.append(_row([name, f"{max(mean):+.4f}", f"{final:+.4f}", f"{size:.2f}"]))
        lines.append("")
    return "\n".join(lines[:-1])


def draw_switch(results: dict[str, Any], seeds: Sequence[int], steps: int, path: Path) -> None:
    """Draw the loss around the switch, and its difference from AdamW going on beside the noise of the seeds."""
    pyplot = _pyplot()
    names = {STAY: "black", CARRIED: "#08519c", COLD: "#d94801"}
    figure, panels = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained", sharex=True)
    at = 4 * steps // 5
    for column, beta2 in enumerate((0.999, 0.95)):
        runs = switches(results, seeds, steps, beta2)
        if not runs:
            continue
        top, bottom = panels[0][column], panels[1][column]
        for name, color in names.items():
            curves = [_running(run["before"] + run["after"][name]) for run in runs]
            first = at - len(runs[0]["before"]) + len(runs[0]["before"] + runs[0]["after"][name]) - len(curves[0])
            mean = [statistics.mean(values) for values in zip(*curves, strict=True)]
            top.plot(range(first, first + len(mean)), mean, color=color, label=name, linewidth=1.5)
            for curve in curves if name == STAY else []:
                top.plot(range(first, first + len(curve)), curve, color=color, linewidth=0.5, alpha=0.4)
            if name == STAY:
                continue
            by_seed = differences(runs, name)
            begin = at + len(runs[0]["after"][name]) - len(by_seed[0])
            steps_shown = range(begin, begin + len(by_seed[0]))
            mean = [statistics.mean(values) for values in zip(*by_seed, strict=True)]
            bottom.plot(steps_shown, mean, color=color, label=name, linewidth=1.5)
            low, high = ([pick(v) for v in zip(*by_seed, strict=True)] for pick in (min, max))
            bottom.fill_between(steps_shown, low, high, color=color, alpha=0.15, linewidth=0)
        noise = seed_noise(runs)
        bottom.axhspan(-noise, noise, color="#bbbbbb", alpha=0.4, linewidth=0, label="± seed noise of AdamW")
        bottom.axhline(0, color="black", linewidth=0.8)
        for panel in (top, bottom):
            panel.axvline(at, color="black", linewidth=0.8, linestyle=":")
            panel.spines[["top", "right"]].set_visible(False)
        top.set_title(f"AdamW with β2 {beta2} until step {at}, lr 0.002", fontsize=10)
        top.set_ylabel("training loss", fontsize=9)
        bottom.set_ylabel("above AdamW going on, same batches", fontsize=9)
        bottom.set_xlabel(f"step (running mean of the last {WINDOW})", fontsize=9)
        top.legend(frameon=False, fontsize=8)
        bottom.legend(frameon=False, fontsize=8, loc="upper left")
    figure.suptitle(
        f"The switch, mean of {len(seeds)} seeds; bands: lowest to highest seed, thin: AdamW's seeds", fontsize=10
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_settings(results: dict[str, Any], seeds: Sequence[int], steps: int, path: Path) -> None:
    """Draw the tables, and the update RMS step by step."""
    pyplot = _pyplot()
    cells = _Cells(results, seeds, steps)
    figure, panels = pyplot.subplots(2, 3, figsize=(13, 7.5), layout="constrained")
    colors = {"adamw": ("#d94801", "#fdae6b"), "adopt": ("#08519c", "#9ecae1")}

    def line(panel: Any, xs: Sequence[float], found: Sequence[tuple[float, float] | None], **style: Any) -> None:
        points = [(x, cell) for x, cell in zip(xs, found, strict=True) if cell is not None]
        if points:
            places, values, spread = zip(*((x, cell[0], cell[1]) for x, cell in points), strict=True)
            panel.errorbar(places, values, yerr=spread, marker="o", markersize=4, capsize=2, **style)

    lrs = (OURS / 2, OURS, THEIRS, 2 * THEIRS, 4 * THEIRS)
    both = (("adamw", 0.999, "AdamW"), ("adopt", 0.9999, "ADOPT"))
    for warmup, dash in ((20, "-"), (150, "--")):
        for optimizer, beta2, name in both:
            found = [cells.loss(optimizer, beta2, lr, warmup=warmup) for lr in lrs]
            style = {"color": colors[optimizer][0], "linestyle": dash, "label": f"{name}, warm-up {warmup}"}
            line(panels[0][0], lrs, found, **style)
    _finish(panels[0][0], "learning rate", f"Learning rate, {steps} steps", lrs, log=True, place="upper center")

    betas = (0.9, 0.99, 0.999, 0.9999)
    for number, dash in ((steps // 4, ":"), (steps, "-"), (4 * steps, "--")):
        found = [cells.loss("adopt", beta2, OURS, steps=number) for beta2 in betas]
        style = {"color": colors["adopt"][0], "linestyle": dash, "label": f"ADOPT, {number} steps"}
        line(panels[0][1], range(len(betas)), found, **style)
    labels = [f"{beta2:g}" for beta2 in betas]
    _finish(panels[0][1], "β2", "β2 by horizon, lr 0.001", range(len(betas)), labels=labels, place=(0.02, 0.62))

    clips = {"none": None, "1": 0.0, "step^0.25": 0.25, "step^0.5": 0.5}
    for lr, shade in ((OURS, 0), (4 * OURS, 1)):
        found = [cells.loss("adopt", 0.9999, lr, clip=clip) for clip in clips.values()]
        line(panels[0][2], range(len(clips)), found, color=colors["adopt"][shade], label=f"ADOPT, lr {lr:g}")
    _finish(panels[0][2], "clip bound", "Clip", range(len(clips)), labels=list(clips))

    warmups = (1, 20, 60, 150)
    for optimizer, beta2, name in both:
        found = [cells.loss(optimizer, beta2, THEIRS, warmup=warmup) for warmup in warmups]
        line(panels[1][0], warmups, found, color=colors[optimizer][0], label=f"{name}, lr 0.002")
    _finish(panels[1][0], "steps of warm-up", "Warm-up", warmups)

    decays = (0.0, 0.01, 0.1, 0.3)
    for optimizer, beta2, lr, decouple, name, shade in (
        ("adamw", 0.999, THEIRS, True, "AdamW, lr 0.002", 0),
        ("adopt", 0.9999, OURS, True, "ADOPTW, lr 0.001", 0),
        ("adopt", 0.9999, OURS, False, "ADOPT, in the gradient, lr 0.001", 1),
    ):
        found = [cells.loss(optimizer, beta2, lr, weight_decay=decay, decouple=decouple) for decay in decays]
        line(panels[1][1], range(len(decays)), found, color=colors[optimizer][shade], label=name)
    labels = [f"{decay:g}" for decay in decays]
    _finish(panels[1][1], "weight decay", "Weight decay", range(len(decays)), labels=labels)

    for name, (optimizer, beta2) in UPDATES.items():
        runs = cells.runs(optimizer, beta2, OURS)
        if runs:
            mean = [statistics.mean(values) for values in zip(*(run["update_rms"] for run in runs), strict=True)]
            shade = int(beta2 not in (0.999, 0.9999) or (optimizer, beta2) == ("adopt", 0.999))
            panels[1][2].plot(
                [i * EVERY for i in range(1, len(mean))], mean[1:], color=colors[optimizer][shade], label=name
            )
    _finish(panels[1][2], "step", "Update RMS, lr 0.001", [], place="lower center")
    panels[1][2].set_ylim(bottom=0)
    for panel in list(panels.flat)[:5]:
        panel.set_ylabel("held-out loss", fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _finish(
    panel: Any,
    x: str,
    title: str,
    ticks: Sequence[float],
    *,
    log: bool = False,
    labels: Sequence[str] = (),
    place: Any = "best",
) -> None:
    if log:
        panel.set_xscale("log")
    if ticks:
        panel.set_xticks(ticks, labels or [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
    panel.set_xlabel(x, fontsize=9)
    panel.set_title(title, fontsize=10)
    panel.spines[["top", "right"]].set_visible(False)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(frameon=False, fontsize=8, loc=place)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
