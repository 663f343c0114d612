"""The pictures: scores over damping, and scores against time. Reads results alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.influence.summary import Curve, curves
from examples.paper.pictures import STYLE

COLOURS = {
    "full, EF": "#D55E00", "full, iEF": "#0072B2", "full, SF 1": "#E69F00", "full, truncated 1": "#F0A6C8",
    "full, truncated 2": "#CC79A7", "full, truncated 3": "#882255", "full, exact": "#009E73",
    "full, exact, N rows": "#44AA99", "EKFAC, exact": "#56B4E9", "KFAC, exact": "#332288",
    "diagonal, exact": "#999999", "kronfluence EKFAC": "#000000", "kronfluence KFAC": "#777777",
}  # fmt: skip
"""Of the methods that get a colour of their own; others are grey."""


def draw(results: Mapping[str, Mapping[str, Any]], out: Path) -> list[Path]:
    """Both pictures.

    Args:
        results: by setting.
        out: the folder.

    Returns:
        The files.
    """
    found = {result["title"]: curves(result) for result in results.values()}
    files = [out / "time.png"]
    _panels(found, _time, "Score over time, λ = 1 × the mean eigenvalue", files[0])
    if any(len(curve.means) > 1 for own in found.values() for curve in own.values()):
        files.append(out / "damping.png")
        _panels(found, _damping, "Score over damping", files[1])
    return files


def _panels(found: Mapping[str, Mapping[str, Curve]], draw_one: Any, title: str, path: Path) -> None:
    """A panel a setting, one legend."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(found) + 2.8, 4.6), layout="constrained")
        drawn: dict[str, Any] = {}
        for axes, (name, own) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
            draw_one(axes, own, drawn)
            axes.set_xscale("log")
            axes.set_ylabel("linear datamodeling score")
            axes.set_title(name, fontsize=9)
            axes.grid(visible=True)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.legend(list(drawn.values()), list(drawn), loc="outside right upper", fontsize=8)
        figure.savefig(path)


def _damping(axes: Axes, own: Mapping[str, Curve], drawn: dict[str, Any]) -> None:
    for name, curve in own.items():
        if name in COLOURS and len(curve.means) > 1:
            line = axes.plot(list(curve.means), list(curve.means.values()), ".-", color=COLOURS[name], linewidth=1.3)
            drawn[name] = line[0]
    for name, style in (("dot product", ":"), ("cosine", "--")):
        if name in own:
            drawn[name] = axes.axhline(own[name].value, color="#777777", linestyle=style, linewidth=1)
    axes.set_xlabel("λ over the mean eigenvalue")


def _time(axes: Axes, own: Mapping[str, Curve], drawn: dict[str, Any]) -> None:
    for name, curve in own.items():
        colour = COLOURS.get(name, "#BBBBBB")
        low, high = curve.row["interval"]
        bars = axes.errorbar(
            curve.seconds, curve.value, yerr=[[curve.value - low], [high - curve.value]], fmt="o", color=colour,
            markersize=5, elinewidth=0.6,
        )  # fmt: skip
        drawn[name if name in COLOURS else "others"] = bars
    axes.set_xlabel("processor seconds a model, fit and scores")
