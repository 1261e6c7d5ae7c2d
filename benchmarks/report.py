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
    figure, panels = pyplot.subplots(
        1, len(kinds), figsize=(1 + 4.2 * len(kinds), 4.2), squeeze=False, layout="constrained"
    )
    for panel, work in zip(panels[0], kinds, strict=True):
        runs = [run for run in results["runs"] if run["work"] == work]
        names = [name for name in runs[0]["of_floor"] if name != "floor"]
        height = 0.8 / len(runs)
        for k, run in enumerate(runs):
            values = [run["of_floor"][name]["median"] for name in names]
            places = [i + k * height for i in range(len(names))]
            label = f"{run['threads']} thread{'s' * (run['threads'] > 1)}"
            bars = panel.barh(
                places, values, height * 0.92, label=label, color=("#9ecae1", "#08519c", "#636363")[k % 3]
            )
            panel.bar_label(bars, labels=[f"{value:.2f}" for value in values], padding=3, fontsize=8)
        panel.axvline(1, color="black", linewidth=1)
        panel.set_yticks([i + height * (len(runs) - 1) / 2 for i in range(len(names))], names, fontsize=9)
        panel.invert_yaxis()
        panel.set_xscale("log")
        highest = max(run["of_floor"][name]["median"] for run in runs for name in names)
        panel.set_xlim(0.8, max(2.0, highest * 1.8))
        ticks = [tick for tick in (1, 1.5, 2, 3, 5, 10, 20, 50) if tick <= max(2.0, highest * 1.8)]
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
        panel.set_title(works[work][0], fontsize=10)
        panel.set_xlabel("time of a step, x the memory floor")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, loc="lower right", frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
