"""The defaults of `EWC` beside other libraries' ways and the best of everything. Reads curves alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from examples.continual.summary import Curve, Place
from examples.shared.results import half_interval, markdown

DEFAULT, STRENGTH = "none/kfac-ief34", 3.0
"""The kind and structure that the documentation names first, and `EWC`'s own normalization and strength."""

FORMER, FORMER_STRENGTH = "trace/kfac-ief", 0.1
"""The same until it was replaced."""

OTHERS = {"trace/l2": "L2", "none/diagonal-squared": "Avalanche's", "none/diagonal-mammoth": "mammoth's"}


def libraries(found: Mapping[Place, Mapping[str, Curve]]) -> str:
    """Average accuracy and forgetting, a row for each place."""
    header = (
        "", "none", *OTHERS.values(), "former default", "default", "best, chosen on other seeds", "default less that",
        "forgetting: Avalanche's", "forgetting: mammoth's", "forgetting: default", "joint",
    )  # fmt: skip
    rows = []
    for (bench, regime), own in found.items():
        default = own.get(DEFAULT)
        if default is None or STRENGTH not in default.strengths:
            continue
        place = default.strengths.index(STRENGTH)
        best = chosen_elsewhere(own)
        gap = [a - b for a, b in zip(default.accuracy[place], best, strict=True)]
        rows.append(
            (
                f"{bench}, {regime}", _mean(own, "trace/none"), *(_mean(own, name) for name in OTHERS),
                _former(own), interval(default.accuracy[place]), f"{fmean(best):.1f}", interval(gap, "+"),
                *(_lost(own.get(name)) for name in list(OTHERS)[1:]), _lost(default, place), _mean(own, "trace/joint"),
            )
        )  # fmt: skip
    text = (
        "Average accuracy over all tasks after the last one, with 95 % intervals over seeds, and forgetting: the "
        "accuracy that a task had when it was learned less what is left of it, mean over all tasks but the last. "
        "The default is kfac, iEF of power ¾ as it is, `strength=3`, chosen on the six rows of perceptrons; the GRU, "
        'the transformer and LoRA are new to it. The former one was kfac, iEF, `normalize="trace"`, `strength=0.1`. '
        "L2, Avalanche's (squared gradients of batches, each task around its own centre) and mammoth's (squared "
        "gradients of examples times the label's probability, all around the newest centre) have the best strength of "
        "a sweep in each row. *Best, chosen on other seeds* is that of all methods, normalizations and strengths: for "
        "each seed what is best on the others, so that luck does not count.\n\n"
    )
    return text + markdown(header, rows) if rows else ""


def laplace(found: Mapping[Place, Mapping[str, Curve]]) -> str:
    """The best strength of trace-normalised iEF as a multiple of what the Laplace approximation says."""
    rows = []
    for (bench, regime), own in found.items():
        former, exact = own.get(FORMER), own.get("none/kfac-exact") or own.get("trace/kfac-exact")
        if former is not None and exact is not None and exact.cell["eigenvalues"]:
            means = exact.cell["eigenvalues"]
            ratio = former.strength / fmean(means)
            cells = f"{former.strength:.2g}", f"{means[0]:.2g}", f"{fmean(means):.2g}", f"{ratio:.2g}"
            rows.append((f"{bench}, {regime}", *cells))
    header = ("", "best strength", "mean eigenvalue, first task", "mean over tasks", "multiple")
    text = (
        "A strength s with trace-normalised Fishers is s · D / trace F times what the Laplace approximation says, for "
        "tasks of equal size, F the exact Fisher. Here s is the best strength of kfac, iEF, and trace F / D "
        "that of the exact Fisher: of the first task, which was learned without a penalty, and the mean over tasks, "
        "by which s is divided.\n\n"
    )
    return text + markdown(header, rows) if rows else ""


def chosen_elsewhere(own: Mapping[str, Curve]) -> list[float]:
    """By seed: the accuracy of what is best on all other seeds."""
    rows = [row for curve in own.values() if curve.strengths for row in curve.accuracy]
    return [
        max(rows, key=lambda row: fmean(x for other, x in enumerate(row) if other != seed))[seed]
        for seed in range(len(rows[0]))
    ]


def interval(values: Sequence[float], sign: str = "") -> str:
    """A mean and half its 95 % interval."""
    return f"{fmean(values):{sign}.1f} ± {half_interval(values):.1f}"


def _mean(own: Mapping[str, Curve], name: str) -> str:
    """At the best strength, where there is one."""
    if name not in own:
        return ""
    curve = own[name]
    return interval(curve.at_best) + ("*" if curve.strengths and curve.at_edge else "")


def _former(own: Mapping[str, Curve]) -> str:
    """At the strength that it was the default with."""
    curve = own.get(FORMER)
    if curve is None or FORMER_STRENGTH not in curve.strengths:
        return ""
    return interval(curve.accuracy[curve.strengths.index(FORMER_STRENGTH)])


def _lost(curve: Curve | None, place: int | None = None) -> str:
    """Forgetting at a strength, the best one if none is named."""
    if curve is None:
        return ""
    place = curve.place if place is None else place
    learned, final = (curve.cell[name][place][:-1] for name in ("learned", "final"))
    return f"{fmean(learned) - fmean(final):.1f}"
