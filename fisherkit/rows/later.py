"""Rows that are made when they pay: products are made without them until then, everything else begins with them.

A choice between renting and buying: each product without rows costs a pass over the data, rows cost several passes once
and make products cheap. They are made as soon as what products without them have cost more is what making them costs,
which is never more than twice the cheaper of the two. All costs are counted, in multiplications, and none is measured,
so that the same calls always do the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NoReturn

from jaxtyping import Float
from torch import Tensor

from fisherkit.rows.collection import RowSource
from fisherkit.rows.plan import Plan
from fisherkit.rows.streamed import StreamedRows
from fisherkit.rows.units import RuledUnit

FEWEST = 3
"""Products from which on it is worth beginning without rows."""

MOVED = 20
"""Multiplications in the time that it takes to write or read a number of rows, about."""

PASS = 50_000_000
"""Multiplications in the time that a pass over the data takes beside its arithmetic, about."""


def products_before_rows(plan: Plan, vectors: int, examples: int) -> float:
    """After how many products rows of so many vectors an example, kept as chosen, have paid; infinite if never.

    For one example, with F the multiplications of a forward pass: a product without rows takes 5F (forward with a
    tangent, and back to weights), rows take F, and F for each vector, which is only led back to layers' outputs, and
    another F for each that is written out. A product with them takes 2F of factors, or 2 of each number written out,
    and reads all numbers twice.
    """
    making, saved = 0, 0
    for unit in plan.units:
        shape = unit.shape if isinstance(unit, RuledUnit) else None
        factored = isinstance(unit, RuledUnit) and shape is not None and not unit.stored
        forward, numbers = math.prod(shape or [unit.numbers]), unit.numbers_per_example(vectors)
        making += (1 + (1 if factored else 2) * vectors // unit.fold) * forward + MOVED * numbers
        saved += 5 * forward - 2 * (forward if factored else numbers) - 2 * MOVED * numbers
    making, saved = examples * making + PASS, examples * saved + PASS
    return float(math.ceil(making / saved)) if saved > 0 else math.inf


class LaterRows(RowSource):
    """Rows that do not exist yet.

    Args:
        streamed: products without them, and how many there are.
        make: makes them.
        products: how many columns may be multiplied without them.
    """

    def __init__(self, streamed: StreamedRows, make: Callable[[], RowSource], products: float) -> None:
        super().__init__(streamed.space)
        self.streamed, self.make, self.left = streamed, make, products

    @property
    def count(self) -> int:
        """R, for which a forward pass over the data is made if there was no product."""
        return self.streamed.count

    def settled(self, columns: int | None = None) -> RowSource:
        """Itself as long as products are fewer than pay, else the rows."""
        if columns is None or columns > self.left:
            return self.make()
        return self

    def product(self, u: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        """JᵀJ U in one pass."""
        found = self.streamed.product(u)
        self.left -= u.shape[1]
        return found

    def _needs_rows(self, *_: object, **__: object) -> NoReturn:
        raise LookupError("asked before `settled` has made the rows")

    matmul = rmatmul = gram = squared_sum = normal_matrix = _needs_rows
