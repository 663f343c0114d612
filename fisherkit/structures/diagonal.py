"""The exact diagonal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.operators import DiagonalOperator, FisherOperator
from fisherkit.rows.base import UnitRows
from fisherkit.space import ParameterSpace
from fisherkit.structures.base import LayerStructure, LayerSums, Part, Parts, UnitSums


@dataclass(frozen=True)
class Squares(UnitSums):
    """Σ_r row_r², the diagonal."""

    label = "diagonal"

    diagonal: Float[Tensor, "d"]

    def operator(self, space: ParameterSpace, scale: float) -> FisherOperator:
        """A diagonal."""
        return DiagonalOperator(space, scale * self.diagonal)


class Diagonal(LayerStructure):
    """diag F."""

    name = "diagonal"
    meaning = "the exact diagonal alone"
    needs_rows = False

    def record(self, rows: UnitRows) -> Squares:
        """Of some rows of a unit."""
        return Squares(rows.squared_sum())

    def operator(self, sums: LayerSums, scale: float) -> FisherOperator:
        """One diagonal for all; of numbers that are kept in another dtype one a unit."""
        if self.kept is not None:
            return super().operator(sums, scale)
        units = sums.whole
        whole = torch.empty(self.space.size, dtype=self.dtype, device=self.device)
        for names, unit in units.items():
            self.space.put(whole, names, unit.tensors()["diagonal"])
        return DiagonalOperator(self.space, whole if scale == 1 else whole.mul_(scale))

    def parts(self, sums: LayerSums, operator: FisherOperator) -> Parts:
        """Each unit's entries."""
        if self.kept is not None:
            return super().parts(sums, operator)
        whole, parts = operator.diagonal(), {}
        for names in sums.whole:
            own = self.space.restrict(names)
            parts[names] = Part(DiagonalOperator(own, self.space.take(whole, own.names)), Squares.label, "")
        return parts
