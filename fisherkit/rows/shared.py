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
    """The rows of all processes, of which this one has its ``own``; ``sizes`` says how many each has."""

    def __init__(self, own: RowSource, processes: Processes, sizes: Sequence[int] | None = None) -> None:
        sizes = processes.gathered(own.count) if sizes is None else sizes
        super().__init__(own.space)
        self.own, self.processes, self.sizes = own, processes, list(sizes)
        self.in_memory = own.in_memory
        start = sum(self.sizes[: processes.rank])
        self._place = slice(start, start + own.count)

    @property
    def count(self) -> int:
        """R, of all processes."""
        return sum(self.sizes)

    @property
    def slots(self) -> tuple[UnitSlot, ...]:
        """This process's rows of each unit."""
        return self._stored.slots

    @property
    def dtype(self) -> torch.dtype:
        """The rows' dtype."""
        return self._stored.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of this process's own."""
        return self._stored.nbytes

    def product(self, u: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        """JᵀJ U: one exchange of D · K numbers."""
        return self.processes.total(self._own("product", u, u))

    def matmul(self, u: Float[Tensor, "D K"]) -> Float[Tensor, "R K"]:
        """J U: one exchange of R · K numbers."""
        return self.processes.stacked(self._own("matmul", u, u), self.sizes)

    def rmatmul(self, w: Float[Tensor, "R K"]) -> Float[Tensor, "D K"]:
        """Jᵀ W: one exchange of D · K numbers."""
        return self.processes.total(self._own("rmatmul", w, w[self._place]))

    def gram(self, precise: bool = True) -> Float[Tensor, "R R"]:
        """J Jᵀ, a block for each pair of processes, which one of the two makes.

        Cost: every process's rows go to all others once, and then R² numbers.
        """
        rows, size = self._stored, self.processes.size
        self.processes.require_alike("gram", torch.zeros(0, device=self.processes.device))
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
        return self.processes.total(self._own("squared_sum"))

    def normal_matrix(self) -> Float[Tensor, "D D"]:
        """JᵀJ: one exchange of D² numbers."""
        return self.processes.total(self._own("normal_matrix"))

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

    def _own(self, operation: str, operand: Tensor | None = None, own: Tensor | None = None) -> Tensor:
        """This process's part of an answer, of an operand that all must have alike.

        ``own`` is what of it is asked of this process's rows.
        """
        device = self.processes.device
        self.processes.require_alike(operation, torch.zeros(0, device=device) if operand is None else operand)

        def answer() -> Tensor:
            found: Tensor = getattr(self.own, operation)(*([] if own is None else [own]))
            return found

        # A pass over data may fail in one process alone.
        return answer() if self.in_memory else self.processes.each(f"{operation} of streamed rows", answer)


def shared(rows: Rows | None, processes: Processes) -> SharedRows | None:
    """The rows of all processes, of which some may have none; None if no process has any."""
    counts = processes.gathered(None if rows is None else rows.count)
    first = next((rank for rank, count in enumerate(counts) if count is not None), None)
    if first is None:
        return None
    like = processes.sent_by(first, None if rows is None else rows.some(slice(0, 1))) if None in counts else rows
    if rows is None and like is not None:
        rows = like.some(slice(0, 0))
    return None if rows is None else SharedRows(rows, processes, [count or 0 for count in counts])
