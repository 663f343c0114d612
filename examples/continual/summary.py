"""What the results say, as numbers: each method's best strength, how wide it is, and how far it moves. Draws nothing.

Every strength is chosen on the test mean, for all methods alike: accuracies at a best strength are a little too good,
all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from examples.continual.cells import REGIMES
from examples.continual.methods import METHODS

POINTS = 3.0
"""Of accuracy; what counts as near the best."""

Place = tuple[str, str]
"""Bench and regime."""


@dataclass(frozen=True)
class Curve:
    """A cell's accuracies over strength.

    Args:
        strengths: in their order; empty for a method without one.
        accuracy: in percent, by strength and then seed.
        cell: everything that was measured.
    """

    strengths: tuple[float, ...]
    accuracy: tuple[tuple[float, ...], ...]
    cell: Mapping[str, Any]

    @property
    def means(self) -> list[float]:
        """Over seeds, by strength."""
        return [fmean(row) for row in self.accuracy]

    @property
    def place(self) -> int:
        """Of the best strength."""
        means = self.means
        return means.index(max(means))

    @property
    def best(self) -> float:
        """Accuracy at the best strength."""
        return max(self.means)

    @property
    def at_best(self) -> tuple[float, ...]:
        """By seed."""
        return self.accuracy[self.place]

    @property
    def deviation(self) -> float:
        """Of the seeds at the best strength."""
        return stdev(self.at_best) if len(self.at_best) > 1 else 0.0

    @property
    def strength(self) -> float:
        """The best one."""
        return self.strengths[self.place]

    @property
    def at_edge(self) -> bool:
        """Whether the best strength ends the sweep, so that a better one may lie outside."""
        return self.place in (0, len(self.strengths) - 1)

    def decades(self, points: float = POINTS) -> float:
        """How wide the stretch around the best strength is that stays within some points of it."""
        near = [mean >= self.best - points for mean in self.means]
        first = last = self.place
        while first > 0 and near[first - 1]:
            first -= 1
        while last + 1 < len(near) and near[last + 1]:
            last += 1
        return math.log10(self.strengths[last] / self.strengths[first])

    def loss_at(self, strength: float) -> float:
        """Points below the best at a strength of the sweep."""
        return self.best - self.means[self.strengths.index(strength)]


def curves(results: Mapping[str, Mapping[str, Any]]) -> dict[Place, dict[str, Curve]]:
    """By bench and regime, and then by normalization and method as ``none/diagonal-ef``, in the methods' order."""
    found: dict[Place, dict[str, Curve]] = {}
    for bench, result in results.items():
        for regime in REGIMES:
            own = {}
            for key in METHODS:
                for normalization in ("trace", "none"):
                    cell = result["cells"].get(f"{regime}/{normalization}/{key}")
                    if cell is not None:
                        accuracy = tuple(map(tuple, cell["accuracy"]))
                        own[f"{normalization}/{key}"] = Curve(tuple(cell["strengths"]), accuracy, cell)
            if own:
                found[bench, regime] = own
    return found


def of_method(found: Mapping[Place, Mapping[str, Curve]], name: str) -> dict[Place, Curve]:
    """A method's curves wherever it was measured."""
    return {place: own[name] for place, own in found.items() if name in own}


def span(own: Mapping[Place, Curve]) -> float:
    """Decades between the least and the greatest best strength."""
    strengths = [curve.strength for curve in own.values()]
    return math.log10(max(strengths) / min(strengths))


def one_for_all(own: Mapping[Place, Curve]) -> tuple[float, float]:
    """The strength whose worst loss over all places is least, and that loss in points."""
    shared = set.intersection(*(set(curve.strengths) for curve in own.values()))
    losses = {strength: max(curve.loss_at(strength) for curve in own.values()) for strength in sorted(shared)}
    best = min(losses, key=losses.__getitem__)
    return best, losses[best]


def verdict(a: Sequence[float], b: Sequence[float]) -> tuple[float, str]:
    """A's lead over b in points, and whether it is one: "yes" or "no" beyond two standard errors, else "level".

    Args:
        a: accuracies by seed.
        b: of the same seeds.
    """
    leads = [x - y for x, y in zip(a, b, strict=True)]
    error = stdev(leads) / len(leads) ** 0.5 if len(leads) > 1 else 0.0
    lead = fmean(leads)
    if abs(lead) <= 2 * error:
        return lead, "level"
    return lead, "yes" if lead > 0 else "no"
