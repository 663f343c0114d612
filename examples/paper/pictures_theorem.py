"""The picture of the convergence theorems. Owns how it looks, and computes nothing but its axes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.paper.pictures import COLOURS, STYLE

if TYPE_CHECKING:
    from examples.paper.theorem import Run


def draw_theorem(ways: Mapping[str, Mapping[str, Run]], path: Path) -> None:
    """The softmax's bound, once a method, and the losses of least squares.

    Args:
        ways: of "softmax" and "ten outputs", by method.
        path: of the picture.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(13, 4.2), layout="constrained")
        panels = figure.subplots(1, 4)
        for axes, (method, way) in zip(panels, ways["softmax"].items(), strict=False):
            _softmax(axes, way, method)
            axes.set_title(f"softmax, {method}")
        panels[0].set_ylabel("1 − p of each example's label")
        for axes in panels[1:3]:
            axes.sharex(panels[0])
            axes.sharey(panels[0])
        panels[0].set_xlim(0.5, None)
        panels[0].set_ylim(1e-3, 1.2)
        panels[0].legend(loc="lower left", fontsize=9)
        _least_squares(panels[3], ways["ten outputs"])
        figure.savefig(path)


def _softmax(axes: Axes, way: Run, method: str) -> None:
    """1 − p against t + C₀ + 1, so that the bounds of all examples are one line."""
    rest = -torch.expm1(-way.losses)
    shift = 1 / rest[0] - way.losses[0] - rest[0].log() + 1
    end = 0.0
    for n in range(way.losses.shape[1]):
        x = way.time + shift[n]
        end = max(end, float(x[-1]))
        axes.plot(x[x > 0], rest[x > 0, n], color=COLOURS[method], linewidth=0.9, alpha=0.7)
    x = torch.logspace(-0.5, torch.tensor(max(end, 10.0)).log10().item(), 50)
    axes.plot(x, 2 / x, color="black", linestyle="--", label="theorem 5.3: below\n2/(t + C₀ + 1)")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("t + C₀ + 1")


def _least_squares(axes: Axes, ways: Mapping[str, Run]) -> None:
    for method in ("SGD", "EF", "iEF"):
        way = ways[method]
        share = way.losses / way.losses[0]
        axes.fill_between(way.time, share.amin(1), share.amax(1), color=COLOURS[method], alpha=0.25, linewidth=0)
        axes.plot(way.time, share.median(1).values, color=COLOURS[method], label=method)
    time = ways["iEF"].time
    axes.plot(time, (-2 * time).exp(), color="black", linestyle="--", label="theorem 5.4: e^(−2t)")
    axes.set_yscale("log")
    axes.set_ylim(1e-4, 20)
    axes.set_xlabel("t")
    axes.set_ylabel("loss left: all examples, and median")
    axes.set_title("ten outputs, ½‖z − y‖²")
    axes.legend(loc="lower left", fontsize=9)
