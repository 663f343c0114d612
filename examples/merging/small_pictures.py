"""The pictures of `examples.merging.small`: accuracy over ρ and over damping. Reads summaries alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.merging.methods import DAMPING, GRID, RATIO, Setting
from examples.merging.small_summary import NAMES, Family, families
from examples.paper.pictures import STYLE

COLOURS = {
    "ef": "#D55E00", "ief": "#0072B2", "truncated:1": "#CC79A7", "truncated:2": "#AA4499", "sf": "#E69F00",
    "exact": "#56B4E9", "jtj": "#009E73",
}  # fmt: skip
"""Of kinds."""


def draw(summaries: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """Write ``merging-ratio.png`` and ``merging-damping.png``: a panel a suite, a line a kind.

    Args:
        summaries: by suite.
        out: folder of the pictures.
    """
    ratios = [s for s in GRID if s.normalize == "block" and s.ratio > 0 and s.damping == DAMPING]
    dampings = [s for s in GRID if s.normalize == "block" and s.ratio == RATIO]
    _figure(summaries, sorted(ratios, key=lambda s: s.ratio), "ratio", "ρ", out / "merging-ratio.png")
    _figure(summaries, sorted(dampings, key=lambda s: s.damping), "damping", "relative λ", out / "merging-damping.png")


def _figure(
    summaries: Mapping[str, Mapping[str, Any]], settings: list[Setting], axis: str, label: str, path: Path
) -> None:
    with mpl.rc_context(STYLE):
        rows = math.ceil(len(summaries) / 2)
        figure = Figure(figsize=(11, 3.2 * rows), layout="constrained")
        panels = figure.subplots(rows, 2, squeeze=False).flatten()
        for axes in panels[len(summaries) :]:
            axes.remove()
        drawn: dict[str, Any] = {}
        for axes, (name, summary) in zip(panels, summaries.items(), strict=False):
            found = families(summary)
            for kind, colour in COLOURS.items():
                if (family := found.get(f"kfac/{kind}")) is not None:
                    x = [getattr(setting, axis) for setting in settings]
                    y = [fmean(family.test(setting.key)) for setting in settings]
                    (drawn[NAMES[kind]],) = axes.plot(x, y, "o-", color=colour, markersize=3)
            drawn["RegMean, 0.9"] = _level(axes, found["regmean"], "0.9", "--")
            drawn["average"] = _level(axes, found["average"], "", ":")
            axes.set_xscale("log")
            axes.set_title(name)
            axes.set_xlabel(label)
            axes.set_ylabel("held-out accuracy, %")
            axes.grid(visible=True)
        figure.legend(list(drawn.values()), list(drawn), loc="outside right upper", fontsize=9)
        figure.savefig(path)


def _level(axes: Axes, family: Family, setting: str, style: str) -> Any:
    return axes.axhline(fmean(family.test(setting)), color="black", linestyle=style, linewidth=1.2)
