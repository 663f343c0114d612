"""The picture of `examples.paper.optimisation`: training loss over epochs. Reads summaries alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from examples.paper.pictures import STYLE

LINES = {
    "sgd": ("#009E73", "--"), "adamw": ("#000000", "-"), "ef": ("#D55E00", "-"), "sf": ("#E69F00", "-"),
    "ief": ("#0072B2", "-"), "ief-trust": ("#0072B2", "--"), "truncated-2": ("#CC79A7", "--"),
    "rows-2": ("#CC79A7", "-"), "exact": ("#56B4E9", "-"), "kfac-ief": ("#999999", "-"),
}  # fmt: skip
"""Colour and style by method; the others are in the table alone."""


def draw(summaries: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """A panel a task: the mean over seeds of the training loss at each method's chosen configuration.

    Args:
        summaries: by task.
        path: of the picture.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.3 * len(summaries) + 2.6, 4.1), layout="constrained")
        panels = figure.subplots(1, len(summaries), squeeze=False)[0]
        drawn: dict[str, Any] = {}
        for axes, (name, summary) in zip(panels, summaries.items(), strict=True):
            for key, (colour, style) in LINES.items():
                method = summary["methods"].get(key, {"seeds": []})
                curves = [run["losses"] for run in method["seeds"] if run["diverged"] is None]
                if curves:
                    mean = [fmean(losses) for losses in zip(*curves, strict=True)]
                    (drawn[method["name"]],) = axes.plot(range(len(mean)), mean, color=colour, linestyle=style)
            axes.set_yscale("log")
            axes.set_title(name)
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(visible=True)
        panels[0].set_ylabel("training loss")
        figure.legend(list(drawn.values()), list(drawn), loc="outside right upper", fontsize=9)
        figure.savefig(path)
