"""rᵀ(F + λI)⁻¹r' for F = scale · JᵀJ without a vector over the parameters: Gram matrices of rows alone.

By Woodbury's identity rᵀ(F + λI)⁻¹q = (k_rq − scale · k_rJ (scale · JJᵀ + λI)⁻¹ k_Jq) / λ, with k the inner products of
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.operators.row_forms import Part, RowForm, RowSolution
from fisherkit.rows.base import UnitRows, spans
from fisherkit.rows.collection import Rows
from fisherkit.rows.factored import FactoredRows


class GramForm(RowForm):
    """The form in sample space; ``solve`` is (scale · JJᵀ + λI)⁻¹ on ``[R, K]``, in float64.

    ``precise`` asks for inner products in float64; else they are as in `fisherkit.rows.base.inner_products`.
    """

    def __init__(
        self, rows: Rows, scale: float, damping: float, solve: Callable[[Tensor], Tensor], *, precise: bool
    ) -> None:
        # Columns of the solution and of the Gram are float64.
        super().__init__(2 * rows.count + sum(_written_out(slot.rows) for slot in rows.slots), 2 * rows.count)
        self.rows, self.scale, self.damping, self.precise = rows, scale, damping, precise
        self._solve = solve

    def solve(self, queries: Rows) -> RowSolution:
        """(scale · JJᵀ + λI)⁻¹ JQ."""
        return _GramSolution(self, self._alike(queries))

    def squares(self, rows: Rows) -> Float[Tensor, "R"]:
        """rᵀ(F + λI)⁻¹r of each row, float64."""
        rows = self._alike(rows)
        norms = rows.weighted_squares(self._ones(rows)).double()
        parts = []
        for span in spans(rows.count, 4 * self.rows.count):
            k = self.rows.cross_gram(rows.some(span), self.precise)
            parts.append((k * self._solve(k)).sum(0))
        return (norms - self.scale * torch.cat(parts)) / self.damping

    def operations(self, queries: int, others: int) -> float:
        """Multiplications of this form for so many queries and other rows; J's own Gram is there already."""
        r = self.rows.count
        entry = sum(_entry_cost(slot.rows) for slot in self.rows.slots)
        return (queries * others + r * (queries + others)) * entry + queries * r * (others + r)

    def solved_operations(self, queries: int, others: int) -> float:
        """Those of solving for the queries as columns and meeting the others with them."""
        product = sum(_product_cost(slot.rows, queries) for slot in self.rows.slots)
        return product * (2 * self.rows.count + others) + queries * self.rows.count**2

    def _alike(self, rows: Rows) -> Rows:
        """In J's dtype, which is a wider one than the model's for half precision."""
        return rows.double() if self.rows.dtype == torch.float64 and rows.dtype != torch.float64 else rows

    def _ones(self, rows: Rows) -> Tensor:
        return torch.ones(rows.space.size, dtype=rows.dtype, device=rows.device)


class _GramSolution(RowSolution):
    def __init__(self, form: GramForm, queries: Rows) -> None:
        # They meet every block of the others.
        self._form, self._queries = form, queries.written_out()
        self._w = form.scale * form._solve(form.rows.cross_gram(queries, form.precise))

    def parts(self, rows: Rows) -> Iterator[Part]:
        form, rows = self._form, self._form._alike(rows).written_out()
        with_queries = rows.cross_gram_by_unit(self._queries, form.precise)
        with_rows = rows.cross_gram_by_unit(form.rows, form.precise)
        for (names, direct), (_, through) in zip(with_queries, with_rows, strict=True):
            yield names, direct.sub_(through @ self._w).div_(form.damping)

    def products(self, rows: Rows) -> Float[Tensor, "R Q"]:
        form, rows = self._form, self._form._alike(rows).written_out()
        through = rows.cross_gram(form.rows, form.precise) @ self._w
        return rows.cross_gram(self._queries, form.precise).sub_(through).div_(form.damping)


def _numbers(rows: UnitRows) -> int:
    """What one row takes."""
    return sum(tensor.numel() for tensor in rows.tensors().values()) // max(1, rows.count)


def _written_out(rows: UnitRows) -> int:
    """The same where rows that share positions are written out."""
    return rows.size if isinstance(rows, FactoredRows) and rows.positions > 1 else _numbers(rows)


def _entry_cost(rows: UnitRows) -> int:
    """Multiplications of one inner product of two rows."""
    if isinstance(rows, FactoredRows):
        return rows.inputs + rows.outputs if rows.positions == 1 else rows.size
    return min(rows.size, _numbers(rows))


def _product_cost(rows: UnitRows, columns: int) -> int:
    """Multiplications of one row with so many columns."""
    if not isinstance(rows, FactoredRows):
        return columns * min(rows.size, _numbers(rows))
    return rows.size * (rows.positions + columns if rows.writes_out(columns) else rows.positions * columns)
