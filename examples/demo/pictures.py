"""The demo's pictures. Owns how they look, and computes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from examples.demo.digits import Checkpoint, Digits
from examples.demo.measure import KINDS, Projection, Quality, Structures
from examples.demo.uses import Uses

# The colours of Okabe and Ito, "Color universal design" (2008), can be told apart with any colour vision; the markers
# say the same again.
_COLOURS = dict(
    zip(KINDS, ("#D55E00", "#E69F00", "#0072B2", "#8FD3BE", "#2FAE8B", "#00664B", "#CC79A7", "#000000"), strict=True)
)
_MARKERS = dict(zip(KINDS, ("s", "v", "^", "o", "P", "h", "D", "x"), strict=True))
_STRUCTURES = {
    "full": ("#000000", "-"),
    "block": ("#0072B2", "-"),
    "diagonal": ("#E69F00", "-"),
    "kfac": ("#CC79A7", "-"),
    "ekfac": ("#009E73", "--"),
}
_REQUESTS = {
    "EF": "the same of every example",
    "iEF": "‖∂ℓ/∂z‖²",
    "truncated, rank 1": "(1 − p) / p of the label",
    "exact": "(1 − p) / p of the label",
}
"""What each kind's undamped update asks of an example where the rows are linearly independent."""

_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": "#555555",
    "grid.color": "#E8E8E8",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "savefig.dpi": 150,
}

PICTURES = "uses.png", "summary.png", "quality.png", "projection.png", "spectra.png"


def draw(
    uses: Uses, digits: Digits, quality: list[Quality], projection: Projection, checkpoint: Checkpoint,
    structures: Structures, folder: Path,
) -> list[Path]:  # fmt: skip
    """Write all pictures.

    Args:
        uses: what a Fisher is for ...
        digits: ... on these.
        quality: γ over training.
        projection: what updates ask of examples ...
        checkpoint: ... and where.
        structures: spectra.
        folder: where to.

    Returns:
        The files.
    """
    with mpl.rc_context(_STYLE):
        figures = (
            _uses(uses, digits), _summary(quality, projection, checkpoint), _quality(quality), _projection(projection, checkpoint),
            _spectra(structures),
        )  # fmt: skip
        paths = [folder / name for name in PICTURES]
        for path, figure in zip(paths, figures, strict=True):
            figure.savefig(path)
    return paths


def _uses(uses: Uses, digits: Digits) -> Figure:
    """A panel for each use."""
    figure = Figure(figsize=(15, 3.9), layout="constrained")
    panels = figure.subplots(1, 4, width_ratios=(1, 1, 1, 0.95))
    plain, fisher = "#999999", "#0072B2"
    for (name, accuracy), colour in zip(uses.kept.items(), (plain, fisher), strict=True):
        panels[0].plot(range(len(accuracy)), accuracy, color=colour, label=name)
    panels[0].set(ylim=(0, 1), xlabel="epoch of learning the new task", ylabel="accuracy on the old task")
    panels[0].set_title("Keep what was learned")
    panels[0].legend(loc="lower left")
    means = {name: sum(tasks) / 2 for name, tasks in uses.merged.items()}
    colours = [fisher if "Fisher" in name else plain for name in means]
    bars = panels[1].barh([name.replace(" ", "\n", 1) for name in means], list(means.values()), color=colours, height=0.65)
    panels[1].bar_label(bars, [f"{mean:.0%}" for mean in means.values()], padding=3)
    panels[1].invert_yaxis()
    panels[1].set(xlim=(0, 1.12), xlabel="mean accuracy on both tasks")
    panels[1].set_title("Merge two models")
    panels[1].grid(visible=False)
    for (name, losses), style in zip(uses.losses.items(), ((plain, ":"), (plain, "--"), (fisher, "-")), strict=True):
        panels[2].plot(range(len(losses)), losses, color=style[0], linestyle=style[1], label=name)
    panels[2].set(yscale="log", xlabel="epoch", ylabel="training loss")
    panels[2].set_title("Train in better steps")
    panels[2].legend(loc="upper right")
    _examples(panels[3], uses, digits)
    return figure


def _examples(axes: Axes, uses: Uses, digits: Digits) -> None:
    """A held-out digit in the middle, the training digits that helped it most on the left, that harmed it on the right."""
    axes.set_title("Find the examples behind a mistake")
    axes.set(xlim=(-1.75, 1.75), ylim=(-1.75, 1.55), aspect="equal")
    axes.axis("off")
    shown = [(0.0, 0.0, digits.test_inputs[uses.query], int(digits.test_targets[uses.query]), "predicted wrongly")]
    for x, places, text in ((-1.25, uses.helpful, "helped most"), (1.25, uses.harmful, "harmed most")):
        for row, place in enumerate(places):
            shown.append((x, 1.05 - 1.05 * row, digits.inputs[place], int(digits.targets[place]), text if row == 2 else ""))
    for x, y, pixels, label, text in shown:
        axes.imshow(pixels.reshape(8, 8), extent=(x - 0.38, x + 0.38, y - 0.38, y + 0.38), cmap="gray_r")
        axes.text(x + 0.41, y, str(label), va="center", fontsize=10, color="#555555")
        axes.text(x, y - 0.55, text, ha="center", va="center", fontsize=10)


