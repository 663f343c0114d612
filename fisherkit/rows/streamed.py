"""Rows that are made anew from the data for every product, because they do not fit in memory.

Two ways for a product JᵀJ u over a batch: rebuild the batch's rows and use them, which takes a backward pass for each
of an example's M vectors; or `rows.matrix_free`, whose cost does not depend on M.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.arithmetic import HALF, all_finite
from fisherkit.rows import matrix_free
from fisherkit.rows.collection import Rows, RowSource
from fisherkit.rows.problem import Problem

FEW_VECTORS = 2
"""Up to this many vectors an example, rebuilding rows costs no more than a forward-mode pass."""


class StreamedRows(RowSource):
    """Rows over the data.

    Args:
        problem: model, data and kind.
        count: R, counted by the builder in a pass over the data.
    """

    def __init__(self, problem: Problem, count: int) -> None:
        super().__init__(problem.plan.space, count)
        self.problem = problem
        # In half precision tangents would have no more digits than the weights; rows are made in float32.
        half = problem.plan.example_parameter.dtype in HALF
        self.matrix_free = problem.vectors_per_example > FEW_VECTORS and not half and self._verified()

    def product(self, u: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        """JᵀJ U in one pass."""
        if not self.matrix_free:
            return self._sum(lambda rows: rows.product(u), "product")
        plan, metrics = self.problem.plan, self.problem.metrics("product")
        parts = (matrix_free.product(plan, self.space, batch, u, metric) for batch, metric in metrics)
        total = functools.reduce(torch.add, parts)
        if not all_finite(total):
            for _ in self.problem.chunks("product"):
                pass  # the rows themselves say which batch and module it is
        return total

    def matmul(self, u: Float[Tensor, "D K"]) -> Float[Tensor, "R K"]:
        """J U in one pass."""
        return torch.cat([chunk.rows.matmul(u) for chunk in self.problem.batches("J u")])

    def rmatmul(self, w: Float[Tensor, "R K"]) -> Float[Tensor, "D K"]:
        """Jᵀ W in one pass."""
        total, start = w.new_zeros(self.space.size, w.shape[1]), 0
        for chunk in self.problem.batches("Jᵀ w"):
            stop = start + chunk.rows.count
            total += chunk.rows.rmatmul(w[start:stop])
            start = stop
        return total

    def gram(self, precise: bool = True) -> Float[Tensor, "R R"]:
        """J Jᵀ by pairs of batches: the rows of each batch are rebuilt once for every batch before it."""
        device = self.problem.plan.example_parameter.device
        result = torch.zeros(self.count, self.count, dtype=torch.float64, device=device)
        start = 0
        for outer in self.problem.batches("Gram"):
            mine, other = slice(start, start + outer.rows.count), 0
            for inner in self.problem.batches("Gram, inner"):
                result[mine, other : other + inner.rows.count] = outer.rows.cross_gram(inner.rows, precise)
                other += inner.rows.count
                if other > start:
                    break
            start = mine.stop
        lower = result.tril()
        return lower + result.tril(-1).mT

    def squared_sum(self) -> Float[Tensor, "D"]:
        """Diag JᵀJ in one pass."""
        return self._sum(lambda rows: rows.squared_sum(), "diagonal")

    def normal_matrix(self) -> Float[Tensor, "D D"]:
        """JᵀJ in one pass."""
        return self._sum(lambda rows: rows.normal_matrix(), "dense")

    def _sum(self, function: Callable[[Rows], Tensor], description: str) -> Tensor:
        return functools.reduce(torch.add, (function(chunk.rows) for chunk in self.problem.chunks(description)))

    def _verified(self) -> bool:
        plan = self.problem.plan
        if "matrix-free" not in plan.tried:
            batch, rows = self.problem.probe_rows()
            plan.tried["matrix-free"] = matrix_free.agrees(plan, self.space, batch, lambda v, u: rows(v).product(u))
        return bool(plan.tried["matrix-free"])
