"""The pictures of `examples.paper.quality`. Owns how they look, and computes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from examples.paper.quality_report import name_of
from examples.paper.quality_summary import Summary

# Okabe and Ito's colours, which any colour vision tells apart; markers and dashes say the same again.
_LINES: dict[tuple[str, str], tuple[str, str, str]] = {
    ("full", "ef"): ("#D55E00", "s", "-"),
    ("full", "sf"): ("#CC79A7", "D", "-"),
    ("full", "ief:0.5"): ("#56B4E9", "v", "-"),
    ("full", "ief"): ("#0072B2", "^", "-"),
    ("full", "truncated:1"): ("#8FD3BE", "o", "-"),
    ("full", "truncated:2"): ("#2FAE8B", "P", "-"),
    ("full", "truncated:3"): ("#00664B", "h", "-"),
    ("full", "exact"): ("#000000", "x", "--"),
    ("kfac", "ef"): ("#D55E00", "s", ":"),
    ("kfac", "sf"): ("#CC79A7", "D", ":"),
    ("kfac", "ief"): ("#0072B2", "^", ":"),
    ("kfac", "exact"): ("#000000", "x", ":"),
}
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.edgecolor": "#555555",
    "grid.color": "#E8E8E8",
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "savefig.dpi": 110,
}


def draw(summaries: Mapping[str, Summary], folder: Path) -> list[Path]:
    """Write both pictures.

    Args:
        summaries: by task.
        folder: where to.

    Returns:
        The files.
    """
    with mpl.rc_context(_STYLE):
        figures = {"quality-training.png": _training(summaries), "quality-damping.png": _damping(summaries)}
        for name, figure in figures.items():
            figure.savefig(folder / name)
    return [folder / name for name in figures]


def _training(summaries: Mapping[str, Summary]) -> Figure:
    """A row a task: the full structure, then the Kronecker-factored one, at near-zero damping."""
    figure = Figure(figsize=(11, 3.3 * len(summaries) + 0.6), layout="constrained")
    panels = figure.subplots(len(summaries), 2, squeeze=False, sharey="row")
    for row, (name, s) in zip(panels, summaries.items(), strict=True):
        places = list(range(len(s.epochs)))
        for axes, structure in zip(row, ("full", "kfac"), strict=True):
            for (own, kind), (colour, marker, style) in _LINES.items():
                if own == structure and kind in s.curves.get(own, {}):
                    curve = s.curves[own][kind]
                    axes.errorbar(
                        places, curve.mean[:, 0], _bars(curve.mean[:, 0], curve.std[:, 0]), color=colour, marker=marker,
                        linestyle=style, elinewidth=0.7, label=name_of(own, kind),
                    )  # fmt: skip
            axes.set_title(f"{name}, {structure}, λ = {s.dampings[0]:g}")
            axes.set_xticks(places, [str(epoch) for epoch in s.epochs])
            axes.set_xlabel("epoch")
            _gamma_axis(axes)
        row[0].set_ylabel(r"$\gamma\,/\,\gamma_{\mathrm{SGD}}$  (lower is better)")
    _legend(figure, panels.ravel().tolist())
    return figure


def _damping(summaries: Mapping[str, Summary]) -> Figure:
    """A row a task: first, middle and last checkpoint."""
    figure = Figure(figsize=(11, 3.3 * len(summaries) + 0.6), layout="constrained")
    panels = figure.subplots(len(summaries), 3, squeeze=False, sharey="row")
    for row, (name, s) in zip(panels, summaries.items(), strict=True):
        for axes, place in zip(row, (0, len(s.epochs) // 2, len(s.epochs) - 1), strict=True):
            for (structure, kind), (colour, marker, style) in _LINES.items():
                if kind in s.curves.get(structure, {}):
                    mean = s.mean(kind, structure)[place]
                    axes.plot(
                        s.dampings, mean, color=colour, marker=marker, linestyle=style, label=name_of(structure, kind)
                    )
            axes.set_xscale("log")
            axes.set_xlabel("damping λ")
            axes.set_title(f"{name}, epoch {s.epochs[place]}")
            _gamma_axis(axes)
        row[0].set_ylabel(r"$\gamma\,/\,\gamma_{\mathrm{SGD}}$")
    _legend(figure, panels.ravel().tolist())
    return figure


def _bars(mean: Any, std: Any) -> Any:
    """One standard deviation to both sides, never down to zero on the logarithmic axis."""
    return [[min(d, 0.9 * m) for m, d in zip(mean, std, strict=True)], std]


def _gamma_axis(axes: Axes) -> None:
    axes.axhline(1, color="#777777", linewidth=1, zorder=1)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, panels: list[Axes]) -> None:
    """One for all panels; the grey line is the gradient itself."""
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }  # fmt: skip
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=9)
