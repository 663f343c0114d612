"""What was claimed beforehand, and what came out. Reads curves alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean

from examples.benchmarks.report import markdown
from examples.continual.methods import KINDS
from examples.continual.summary import Curve, Place, of_method, span, verdict

Found = Mapping[Place, Mapping[str, Curve]]
Row = tuple[str, str, str, str]
DIGITS = ("permuted-digits", "fit")

SKETCH = {
    "kfac": {"ef": 81.4, "sf": 79.2, "ief": 86.9, "exact": 86.7},
    "full": {"ef": 77.4, "ief": 89.9, "exact": 87.8},
}
"""An earlier sketch's accuracies on permuted digits, fit to near zero loss."""


def claims(found: Found) -> str:
    """Every claim with figures."""
    rows = [row for make in _CLAIMS for row in make(found)]
    text = (
        "*yes* and *no* where the lead over the same seeds is beyond two standard errors, else *level*; each method at "
        "its best strength.\n\n"
    )
    return text + markdown((("claim", "sketch", "here", ""), rows)) if rows else ""


def _pairs(found: Found) -> list[Row]:
    """IEF against EF and exact on permuted digits, fit."""
    rows = []
    own = found.get(DIGITS, {})
    for structure in ("diagonal", "kfac", "full"):
        for normalization in ("trace", "none"):
            for other in ("ef", "exact"):
                a, b = (own.get(f"{normalization}/{structure}-{kind}") for kind in ("ief", other))
                if a is None or b is None:
                    continue
                lead, said = verdict(a.at_best, b.at_best)
                sketch = SKETCH.get(structure)
                before = f"{sketch['ief']} / {sketch[other]}" if sketch else ("+3.6" if other == "ef" else "ties")
                text = f"{structure}, {_SAID[normalization]}: iEF above {KINDS[other][0]}"
                rows.append(
                    (f"permuted digits, fit, {text}", before, f"{a.best:.1f} / {b.best:.1f} ({lead:+.1f})", said)
                )
    return rows


def _early(found: Found) -> list[Row]:
    """No kind wins when stopped early."""
    rows = []
    for (bench, regime), own in found.items():
        if regime != "early":
            continue
        for structure in ("diagonal", "kfac", "full"):
            curves = {k: own[f"trace/{structure}-{k}"] for k in KINDS if f"trace/{structure}-{k}" in own}
            if len(curves) < 2:
                continue
            top = max(curves, key=lambda kind: curves[kind].best)
            second = max((k for k in curves if k != top), key=lambda kind: curves[kind].best)
            low = min(curve.best for curve in curves.values())
            lead, said = verdict(curves[top].at_best, curves[second].at_best)
            here = f"{KINDS[top][0]} {curves[top].best:.1f}, then {KINDS[second][0]} ({lead:+.1f}), least {low:.1f}"
            rows.append(
                (
                    f"early stopped, {bench}, {structure}: no kind wins",
                    "none wins",
                    here,
                    "no" if said == "yes" else "yes",
                )
            )
    return rows


def _spans(found: Found) -> list[Row]:
    """How far raw diagonals' best strengths lie apart."""
    rows = []
    for kind, before in (("ef", "5.5"), ("exact", "4"), ("ief", "1.5")):
        own = of_method(found, f"none/diagonal-{kind}")
        if len(own) > 1:
            trace = of_method(found, f"trace/diagonal-{kind}")
            here = f"{span(own):.1f} over {len(own)}; trace-normalised {span(trace):.1f}"
            rows.append(
                (f"decades between best strengths, diagonal {KINDS[kind][0]} as it is", f"{before} over 4", here, "")
            )
    return rows


def _tenth(found: Found) -> list[Row]:
    """Trace-normalised KFAC at strength 0.1."""
    rows = []
    for kind, (name, _, _) in KINDS.items():
        own = of_method(found, f"trace/kfac-{kind}")
        losses = {place: curve.loss_at(0.1) for place, curve in own.items() if 0.1 in curve.strengths}
        if losses:
            worst = max(losses, key=losses.__getitem__)
            here = f"{losses[worst]:.1f} at worst ({', '.join(worst)}), {fmean(losses.values()):.1f} on average"
            rows.append(
                (
                    f"trace-normalised KFAC {name} at 0.1: points below its best",
                    "≤ 0.2",
                    here,
                    "yes" if losses[worst] <= 0.2 else "no",
                )
            )
    return rows


def _squared(found: Found) -> list[Row]:
    """Squared batch gradients reach EF's accuracy at a larger strength."""
    rows = []
    for (bench, regime), own in found.items():
        a, b = own.get("none/diagonal-squared"), own.get("none/diagonal-ef")
        if a is None or b is None:
            continue
        lead, said = verdict(a.at_best, b.at_best)
        here = f"{a.best:.1f} / {b.best:.1f} ({lead:+.1f}), at {a.strength / b.strength:.2g} times the strength"
        rows.append(
            (
                f"{bench}, {regime}: squared batch gradients reach diagonal EF's accuracy",
                "yes, at 100 times",
                here,
                "no" if said == "no" else "yes",
            )
        )
    return rows


def _grids(found: Found) -> list[Row]:
    """What a grid of whole decades would have said."""
    changed, pairs, largest = 0, 0, 0.0
    for own in found.values():
        for structure in ("diagonal", "kfac", "full"):
            curves = {k: own[f"trace/{structure}-{k}"] for k in KINDS if f"trace/{structure}-{k}" in own}
            for a in curves:
                for b in curves:
                    if a < b:
                        fine, coarse = (c(curves[a]) - c(curves[b]) for c in (lambda x: x.best, _coarse))
                        pairs += 1
                        changed += abs(fine - coarse) > 1
                        largest = max(largest, abs(fine - coarse))
    if not pairs:
        return []
    here = f"{changed} of {pairs} leads between kinds change by more than a point, at most by {largest:.1f}"
    return [("a grid of whole decades makes false wins", "one did", here, "yes" if changed else "no")]


def _coarse(curve: Curve) -> float:
    """The best of every other strength."""
    return max(curve.means[::2])


_SAID = {"trace": "trace-normalised", "none": "as they are"}
_CLAIMS: tuple[Callable[[Found], list[Row]], ...] = (_pairs, _early, _spans, _tenth, _squared, _grids)
