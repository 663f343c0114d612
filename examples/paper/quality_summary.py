"""What the results of `examples.paper.quality` are on average. Owns the figures that its report is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.paper.quality_results import Results

Array = NDArray[np.float64]
DIGITS = 4
"""Significant digits that are written."""


@dataclass(frozen=True)
class Curve:
    """γ/γ_SGD of one kind in one structure; arrays are ``[checkpoint, damping]``.

    Args:
        mean: over batches.
        std: their standard deviation.
        over_exact: mean of the ratio to the exact kind's γ on the same batch at the same damping, full structure.
        worst: the largest such ratio.
    """

    mean: Array
    std: Array
    over_exact: Array
    worst: Array


@dataclass(frozen=True)
class Summary:
    """A task's results on average.

    Args:
        settings: of its results.
        environment: of its results.
        checkpoints: those with a cell; epoch, loss, accuracy, batches.
        cost: seconds by kind.
        seconds: of an average cell.
        curves: by structure and kind.
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    checkpoints: list[dict[str, Any]]
    cost: dict[str, float]
    seconds: float
    curves: dict[str, dict[str, Curve]]

    @property
    def dampings(self) -> list[float]:
        """Every λ, ascending."""
        return list(self.settings["dampings"])

    @property
    def epochs(self) -> list[int]:
        """Of the checkpoints."""
        return [c["epoch"] for c in self.checkpoints]

    @property
    def trained(self) -> list[int]:
        """Places of the checkpoints after the initialization."""
        return [i for i, epoch in enumerate(self.epochs) if epoch >= 1]

    def mean(self, kind: str, structure: str = "full") -> Array:
        """γ/γ_SGD of one kind, ``[checkpoint, damping]``."""
        return self.curves[structure][kind].mean

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        curves = {
            structure: {
                kind: {name: _rounded(array) for name, array in vars(curve).items()} for kind, curve in kinds.items()
            }
            for structure, kinds in self.curves.items()
        }
        return {**vars(self), "curves": curves}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Summary:
        """The inverse of `to_dict`, to `DIGITS`."""
        curves = {
            structure: {
                kind: Curve(**{name: np.array(values) for name, values in curve.items()})
                for kind, curve in kinds.items()
            }
            for structure, kinds in found["curves"].items()
        }
        return cls(**{**found, "curves": curves})


def summarize(results: Results) -> Summary:
    """Means and standard deviations over batches."""
    cells = {c["epoch"]: list(results.cells.get(str(c["epoch"]), {}).values()) for c in results.checkpoints}
    checkpoints = [{**c, "batches": len(cells[c["epoch"]])} for c in results.checkpoints if cells[c["epoch"]]]
    groups = [cells[c["epoch"]] for c in checkpoints]
    curves = {
        structure: {kind: _curve(groups, structure, kind) for kind in kinds if kind != "sgd"}
        for structure, kinds in results.settings["kinds"].items()
    }
    seconds = round(float(np.mean([cell["seconds"] for group in groups for cell in group])), 2)
    return Summary(results.settings, results.environment, checkpoints, results.cost or {}, seconds, curves)


def _curve(groups: list[list[dict[str, Any]]], structure: str, kind: str) -> Curve:
    mean, std, over_exact, worst = [], [], [], []
    for group in groups:
        values = np.array([cell[structure][kind] for cell in group])
        ratio = values / np.array([cell["full"]["exact"] for cell in group])
        mean.append(values.mean(0))
        std.append(values.std(0, ddof=1) if len(group) > 1 else np.zeros(values.shape[1]))
        over_exact.append(ratio.mean(0))
        worst.append(ratio.max(0))
    return Curve(np.array(mean), np.array(std), np.array(over_exact), np.array(worst))


def _rounded(array: Array) -> list[list[float]]:
    return [[float(f"{value:.{DIGITS}g}") for value in row] for row in array.tolist()]
