"""Rows of which each process has its own: all of them are the rows of one Fisher, in the order of the ranks.

Rows stay where they are; only results travel. Every process of the group must ask the same questions in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.processes import Processes
from fisherkit.rows.collection import Rows, RowSource, UnitSlot


class SharedRows(RowSource):
    """The rows of all processes.

    Args:
        own: this process's.
        processes: the group.
        sizes: how many each rank has; None to ask them.
    """

    def __init__(self, own: RowSource, processes: Processes, sizes: Sequence[int] | None = None) -> None:
        sizes = processes.gathered(own.count) if sizes is None else sizes
        super().__init__(own.space, sum(sizes))
        self.own, self.processes, self.sizes = own, processes, list(sizes)
        start = sum(self.sizes[: processes.rank])
        self._place = slice(start, start + own.count)

    @property
    def in_memory(self) -> bool:
        """As of this process's own."""
        return self.own.in_memory

    @property
    def slots(self) -> tuple[UnitSlot, ...]:
        """This process's rows of each unit."""
        return self._stored.slots

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows."""
        return self._stored.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of this process's own."""
        return self._stored.nbytes

    def product(self, u: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        """JᵀJ U: one exchange of D · K numbers."""
        return self._total(self.own.product(u) if self.in_memory else self._each("product", u))

    def matmul(self, u: Float[Tensor, "D K"]) -> Float[Tensor, "R K"]:
        """J U: one exchange of R · K numbers."""
        own = self.own.matmul(u) if self.in_memory else self._each("matmul", u)
        return self.processes.stacked(own, self.sizes)

    def rmatmul(self, w: Float[Tensor, "R K"]) -> Float[Tensor, "D K"]:
        """Jᵀ W: one exchange of D · K numbers."""
        own = w[self._place]
        return self._total(self.own.rmatmul(own) if self.in_memory else self._each("rmatmul", own))

    def gram(self, precise: bool = True) -> Float[Tensor, "R R"]:
        """J Jᵀ, a block for each pair of processes, which one of the two makes.

        Cost: every process's rows go to all others once, and then R² numbers.
        """
        rows, size = self._stored, self.processes.size
        whole = torch.zeros(self.count, self.count, dtype=torch.float64, device=self.processes.device)
        start = 0
        for rank, count in enumerate(self.sizes):
            others = slice(start, start + count)
            theirs = self.processes.sent_by(rank, rows)
            behind = (rank - self.processes.rank) % size
            # Of a pair at equal distances, the lower rank makes the block.
            mine = 2 * behind < size or (2 * behind == size and self.processes.rank < rank)
            if behind == 0:
                whole[self._place, others] = rows.gram(precise)
            elif mine and rows.count and count:
                block = rows.cross_gram(theirs, precise)
                whole[self._place, others], whole[others, self._place] = block, block.mT
            start += count
        return self.processes.total(whole)

    def squared_sum(self) -> Float[Tensor, "D"]:
        """Diag JᵀJ: one exchange of D numbers."""
        return self._total(self.own.squared_sum() if self.in_memory else self._each("squared_sum"))

    def normal_matrix(self) -> Float[Tensor, "D D"]:
        """JᵀJ: one exchange of D² numbers."""
        return self._total(self.own.normal_matrix() if self.in_memory else self._each("normal_matrix"))

    def part(self, names: Sequence[str]) -> SharedRows:
        """The rows over some whole units."""
        return SharedRows(self._stored.part(names), self.processes, self.sizes)

    def scaled(self, scale: float) -> SharedRows:
        """Every row times a number."""
        return SharedRows(self._stored.scaled(scale), self.processes, self.sizes)

    def double(self) -> SharedRows:
        """The rows in float64."""
        return SharedRows(self._stored.double(), self.processes, self.sizes)

    def same_units(self, other: Rows) -> bool:
        """No: rows of this process alone are not to be met with all of them."""
        return False

    @property
    def _stored(self) -> Rows:
        if not isinstance(self.own, Rows):
            raise LookupError("streamed rows lie nowhere")
        return self.own

    def _total(self, own: Tensor) -> Tensor:
        return self.processes.total(own)

    def _each(self, operation: str, *args: Tensor) -> Tensor:
        """A pass over this process's data, which may fail in one alone."""
        found: Tensor = self.processes.each(f"{operation} of streamed rows", lambda: getattr(self.own, operation)(*args))
        return found


def shared(rows: Rows | None, processes: Processes) -> SharedRows | None:
    """The rows of all processes, of which some may have none; None if no process has any."""
    counts = processes.gathered(None if rows is None else rows.count)
    first = next((rank for rank, count in enumerate(counts) if count is not None), None)
    if first is None:
        return None
    if None in counts:
        like = processes.sent_by(first, None if rows is None else rows.some(slice(0, 1)))
        rows = like.some(slice(0, 0)) if rows is None else rows
    return SharedRows(rows, processes, [count or 0 for count in counts])
