"""Rows that are made anew from the data for every product, because they do not fit in memory.

Two ways for a product JᵀJ u over a batch, chosen by cost: rebuild the batch's rows and use them (M backward passes, M
vectors an example), or push u forward through the model, apply the output metric Σ_m v vᵀ and pull back (one forward-mode
and one reverse pass, whatever M).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.rows.collection import Rows, RowSource
from fisherkit.rows.problem import Problem
from fisherkit.space import ParameterSpace


class StreamedRows(RowSource):
    """Rows over the data.

    Args:
        problem: model, data and kind.
        count: R, counted by the builder in a pass over the data.
        space: the parameters; a part of the problem's for blocks.
    """

    def __init__(self, problem: Problem, count: int, space: ParameterSpace) -> None:
        super().__init__(space, count)
        self.problem = problem

    def _sum(self, function: Callable[[Rows], Tensor], description: str) -> Tensor:
        total: Tensor | None = None
        for chunk in self.problem.chunks(description):
            part = function(chunk.rows.restrict(self.space))
            total = part if total is None else total + part
        assert total is not None  # the loop over the data refuses empty data
        return total

    def product(self, u: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        """JᵀJ U in one pass."""
        return self._sum(lambda rows: rows.product(u), "product")

    def matmul(self, u: Float[Tensor, "D K"]) -> Float[Tensor, "R K"]:
        """J U in one pass."""
        return torch.cat([chunk.rows.restrict(self.space).matmul(u) for chunk in self.problem.batches("J u")])

    def rmatmul(self, w: Float[Tensor, "R K"]) -> Float[Tensor, "D K"]:
        """Jᵀ W in one pass."""
        total, start = w.new_zeros(self.space.size, w.shape[1]), 0
        for chunk in self.problem.batches("Jᵀ w"):
            stop = start + chunk.rows.count
            total += chunk.rows.restrict(self.space).rmatmul(w[start:stop])
            start = stop
        return total

    def gram(self) -> Float[Tensor, "R R"]:
        """J Jᵀ by pairs of batches: the rows of each batch are rebuilt once for every batch before it."""
        result = torch.zeros(self.count, self.count, dtype=torch.float64, device=self._device)
        start = 0
        for outer in self.problem.batches("Gram"):
            left, other = outer.rows.restrict(self.space), 0
            mine = slice(start, start + left.count)
            for inner in self.problem.batches("Gram, inner"):
                right = inner.rows.restrict(self.space)
                result[mine, other : other + right.count] = left.cross_gram(right)
                other += right.count
                if other > start:
                    break
            start += left.count
        lower = result.tril()
        return lower + result.tril(-1).mT

    def squared_sum(self) -> Float[Tensor, "D"]:
        """Diag JᵀJ in one pass."""
        return self._sum(lambda rows: rows.squared_sum(), "diagonal")

    def normal_matrix(self) -> Float[Tensor, "D D"]:
        """JᵀJ in one pass."""
        return self._sum(lambda rows: rows.normal_matrix(), "dense")

    @property
    def _device(self) -> torch.device:
        return next(iter(self.problem.plan.parameters.values())).device
