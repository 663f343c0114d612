"""Pictures of γ/γ_SGD: against the damping, and over checkpoints. Owns how they look, and computes nothing.

Needs matplotlib, which is imported when a picture is drawn: ``pip install "fisherkit[demo]"``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fisherkit.errors import InvalidArgumentError, MissingPackageError
from fisherkit.evaluation.table import Key, QualityTable, average
from fisherkit.extras import missing
from fisherkit.io import as_path, check_folder, part_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Tables = QualityTable | Sequence[QualityTable]

# Okabe and Ito, "Color universal design" (2008): told apart with any colour vision; the markers say the same again.
_COLOURS = ("#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#8C6D1F", "#777777")
_MARKERS = ("s", "^", "v", "o", "D", "P", "x", "h", "*")


def plot_damping(tables: Tables, path: str | Path) -> None:
    """γ/γ_SGD of every kind against the damping, a panel for each structure; both axes logarithmic.

    Args:
        tables: one table, or those of several batches, whose mean is drawn with a band of one standard deviation.
        path: of the picture; its ending chooses the format.

    Raises:
        InvalidArgumentError: the folder does not exist, or the tables have no update with a damping.
    """
    path = _picture(path, "plot_damping(path)")
    values = {key: value for key, value in average(_listed(tables)).items() if key[2] is not None}
    structures, kinds = _ordered(values, 1), _ordered(values, 0)
    if not values:
        raise InvalidArgumentError(call="plot_damping", got='tables of "sgd" alone', expected="a kind with a damping")
    figure = _figure(len(structures))
    for axes, structure in zip(figure.axes, structures, strict=True):
        for number, kind in enumerate(kinds):
            points = {key[2]: v for key, v in values.items() if key[:2] == (kind, structure)}
            _line(axes, number, kind, points)
        axes.set_xscale("log")
        axes.set_xlabel("damping λ")
        axes.set_title(structure)
    _finish(figure, path)


def plot_checkpoints(series: Mapping[float, Tables], path: str | Path, *, damping: float) -> None:
    """γ/γ_SGD of every kind over checkpoints of a training run, a panel for each structure.

    Args:
        series: epoch or step to one table, or to those of several batches.
        path: of the picture.
        damping: λ whose rows are drawn; one of the tables' own.

    Raises:
        InvalidArgumentError: no checkpoint, the folder does not exist, or no row has this damping.
    """
    path = _picture(path, "plot_checkpoints(path)")
    values = {place: average(_listed(tables)) for place, tables in series.items()}
    chosen = {key for found in values.values() for key in found if key[2] == damping}
    if not chosen:
        known = sorted({key[2] for found in values.values() for key in found if key[2] is not None})
        raise InvalidArgumentError(call="plot_checkpoints", got=f"damping={damping}", expected=f"one of {known}")
    first = next(iter(values.values()))
    structures, kinds = (_ordered([key for key in first if key in chosen], part) for part in (1, 0))
    figure = _figure(len(structures))
    for axes, structure in zip(figure.axes, structures, strict=True):
        for number, kind in enumerate(kinds):
            key = kind, structure, damping
            _line(axes, number, kind, {place: found[key] for place, found in values.items() if key in found})
        axes.set_xlabel("checkpoint")
        axes.set_title(f"{structure}, λ = {damping:g}")
    _finish(figure, path)


def _line(axes: Axes, number: int, kind: str, points: Mapping[Any, tuple[float, float]]) -> None:
    """A kind's line with its band."""
    places = sorted(points)
    mean = [points[place][0] for place in places]
    # In logarithms, as the axis is: the band stays positive.
    ratio = [1 + points[place][1] / points[place][0] for place in places]
    style: dict[str, Any] = {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}
    axes.plot(places, mean, label=kind, **style)
    if any(r > 1 for r in ratio):
        low, high = (
            [m / r for m, r in zip(mean, ratio, strict=True)],
            [m * r for m, r in zip(mean, ratio, strict=True)],
        )
        axes.fill_between(places, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _figure(panels: int) -> Figure:
    """An empty one.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(**missing(__name__, "matplotlib", "demo", error)) from error

    figure = Figure(figsize=(1.6 + 4.2 * panels, 4.2), layout="constrained", dpi=150)
    figure.subplots(1, panels, sharey=True, squeeze=False)
    return figure


def _finish(figure: Figure, path: Path) -> None:
    """What all panels share; then the file, under a temporary name until it is whole."""
    from matplotlib.ticker import LogLocator, ScalarFormatter

    for axes in figure.axes:
        axes.set_yscale("log")
        # 1, 2 and 5 of every decade, written out: one decade often holds everything.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_locator(LogLocator(subs=()))
        axes.axhline(1, color="#777777", linewidth=1, zorder=1)
        axes.grid(visible=True, color="#E8E8E8")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel(r"$\gamma\,/\,\gamma_{\mathrm{SGD}}$  (lower is better)")
    figure.axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    with part_of(path) as part:
        figure.savefig(part, format=path.suffix.lstrip(".") or "png")
        os.replace(part, path)


def _picture(path: str | Path, call: str) -> Path:
    check_folder(as_path(path, call), call)
    return Path(path)


def _listed(tables: Tables) -> Sequence[QualityTable]:
    return [tables] if isinstance(tables, QualityTable) else tables


def _ordered(keys: Mapping[Key, Any] | Sequence[Key], part: int) -> list[str]:
    """The different kinds (0) or structures (1), in order."""
    return list(dict.fromkeys(str(key[part]) for key in keys))
