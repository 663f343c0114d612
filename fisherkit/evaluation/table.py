"""The table that `compare` returns: rows, text, the mean of several, and a picture of γ/γ_SGD against the damping.

The picture needs matplotlib, imported when it is drawn: ``pip install ".[demo]"``.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fisherkit.errors import InvalidArgumentError, MissingPackageError
from fisherkit.io import as_path, check_folder, replacing


@dataclass(frozen=True)
class QualityRow:
    """One update and how good it is.

    Args:
        kind: as it was asked for, "truncated:3" for example.
        structure: of its Fisher; "none" for "sgd".
        damping: λ, added to the Gram matrix ("full", "block") or to the Fisher (the others); None for "sgd".
        gamma: γ (eq. 15), in the sum normalization.
        relative_gamma: γ/γ_SGD; below 1 is better than the gradient.
        update_norm: ‖Δ‖₂.
        imbalance: standard deviation of the examples' ‖∇_θ ℓ_n‖ over their mean, a property of the batch. EF's
            step along an example's gradient goes as 1/‖∇_θ ℓ_n‖: the larger this is, the more biased EF.
        rows: R, rows of its Fisher; 0 for "sgd".
        seconds: time that the updates of this kind and structure took, all dampings together, without what kinds share.
    """

    kind: str
    structure: str
    damping: float | None
    gamma: float
    relative_gamma: float
    update_norm: float
    imbalance: float
    rows: int
    seconds: float


@dataclass(frozen=True)
class QualityTable:
    """How good every kind's update is on one batch.

    Args:
        rows: one for each kind, structure and damping.
        examples: N.
        dropped: examples that the updates left out as near-duplicates.
        seconds: of the whole comparison.
    """

    rows: tuple[QualityRow, ...]
    examples: int
    dropped: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> QualityTable:
        """The inverse of `to_dict`."""
        rows = tuple(QualityRow(**row) for row in found["rows"])
        return cls(rows, found["examples"], found["dropped"], found["seconds"])

    def __str__(self) -> str:
        """Columns of equal width under a line about the batch."""
        dropped = f", {self.dropped} of them left out of the updates as near-duplicates" if self.dropped else ""
        cells = [("kind", "structure", "damping", "γ", "γ/γ_SGD", "‖Δ‖", "rows", "ms"), *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        aligned = ("ljust", "ljust", *["rjust"] * (len(widths) - 2))
        lines = [
            "  ".join(getattr(cell, way)(width) for cell, way, width in zip(line, aligned, widths, strict=True))
            for line in cells
        ]
        imbalance = f"gradient-norm imbalance {self.rows[0].imbalance:.3g}" if self.rows else "no rows"
        return "\n".join([f"N = {self.examples} examples{dropped}; {imbalance}", "", *lines])


Key = tuple[str, str, float | None]
"""Kind, structure and damping."""


def average(tables: Sequence[QualityTable]) -> dict[Key, tuple[float, float]]:
    """γ/γ_SGD over several batches: the mean and the standard deviation, 0 for a single batch.

    Args:
        tables: of the same kinds, structures and dampings.

    Raises:
        InvalidArgumentError: no table, or tables of different updates.
    """
    keys = [[(row.kind, row.structure, row.damping) for row in table.rows] for table in tables]
    if not tables or any(other != keys[0] for other in keys):
        raise InvalidArgumentError(
            call="average(tables)",
            got="no table" if not tables else "tables of different kinds, structures or dampings",
            expected="tables that compare() made with the same arguments on different batches",
        )
    found: dict[Key, tuple[float, float]] = {}
    for key, rows in zip(keys[0], zip(*(table.rows for table in tables), strict=True), strict=True):
        values = [row.relative_gamma for row in rows]
        found[key] = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    return found


def _cells(row: QualityRow) -> tuple[str, ...]:
    damping = "" if row.damping is None else f"{row.damping:g}"
    numbers = (f"{value:.4g}" for value in (row.gamma, row.relative_gamma, row.update_norm))
    return (row.kind, row.structure, damping, *numbers, f"{row.rows:,}", f"{1e3 * row.seconds:.3g}")


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
    with replacing(path) as part:
        figure.savefig(part, format=path.suffix.lstrip(".") or "png")