def _summary(quality: list[Quality], projection: Projection, checkpoint: Checkpoint) -> Figure:
    """The two findings side by side."""
    figure = Figure(figsize=(11.6, 4.3), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    for kind in ("EF", "iEF", "exact"):
        _scatter(left, projection, projection.share[kind], kind)
    left.set_ylabel("share of the loss reduction")
    left.set_xlabel("‖∂ℓ/∂z‖ of an example  (← fit · · · not fit →)")
    left.set_title(f"Asked of each example, epoch {checkpoint.epoch}")
    left.legend(loc="lower right", markerscale=1.5)
    _quality_lines(right, quality)
    right.set_title("Quality of the update over training")
    return figure


def _quality(quality: list[Quality]) -> Figure:
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    _quality_lines(axes, quality)
    axes.set_title("Quality of each kind's preconditioned update over training")
    return figure


def _quality_lines(axes: Axes, quality: list[Quality]) -> None:
    """γ/γ_SGD against epochs, with a band of one standard deviation where bands do not hide each other."""
    epochs = [q.epoch for q in quality]
    places = np.log1p(epochs)
    for kind in KINDS:
        mean = np.array([q.mean[kind] for q in quality])
        deviation = np.array([q.deviation[kind] for q in quality])
        if kind in {"EF", "iEF", "exact"}:
            # In logarithms, as the axis is: the band stays positive.
            band = np.exp(deviation / mean)
            axes.fill_between(places, mean / band, mean * band, color=_COLOURS[kind], alpha=0.12, linewidth=0)
        # The tolerance's line lies under the exact one's; both stay visible.
        style: dict[str, Any] = {"linestyle": "--", "zorder": 4} if kind == "exact" else {}
        style = {"linewidth": 4, "alpha": 0.8} if kind == "truncated, 1e-2" else style
        axes.plot(places, mean, color=_COLOURS[kind], marker=_MARKERS[kind], label=kind, **style)
    axes.axhline(1, color="#777777", linewidth=1, zorder=1)
    axes.annotate("the gradient itself", (0, 1), (0, 3), textcoords="offset points", color="#777777", fontsize=9)
    axes.set_yscale("log")
    axes.set_xticks(places, [str(epoch) for epoch in epochs])
    axes.set_yticks(ticks := [0.2, 0.3, 0.5, 1, 2, 3, 5], [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("epoch of training")
    axes.set_ylabel(r"$\gamma\,/\,\gamma_{\mathrm{SGD}}$  (lower is better)")
    note = "bands: one standard\ndeviation over batches"
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), title=note, title_fontsize=9, alignment="left")


def _projection(projection: Projection, checkpoint: Checkpoint) -> Figure:
    """Above, the loss reduction asked of each example; below, the step along the example's own gradient for it."""
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    panels = figure.subplots(2, len(_REQUESTS), sharex=True, sharey="row")
    for (above, below), (kind, request) in zip(panels.T, _REQUESTS.items(), strict=True):
        _scatter(above, projection, projection.share[kind], kind)
        _scatter(below, projection, projection.step[kind], kind)
        above.set_title(f"{kind}\n", fontsize=12)
        above.text(0, 1.02, f"asks {request}", transform=above.transAxes, color="#555555", fontsize=10)
    panels[0, 0].set_ylabel("share of the loss reduction")
    panels[1, 0].set_ylabel("step along the example's\nown gradient, relative")
    figure.supxlabel("‖∂ℓ/∂z‖ of an example  (← fit · · · not fit →)", fontsize=11)
    figure.suptitle(f"What one update asks of each example (epoch {checkpoint.epoch})", x=0.01, ha="left", fontsize=13)
    return figure


def _scatter(axes: Axes, projection: Projection, values: list[float], kind: str) -> None:
    colour = "#2FAE8B" if kind == "truncated, rank 1" else _COLOURS[kind]
    axes.scatter(
        projection.logit_gradient_norm, values, s=18, color=colour, marker=_MARKERS[kind], alpha=0.6, label=kind
    )
    axes.set_xscale("log")
    axes.set_yscale("log")


def _spectra(structures: Structures) -> Figure:
    """Eigenvalues of each kind in the full structure, and of each structure of the exact kind."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for kind, spectrum in structures.spectra.items():
        style = "--" if kind == "exact" else "-"
        left.plot(spectrum.index, spectrum.eigenvalue, color=_COLOURS[kind], linestyle=style, label=kind)
    for structure, spectrum in structures.structure_spectra.items():
        colour, style = _STRUCTURES[structure]
        right.plot(spectrum.index, spectrum.eigenvalue, color=colour, linestyle=style, label=structure)
    left.set_title("Kinds, full structure")
    right.set_title("Structures, exact kind")
    left.set_ylabel("eigenvalue")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("index")
        axes.legend(loc="lower left")
    # Below, rounding decides; the axis is shared.
    left.set_ylim(bottom=1e-10 * structures.spectra["exact"].eigenvalue[0])
    top = structures.spectra["iEF"]
    left.annotate(
        "iEF is not on\nthe Fisher's scale", (top.index[-1], top.eigenvalue[-1]), (12, 0), textcoords="offset points",
        color=_COLOURS["iEF"], fontsize=9,
    )  # fmt: skip
    return figure
