"""The rows of largest norm of a stream of rows, with few more than these in memory.

Owns which rows are kept, and what of the trace goes with the others. Knows neither kinds nor the data's loop.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.rows.collection import Rows


class LargestRows:
    """The ``most`` rows of largest norm among all that were added, in the order in which they came.

    Of rows of equal norm the earlier one is kept, so that it does not matter in which pieces rows come. At most
    ``2 * most`` rows are held, and those of one piece.

    Args:
        most: how many to keep.

    Attributes:
        seen: how many rows were added.
    """

    def __init__(self, most: int) -> None:
        self.most, self.seen = most, 0
        self._held: list[Rows] = []
        self._squares: list[Float[Tensor, "R"]] = []
        self._dropped: list[Float[Tensor, ""]] = []

    def add(self, rows: Rows) -> None:
        """More rows, behind those that came before."""
        self.seen += rows.count
        self._held.append(rows)
        self._squares.append(squared_norms(rows))
        if sum(held.count for held in self._held) > 2 * self.most:
            self._trim()

    def result(self) -> tuple[Rows, float]:
        """The rows, and the share of Σ_r ‖row_r‖² (the trace) that the others had; nothing is left to go on from."""
        if sum(held.count for held in self._held) > self.most:
            self._trim()
        kept = torch.cat(self._squares).sum()
        dropped = torch.stack(self._dropped).sum() if self._dropped else torch.zeros_like(kept)
        return Rows.taken_from(self._held), float(dropped / (kept + dropped)) if float(dropped) > 0 else 0.0

    def _trim(self) -> None:
        squares, rows = torch.cat(self._squares), Rows.taken_from(self._held)
        ranked = squares.argsort(descending=True, stable=True)
        places = ranked[: self.most].sort().values
        self._held, self._squares = [rows.reordered(places).compact()], [squares[places]]
        self._dropped.append(squares[ranked[self.most :]].sum())


def squared_norms(rows: Rows) -> Float[Tensor, "R"]:
    """In float64 of rows in their own dtype, or of float64 ones where that is a half."""
    wide = rows if rows.dtype in (torch.float32, torch.float64) else rows.double()
    return wide.weighted_squares(torch.ones(rows.space.size, dtype=wide.dtype, device=rows.device)).double()
