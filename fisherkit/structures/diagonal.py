"""The exact diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from jaxtyping import Float
from torch import Tensor

from fisherkit.operators import DiagonalOperator, FisherOperator
from fisherkit.rows.base import UnitRows
from fisherkit.space import ParameterSpace
from fisherkit.structures.base import LayerStructure, LayerSums, Names, Part, Parts, UnitSums


@dataclass(frozen=True)
class Squares(UnitSums):
    """Σ_r row_r², the diagonal."""

    label = "diagonal"

    diagonal: Float[Tensor, "d"]

    def operator(self, space: ParameterSpace, scale: float) -> FisherOperator:
        return DiagonalOperator(space, scale * self.diagonal)


class Diagonal(LayerStructure):
    """diag F."""

    name = "diagonal"
    meaning = "the exact diagonal alone"
    needs_rows = False
    packs = True

    def record(self, rows: UnitRows) -> Squares:
        return Squares(rows.squared_sum())

    def operator(self, sums: LayerSums, scale: float) -> FisherOperator:
        """One diagonal for all; of numbers that are kept in another dtype one a unit."""
        if self.kept_dtype is not None:
            return super().operator(sums, scale)
        whole = self.space.join([(names, unit.tensors()["diagonal"]) for names, unit in sums.whole.items()])
        return DiagonalOperator(self.space, whole if scale == 1 else whole.mul_(scale))

    def parts(self, sums: LayerSums, operator: FisherOperator) -> Parts:
        if self.kept_dtype is not None:
            return super().parts(sums, operator)

        def part(names: Names) -> FisherOperator:
            own = self.space.restrict(names)
            return DiagonalOperator(own, self.space.take(operator.diagonal(), own.names))

        sizes = dict(zip(self.space.names, self.space.sizes, strict=True))
        return {
            names: Part(partial(part, names), self.item * sum(sizes[name] for name in names), Squares.label, "")
            for names in sums.whole
        }
