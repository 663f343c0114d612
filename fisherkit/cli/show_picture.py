"""The picture of ``fisherkit show``: each layer's trace as a bar, and the largest eigenvalues. Needs matplotlib."""

from __future__ import annotations

import os
from pathlib import Path

from matplotlib.figure import Figure

from fisherkit.cli.summary import Summary
from fisherkit.io import part_of

MOST_BARS = 40
_BLUE, _ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito's, told apart with any colour vision


def draw(found: Summary, path: Path) -> None:
    """Write the picture, under a temporary name until it is whole.

    Args:
        found: what to draw; of many layers the ones with the largest traces.
        path: a PNG file.
    """
    kept = sorted(found.layers, key=lambda layer: -layer.trace)[:MOST_BARS]
    layers = [layer for layer in found.layers if layer in kept]
    positive = [value for value in found.eigenvalues or () if value > 0]
    figure = Figure(figsize=(9, max(3.2, 1.2 + 0.26 * len(layers))), layout="constrained", dpi=150)
    bars, spectrum = figure.subplots(1, 2)
    bars.barh([layer.name for layer in layers], [layer.trace for layer in layers], color=_BLUE)
    bars.invert_yaxis()
    left_out = len(found.layers) - len(layers)
    bars.set_xlabel("trace" + (f" (the largest; {left_out} layers left out)" if left_out else ""))
    if positive:
        spectrum.plot(range(1, len(positive) + 1), positive, color=_ORANGE, marker=".")
        spectrum.set_xscale("log")
        spectrum.set_yscale("log")
        spectrum.grid(visible=True, color="#E8E8E8")
    else:
        spectrum.text(0.5, 0.5, "no eigenvalues\nin closed form" if found.no_eigenvalues else "all are 0", ha="center")
        spectrum.set_xticks([])
        spectrum.set_yticks([])
    spectrum.set_xlabel("number, largest first")
    spectrum.set_ylabel("eigenvalue")
    for axes in (bars, spectrum):
        axes.spines[["top", "right"]].set_visible(False)
    title = " ".join(found.metadata[key] for key in ("kind", "structure", "model") if key in found.metadata)
    figure.suptitle(f"{title or found.operator}, D = {found.size:,}")
    with part_of(path) as part:
        figure.savefig(part, format="png")
        os.replace(part, path)
