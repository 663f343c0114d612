"""A picture of γ/γ_SGD against the damping. Needs matplotlib, imported when it is drawn: ``pip install ".[demo]"``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fisherkit.errors import InvalidArgumentError, MissingPackageError
from fisherkit.evaluation.table import QualityTable, average
from fisherkit.io import as_path, check_folder, part_of

# Okabe and Ito, "Color universal design" (2008): told apart with any colour vision; the markers say the same again.
_COLOURS = ("#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#8C6D1F", "#777777")
_MARKERS = ("s", "^", "v", "o", "D", "P", "x", "h", "*")


def plot_damping(tables: QualityTable | Sequence[QualityTable], path: str | Path) -> None:
    """γ/γ_SGD of every kind against the damping, a panel for each structure; both axes logarithmic.

    Args:
        tables: one table, or those of several batches, whose mean is drawn with a band of one standard deviation.
        path: of the picture; its ending chooses the format. A reader finds the old file or the whole new one.

    Raises:
        InvalidArgumentError: the folder does not exist, or the tables have no update with a damping.
        MissingPackageError: matplotlib is not installed.
    """
    check_folder(path := as_path(path, "plot_damping(path)"), "plot_damping(path)")
    found = average([tables] if isinstance(tables, QualityTable) else tables)
    values = {key: value for key, value in found.items() if key[2] is not None}
    if not values:
        raise InvalidArgumentError(call="plot_damping", got='tables of "sgd" alone', expected="a kind with a damping")
    kinds, structures, _ = ([*dict.fromkeys(part)] for part in zip(*values, strict=True))
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, ScalarFormatter
    except ImportError as error:
        missing = MissingPackageError.of(__name__, "matplotlib", "demo", error)
        raise missing from error

    figure = Figure(figsize=(1.6 + 4.2 * len(structures), 4.2), layout="constrained", dpi=150)
    figure.subplots(1, len(structures), sharey=True, squeeze=False)
    for axes, structure in zip(figure.axes, structures, strict=True):
        for number, kind in enumerate(kinds):
            style: dict[str, Any] = {"color": _COLOURS[number % len(_COLOURS)]}
            points = sorted((key[2], *value) for key, value in values.items() if key[:2] == (kind, structure))
            dampings, means, deviations = ([*part] for part in zip(*points, strict=True))
            axes.plot(dampings, means, label=kind, marker=_MARKERS[number % len(_MARKERS)], **style)
            if any(deviations):
                # In logarithms, as the axis is: the band stays positive.
                ratios = [1 + d / m for m, d in zip(means, deviations, strict=True)]
                low = [m / r for m, r in zip(means, ratios, strict=True)]
                high = [m * r for m, r in zip(means, ratios, strict=True)]
                axes.fill_between(dampings, low, high, alpha=0.12, linewidth=0, **style)
        axes.set(xscale="log", yscale="log", xlabel="damping λ", title=structure)
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
