"""rᵀ(F + λI)⁻¹r' of one layer in a Kronecker product's eigenbasis, where rows are turned instead of solutions.

A factored row is turned by its two factors, which takes far less than turning a solution [outputs, inputs] there and
back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.operators.row_forms import Bases, Part, RowForm, RowSolution, Solved, SolvedForm
from fisherkit.rows.collection import Rows
from fisherkit.rows.factored import FactoredRows
from fisherkit.space import ParameterSpace


class EigenForm(RowForm):
    """(U_G ⊗ U_A) diag(weights) (U_G ⊗ U_A)ᵀ, and ``outside`` (1/λ or 0) on what the bases do not span.

    ``solve`` is the same on columns, for rows that are not factored.
    """

    def __init__(
        self, on_inputs: Float[Tensor, "I1 r"], on_outputs: Float[Tensor, "O s"], weights: Float[Tensor, "s r"],
        outside: float, solve: Callable[[Tensor], Tensor],
    ) -> None:  # fmt: skip
        super().__init__(weights.numel(), 2 * weights.numel())
        self.on_inputs, self.on_outputs, self.outside = on_inputs, on_outputs, outside
        self._weights, self._solve = (weights - outside).flatten(), solve

    @staticmethod
    def worthwhile(probe: Rows, queries: int, others: int) -> bool:
        """Whether turning the others' rows takes fewer multiplications than turning the queries' solutions back."""
        rows = probe.slots[0].rows
        if len(probe.slots) > 1 or not isinstance(rows, FactoredRows):
            return False
        width, outputs = rows.inputs + rows.bias, rows.outputs
        turned = others * rows.positions * (width**2 + outputs**2)
        return turned <= queries * width * outputs * (width + outputs)

    def turned(self, rows: FactoredRows) -> Iterator[FactoredRows]:
        """The rows in the eigenbasis."""
        return rows.rotated(self.on_inputs, self.on_outputs)

    def solve(self, queries: Rows) -> RowSolution:
        """Queries turned, written out and weighed."""
        return _EigenSolution(self, queries)

    def squares(self, rows: FactoredRows) -> Float[Tensor, "R"]:
        """rᵀ(F + λI)⁻¹r of each row."""
        within = torch.cat([part.weighted_squares(self._weights) for part in self.turned(rows)])
        if not self.outside:
            return within
        return within + self.outside * rows.weighted_squares(self._weights.new_ones(rows.size))

    def weighed(self, queries: FactoredRows) -> Float[Tensor, "d Q"]:
        """diag(w) (U_G ⊗ U_A)ᵀ Q, in the eigenbasis."""
        parts = [part.dense() for part in self.turned(queries)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).mul_(self._weights).mT


class TurnedBackForm(SolvedForm):
    """Solutions written out, for the others to meet as they are: queries turned by their factors, and ``back``."""

    def __init__(self, form: EigenForm, back: Callable[[Tensor], Tensor], size: int) -> None:
        super().__init__(form._solve, size)
        self._form, self._back = form, back

    def solve(self, queries: Rows) -> Solved:
        """One solve for all."""
        rows = queries.slots[0].rows
        if len(queries.slots) > 1 or not isinstance(rows, FactoredRows):
            return super().solve(queries)
        columns = self._back(self._form.weighed(rows))
        return Solved(columns.add_(rows.dense().mT, alpha=self._form.outside) if self._form.outside else columns)


class _EigenSolution(RowSolution):
    def __init__(self, form: EigenForm, queries: Rows) -> None:
        rows = queries.slots[0].rows
        self._form, self._queries = form, queries
        self._weighed = form.weighed(rows) if isinstance(rows, FactoredRows) else None

    @cached_property
    def _solved(self) -> Float[Tensor, "D Q"]:
        """For rows that are not factored, if there are such."""
        return self._form._solve(self._queries.dense().mT)

    def parts(self, rows: Rows) -> Iterator[Part]:
        slot, mine, form = rows.slots[0], self._queries.slots[0].rows, self._form
        if self._weighed is None or not isinstance(slot.rows, FactoredRows):
            yield slot.names, slot.rows.matmul(self._solved)
            return
        within = torch.cat([part.matmul(self._weighed) for part in form.turned(slot.rows)])
        if form.outside and isinstance(mine, FactoredRows):
            within += form.outside * slot.rows.gram(mine, precise=False).to(within.dtype)
        yield slot.names, within

    def unit(self, space: ParameterSpace, names: tuple[str, ...]) -> tuple[Float[Tensor, "d Q"], Bases | None]:
        """Turned; only of bases that leave nothing out."""
        if self._weighed is None:
            return self._solved, None
        return self._weighed, (self._form.on_outputs, self._form.on_inputs)
