"""What the figures of a setting say of each method: its value at λ = 1, its curve over dampings, its time.

Reads results alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RANGE = (1e-6, 10.0)
"""Dampings, in multiples of the mean eigenvalue, over which a method should be robust."""
WITHIN, TIMES, ROBUST = 0.01, 2.0, 0.7
"""The aim: so close to the exact Fisher, in so many times the empirical one's time, with such a min/max over RANGE."""


@dataclass(frozen=True)
class Curve:
    """A method in a setting.

    Args:
        method: its name.
        row: its figures at λ = 1 × the mean eigenvalue, or its only ones.
        means: scores by damping, in ascending order.
    """

    method: str
    row: Mapping[str, Any]
    means: Mapping[float, float]

    @property
    def value(self) -> float:
        """At λ = 1 × the mean eigenvalue."""
        return float(self.row["mean"])

    @property
    def seconds(self) -> float:
        """Fit and scores of a model at that damping."""
        return float(self.row["fit_seconds"] + self.row["seconds"])

    @property
    def best(self) -> float | None:
        """The damping with the highest score."""
        return max(self.means, key=self.means.__getitem__) if len(self.means) > 1 else None

    @property
    def swept(self) -> bool:
        """Whether both ends of RANGE were measured."""
        return bool(self.means) and min(self.means) <= RANGE[0] and max(self.means) >= RANGE[1]

    @property
    def robustness(self) -> float | None:
        """Least over greatest score in RANGE; None if that was not measured."""
        inside = [mean for damping, mean in self.means.items() if RANGE[0] <= damping <= RANGE[1]]
        return min(inside) / max(inside) if self.swept else None

    def minus(self, other: str) -> tuple[float, tuple[float, float]] | None:
        """Difference to a reference at λ = 1 × its mean eigenvalue, with its interval."""
        found = self.row.get("minus", {}).get(other)
        return None if found is None else (found[0], (found[1][0], found[1][1]))


def curves(result: Mapping[str, Any]) -> dict[str, Curve]:
    """By method, those that were measured at λ = 1 or have no damping."""
    found: dict[str, Curve] = {}
    for method in dict.fromkeys(row["method"] for row in result["rows"]):
        own = [row for row in result["rows"] if row["method"] == method]
        main = [row for row in own if row["damping"] in (None, 1.0)]
        if main:
            means = {row["damping"]: row["mean"] for row in own if row["damping"] is not None}
            found[method] = Curve(method, main[0], dict(sorted(means.items())))
    return found


@dataclass(frozen=True)
class Aim:
    """How far a method got in a setting.

    Args:
        behind: the exact Fisher's score less the method's.
        times: its time over the empirical Fisher's.
        robustness: min/max over RANGE; None if not measured.
    """

    behind: float
    times: float
    robustness: float | None

    @property
    def reached(self) -> bool:
        """All three."""
        robust = self.robustness is not None and self.robustness >= ROBUST
        return self.behind <= WITHIN and self.times < TIMES and robust


def aims(found: Mapping[str, Curve]) -> dict[str, Aim]:
    """By method; empty without the exact and the empirical Fisher."""
    exact, empirical = found.get("full, exact"), found.get("full, EF")
    if exact is None or empirical is None:
        return {}
    return {
        name: Aim(exact.value - c.value, c.seconds / max(empirical.seconds, 1e-9), c.robustness)
        for name, c in found.items()
    }
