"""The pictures: accuracy over strength, and where each method's best strength lies. Reads curves alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.continual.methods import METHODS, STRUCTURES
from examples.continual.summary import Curve, Place, of_method
from examples.paper.pictures import STYLE

COLOURS = {
    "ef": "#D55E00", "ief": "#0072B2", "ief34": "#332288", "truncated-1": "#F0A6C8", "truncated-2": "#CC79A7",
    "sf": "#E69F00", "exact": "#009E73", "squared": "#999999", "mammoth": "#56B4E9", "l2": "#000000",
}  # fmt: skip
"""By kind: Okabe and Ito's, a lighter and a darker one."""

NORMALIZED = {"trace": "mean eigenvalue 1", "none": "as they are"}
REGIMES = {"fit": "fit to near zero loss", "early": "early stopped"}


def draw(found: Mapping[Place, Mapping[str, Curve]], out: Path) -> list[Path]:
    """A picture of the strength curves for each structure and normalization, and one of the best strengths.

    Args:
        found: by bench and regime, and then by normalization and method.
        out: the folder.

    Returns:
        The files.
    """
    files = []
    for normalization in NORMALIZED:
        for structure in STRUCTURES:
            names = [f"{normalization}/{key}" for key, m in METHODS.items() if m.structure == structure]
            places = [place for place, own in found.items() if any(name in own for name in names)]
            if places:
                files.append(out / f"strength-{structure}-{normalization}.png")
                _curves({place: found[place] for place in places}, names, structure, normalization, files[-1])
    if any(of_method(found, f"trace/{key}") for key, method in METHODS.items() if method.structure):
        files.append(out / "best-strengths.png")
        _best(found, files[-1])
    return files


def _curves(
    found: Mapping[Place, Mapping[str, Curve]], names: list[str], structure: str, normalization: str, path: Path
) -> None:
    """A column a bench, a row a regime."""
    benches = list(dict.fromkeys(bench for bench, _ in found))
    regimes = list(dict.fromkeys(regime for _, regime in found))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.4 * len(benches) + 2.4, 3.3 * len(regimes)), layout="constrained")
        panels = figure.subplots(len(regimes), len(benches), squeeze=False, sharex=True)
        drawn: dict[str, Any] = {}
        for (bench, regime), own in found.items():
            axes = panels[regimes.index(regime)][benches.index(bench)]
            for name in ["trace/l2", *names] if normalization == "trace" else names:
                if name in own:
                    _line(axes, own[name], METHODS[name.split("/")[1]].kind, drawn)
            for name, style in (("trace/none", ":"), ("trace/joint", "--")):
                if name in own:
                    title = METHODS[name.split("/")[1]].title
                    drawn[title] = axes.axhline(own[name].best, color="#777777", linestyle=style, linewidth=1)
            axes.set_xscale("log")
            axes.set_title(f"{bench}, {REGIMES[regime]}", fontsize=10)
            axes.grid(visible=True)
        for row in panels:
            row[0].set_ylabel("accuracy, %")
        for axes in panels[-1]:
            axes.set_xlabel("strength")
        title = f"{structure} Fishers, {NORMALIZED[normalization]}: accuracy after the last task, mean over tasks"
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.legend(list(drawn.values()), list(drawn), loc="outside right upper", fontsize=9)
        figure.savefig(path)


def _line(axes: Axes, curve: Curve, kind: str, drawn: dict[str, Any]) -> None:
    """A kind's curve, with a dot at its best."""
    title = next(method.title for method in METHODS.values() if method.kind == kind)
    style = "--" if kind in ("squared", "mammoth", "l2") else "-"
    (drawn[title],) = axes.plot(curve.strengths, curve.means, color=COLOURS[kind], linestyle=style, linewidth=1.4)
    axes.plot(curve.strength, curve.best, "o", color=COLOURS[kind], markersize=4)


def _best(found: Mapping[Place, Mapping[str, Curve]], path: Path) -> None:
    """A row a method, a mark for each bench and regime; as they are to the left, normalized to the right."""
    rows = [method for method in METHODS.values() if method.structure][::-1]
    places = list(found)
    marks = dict(zip(places, "os^DvP*Xh", strict=False))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 0.28 * len(rows) + 1.6), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        drawn: dict[str, Any] = {}
        for axes, normalization in zip(panels, ("none", "trace"), strict=True):
            for height, method in enumerate(rows):
                own = of_method(found, f"{normalization}/{method.key}")
                strengths = [curve.strength for curve in own.values()]
                if strengths:
                    axes.plot([min(strengths), max(strengths)], [height] * 2, color="#CCCCCC", zorder=0)
                for place, curve in own.items():
                    (drawn[", ".join(place)],) = axes.plot(
                        curve.strength, height, marks[place], color=COLOURS[method.kind], alpha=0.7, linestyle=""
                    )
            axes.set_xscale("log")
            axes.set_xlabel("best strength")
            axes.set_title(f"Fishers {NORMALIZED[normalization]}", fontsize=11)
            axes.grid(visible=True, axis="x")
        panels[0].set_yticks(range(len(rows)), [f"{method.structure}, {method.title}" for method in rows])
        figure.legend(list(drawn.values()), list(drawn), loc="outside right upper", fontsize=9)
        figure.savefig(path)
