"""Turn the measurements of the benchmarks into Markdown tables and charts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
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


MIB = 2**20


def _about(results: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in results["machine"].items() if value is not None) + "."


def memory_table(results: Mapping[str, Any], labels: Mapping[str, str], bar: Callable[[dict[str, Any]], float]) -> str:
    """Return what `memory.py` has measured as one table a number of ranks."""
    lines = ["# What a rank holds at most", "", _about(results), ""]
    lines += [
        "MiB a rank. `above`: the peak of what torch's allocator has given out, above the model's parameters and the",
        "activations of one forward and backward. `resident`: the same from the high-water mark of the resident set.",
        "`between steps`: what stays, above the parameters. `bar`: 12/W bytes a parameter, three buckets, the largest",
        "gradient. FSDP2 shards the parameters too, so that it stands below them.",
        "",
        "Rerun: `python benchmarks/memory.py`",
        "",
    ]
    for world_size in dict.fromkeys(run["world_size"] for run in results["runs"]):
        runs = [run for run in results["runs"] if run["world_size"] == world_size]
        first = runs[0]
        lines += [f"## {world_size} rank{'s' * (world_size > 1)}", ""]
        lines += [
            f"{first['numel']:,} parameters ({first['model'] / MIB:.1f} MiB), activations "
            f"{first['activations'] / MIB:.1f}, largest gradient {first['largest_gradient'] / MIB:.1f}, largest bucket "
            f"{first['largest_bucket'] / MIB:.1f}.",
            "",
            "| | above | resident | between steps | bar |",
            "|---|---|---|---|---|",
        ]
        for run in runs:
            limit = f"{bar(run) / MIB:.1f}" if run["name"] == "ours-zero2" else ""
            keys = ("above", "resident_above", "between_steps")
            figures = " | ".join(f"{run[key] / MIB:.1f}" if key in run else "" for key in keys)
            lines.append(f"| {labels[run['name']]} | {figures} | {limit} |")
        lines.append("")
    return "\n".join(lines)


def memory_chart(
    results: Mapping[str, Any], labels: Mapping[str, str], bar: Callable[[dict[str, Any]], float], path: Path
) -> None:
    """Draw the peaks above model and activations as bars, one panel a number of ranks, with the bar of ZeRO-2."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = list(dict.fromkeys(run["world_size"] for run in results["runs"]))
    figure, panels = pyplot.subplots(1, len(sizes), figsize=(4.2 * len(sizes) + 1.5, 3.2), squeeze=False, sharey=True)
    end = 1.2 * max(run["above"] for run in results["runs"]) / MIB
    for panel, world_size in zip(panels.flat, sizes, strict=True):
        runs = [run for run in results["runs"] if run["world_size"] == world_size]
        colours = ["#08519c" if run["name"].startswith("ours") else "#9ecae1" for run in runs]
        values = [run["above"] / MIB for run in runs]
        bars = panel.barh([labels[run["name"]] for run in runs], values, color=colours)
        texts = panel.bar_label(bars, labels=[f"{value:.0f}" for value in values], padding=-4, fontsize=8)
        for text, run in zip(texts, runs, strict=True):
            text.set(ha="right", color="white" if run["name"].startswith("ours") else "black")
        limits = [bar(run) / MIB for run in runs if run["name"] == "ours-zero2"]
        for limit in limits:
            panel.axvline(limit, color="black", linewidth=1, linestyle="--")
            panel.text(limit, -0.72, f" bar of ZeRO-2: {limit:.0f}", fontsize=8)
        panel.set_xlim(min(0.0, *(1.2 * value for value in values)), end)
        panel.set_ylim(len(runs) - 0.5, -0.9)
        panel.set_title(f"{world_size} rank{'s' * (world_size > 1)}", fontsize=10, pad=14)
        panel.set_xlabel("MiB above model and activations", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def scaling_table(results: Mapping[str, Any]) -> str:
    """Return what `scaling.py` has measured."""
    load = " to ".join(f"{value:.1f}" for value in results["load"])
    lines = ["# CPU time of the update kernels on each rank", "", _about(results), ""]
    lines += [
        f"GPT-2, 124.4 M fp32 parameters; {results['rounds']} rounds, load of the machine {load}; one thread a rank.",
        "`kernels`: within the compiled pass over memory; `step`: with the Python around it, which every rank runs for",
        "all its 148 segments. Milliseconds are those of the slowest rank, by medians. `x even`: CPU time over that of",
        "one rank divided by W, least to most of the ranks. The bar is 1.15.",
        "",
        "Rerun: `python benchmarks/scaling.py`",
        "",
        "| ranks | elements of the largest shard | kernels, ms | x even | step, ms | x even |",
        "|---|---|---|---|---|---|",
    ]
    for run in results["runs"]:
        cells = [str(run["world_size"]), f"{max(run['numel']):,}"]
        for part in (run["kernels"], run["step"]):
            ratios = part["of_even"]
            cells += [f"{part['milliseconds']:.1f}", f"{min(ratios):.2f} to {max(ratios):.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def scaling_chart(results: Mapping[str, Any], path: Path) -> None:
    """Draw the CPU time of the slowest rank against the number of ranks, and what an even share would take."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = results["runs"]
    sizes = [run["world_size"] for run in runs]
    times = [run["kernels"]["milliseconds"] for run in runs]
    even = [times[0] / size for size in sizes]
    figure, panel = pyplot.subplots(figsize=(5.5, 3.8), layout="constrained")
    panel.fill_between(sizes, even, [1.15 * one for one in even], color="#c6dbef", label="1/W, and 15 % more")
    panel.plot(sizes, times, "o-", color="#08519c", label="measured, slowest rank")
    for size, milliseconds in zip(sizes, times, strict=True):
        panel.annotate(
            f"{milliseconds:.1f}", (size, milliseconds), textcoords="offset points", xytext=(7, 5), fontsize=8
        )
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.set_xticks(sizes, [str(size) for size in sizes])
    ticks = [2.0**power for power in range(2, 11) if min(times) / 2 < 2.0**power < 2 * max(times)]
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.set_xlabel("ranks")
    panel.set_ylabel("CPU time of the update kernels, ms a rank")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
