"""Turn the measurements of `step.py` into a Markdown table and a bar chart."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def table(results: Mapping[str, Any], works: Mapping[str, tuple[str, Any, Any]], *, heading: bool) -> str:
    """Return one table a run; with `heading`, the machine and what the columns mean come first."""
    lines = []
    if heading:
        about = results["machine"]
        lines += ["# One optimizer step", ""]
        lines += [", ".join(f"{key} {value}" for key, value in about.items() if value is not None) + ".", ""]
        if about["gpu"] is None:
            lines += ["No GPU was to be had: the Triton kernel is not measured here.", ""]
        lines += [
            "`x floor`: time over that of a bare pass over the same memory in the same round, median (least to most).",
            "`extra`: growth of the resident set during a warm step, bytes a parameter.",
            "",
        ]
    for run in results["runs"]:
        title = works[run["work"]][0]
        lines += [f"## {title}, {run['threads']} thread{'s' * (run['threads'] > 1)}", ""]
        load = " to ".join(f"{value:.1f}" for value in run["load"])
        lines += [f"{run['rounds']} rounds, load of the machine {load}.", ""]
        lines += ["| | x floor | ms | extra |", "|---|---|---|---|"]
        for name, ratio in run["of_floor"].items():
            milliseconds = statistics.median(run["seconds"][name]) * 1e3
            extra = run["extra_bytes_a_parameter"][name]
            spread = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
            lines.append(f"| {name} | {spread} | {milliseconds:.2f} | {extra:.2f} |")
        lines.append("")
        if run["of_adamw"]:
            ratio = run["of_adamw"]
            lines.append(
                f"sharded_adopt takes {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) of the time of "
                "torch's fused AdamW in the same round."
            )
            lines.append("")
    return "\n".join(lines)


def chart(results: Mapping[str, Any], works: Mapping[str, tuple[str, Any, Any]], path: Path) -> None:
    """Draw the median ratios to the floor as bars, one panel a kind of work, one colour a number of threads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [work for work in works if any(run["work"] == work for run in results["runs"])]
    of_kind = {work: [run for run in results["runs"] if run["work"] == work] for work in kinds}
    most = max(len(run["of_floor"]) - 1 for run in results["runs"])
    columns = min(2, len(kinds))
    rows = -(-len(kinds) // columns)
    size = (6.2 * columns, 0.6 + (1 + 0.42 * most) * rows)
    figure, panels = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for panel in list(panels.flat)[len(kinds) :]:
        panel.axis("off")
    labelled: dict[str, Any] = {}
    for panel, work in zip(panels.flat, kinds, strict=False):
        runs = of_kind[work]
        names = [name for name in runs[0]["of_floor"] if name != "floor"]
        height = 0.8 / len(runs)
        for k, run in enumerate(runs):
            values = [run["of_floor"][name]["median"] for name in names]
            places = [i + k * height for i in range(len(names))]
            bars = panel.barh(places, values, height * 0.9, color=("#9ecae1", "#08519c", "#636363")[k % 3])
            panel.bar_label(bars, labels=[f"{value:.2f}" for value in values], padding=3, fontsize=8)
            labelled.setdefault(f"{run['threads']} thread{'s' * (run['threads'] > 1)}", bars)
        panel.axvline(1, color="black", linewidth=1)
        panel.set_yticks([i + height * (len(runs) - 1) / 2 for i in range(len(names))], names, fontsize=9)
        panel.set_ylim(most - 0.3, -0.5)
        panel.set_xscale("log")
        end = max(2.0, 1.8 * max(run["of_floor"][name]["median"] for run in runs for name in names))
        panel.set_xlim(0.8, end)
        ticks = [tick for tick in ((1, 1.5, 2) if end < 5 else (1, 2, 5, 10, 20, 50, 100)) if tick <= end]
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
        panel.set_title(works[work][0], fontsize=10)
        panel.set_xlabel("time of a step, x the memory floor", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(labelled.values(), labelled.keys(), loc="outside upper center", ncols=len(labelled), frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
