"""Bars in units of one gradient: one picture a workload."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from examples.benchmarks.measure import Record
from examples.benchmarks.operations import OPERATIONS, PEERS
from examples.benchmarks.ours import NAME
from examples.benchmarks.report import number, title

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Okabe and Ito's palette, told apart by colour-blind eyes too; ours is the one saturated colour.
COLOURS = dict(zip((NAME, *PEERS), ("#D55E00", "#0072B2", "#56B4E9", "#009E73", "#999999"), strict=True))
BAR = 0.17


def draw(results: Record, workload: str, path: Path) -> None:
    """Write ``bars-<workload>.png``.

    Args:
        results: of a results file.
        workload: whose cells are drawn.
        path: of the picture.
    """
    groups = []
    for name in OPERATIONS:
        for record in results["cells"]:
            if record["workload"] == workload and record["operation"] == name:
                everybody = [(NAME, record), *((p["name"], p) for p in record["peers"])]
                bars = [(who, entry["units"]) for who, entry in everybody if "units" in entry]
                if bars:
                    groups.append((title(record), bars))
    height = sum(BAR * len(bars) + 0.22 for _, bars in groups) + 1.3
    figure, axes = plt.subplots(figsize=(9, height), layout="constrained")
    y, ticks = 0.0, []
    for label, bars in groups:
        ticks.append((y + BAR * (len(bars) - 1) / 2, label))
        for who, units in bars:
            axes.barh(y, units, height=0.9 * BAR, color=COLOURS[who], label=who)
            axes.annotate(f" {number(units)}", (units, y), va="center", fontsize=7)
            y += BAR
        y += 0.22
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.01)
    axes.set_xlabel("time in units of one forward and backward pass, log scale; the dotted line is 1")
    axes.set_title(f"{workload}: {results['settings']['titles'][workload]}", fontsize=9, loc="left")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    order = [who for who in COLOURS if who in unique]
    figure.legend([unique[who] for who in order], order, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
