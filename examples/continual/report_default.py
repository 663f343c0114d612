"""What a user can leave alone: one strength for all benches and regimes, and what it costs. Reads curves alone."""

from __future__ import annotations

from collections.abc import Mapping

from examples.benchmarks.report import markdown
from examples.continual.methods import METHODS
from examples.continual.summary import Curve, Place, of_method, one_for_all

NORMALIZED = {"trace": "trace", "none": "as it is"}


def default(found: Mapping[Place, Mapping[str, Curve]]) -> str:
    """For every method: the strength whose worst loss is least, that loss, and the distance to the best of all."""
    places = list(found)
    tops = {
        place: max(curve.best for name, curve in own.items() if name != "trace/joint") for place, own in found.items()
    }
    rows = []
    for normalization, label in NORMALIZED.items():
        for method in METHODS.values():
            own = of_method(found, f"{normalization}/{method.key}")
            if not method.swept or len(own) < 2:
                continue
            strength, loss = one_for_all(own)
            at = {place: curve.means[curve.strengths.index(strength)] for place, curve in own.items()}
            behind = max(tops[place] - accuracy for place, accuracy in at.items())
            name = f"{method.structure}, {method.title}" if method.structure else method.title
            cells = [f"{at[place]:.1f}" if place in at else "" for place in places]
            rows.append((behind, (f"{name} ({label})", f"{strength:.2g}", f"{loss:.1f}", f"{behind:.1f}", *cells)))
    rows.sort(key=lambda row: (row[1].count(""), row[0]))
    header = (
        "", "strength for all", "worst loss", "worst distance to the best", *(f"{b}, {r}" for b, r in places),
    )  # fmt: skip
    text = (
        "One strength a method for all benches and regimes: the one whose worst loss against the method's own best "
        "strength is least. Beside it the worst distance to the best of all methods at their best strengths, and the "
        "accuracies at that strength. Methods measured everywhere come first.\n\n"
    )
    return text + markdown((header, [row for _, row in rows]))
