"""The pictures of the small parts. Owns how they look, and computes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from examples.paper.toys import Drawing, Toy

# Okabe and Ito's colours, as in the demo's pictures.
COLOURS = {"SGD": "#009E73", "EF": "#D55E00", "iEF": "#0072B2", "NGD": "#CC79A7"}
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "grid.color": "#E8E8E8",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "savefig.dpi": 130,
}


def draw_toy(toy: Toy, drawings: Mapping[str, Drawing], path: Path) -> None:
    """A panel for each method: where it goes from everywhere, and how it goes on from a few places.

    Args:
        toy: whose loss is shown as contours.
        drawings: by method.
        path: of the picture.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(13, 4.1), layout="constrained")
        panels = figure.subplots(1, len(drawings), sharex=True, sharey=True)
        for axes, (method, drawing) in zip(panels, drawings.items(), strict=True):
            _contours(axes, toy)
            x, y = zip(*drawing.places, strict=True)
            dx, dy = zip(*drawing.arrows, strict=True)
            axes.quiver(x, y, dx, dy, color="#888888", pivot="mid", angles="xy", width=0.005, scale=19)
            for points, ended in zip(drawing.paths, drawing.ends, strict=True):
                axes.plot(*zip(*points, strict=True), color=COLOURS[method])
                axes.plot(*points[0], "o", color=COLOURS[method], markersize=5)
                if ended:
                    axes.plot(*points[-1], "X", color="black", markersize=7, zorder=5)
            axes.set_title(method)
            axes.set_xlabel("θ₀")
            axes.set_xlim(*toy.window[:2])
            axes.set_ylim(*toy.window[2:])
        panels[0].set_ylabel("θ₁")
        stuck = any(ended for drawing in drawings.values() for ended in drawing.ends)
        note = "dots: starts" + ("; crosses: the loss falls no further along the update" if stuck else "")
        figure.suptitle(f"{toy.title}: where each update goes ({note})", x=0.01, ha="left", fontsize=11)
        figure.savefig(path)


def _contours(axes: Axes, toy: Toy) -> None:
    """Lines of equal loss, equally spaced in its square root."""
    left, right, low, high = toy.window
    first, second = torch.linspace(left, right, 80), torch.linspace(low, high, 80)
    x, y = torch.tensor(toy.inputs), torch.tensor(toy.targets)
    z = first[None, :, None] + second[:, None, None] * x
    if toy.likelihood == "gaussian":
        loss = 0.5 * (z - y).square().sum(-1)
    else:
        loss = torch.nn.functional.softplus(z * (1 - 2 * y)).sum(-1)
    axes.contour(first, second, loss.sqrt(), levels=9, colors="#C8D4E0", linewidths=0.8)
