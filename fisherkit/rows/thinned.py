"""Rows of every k-th example: few enough for memory, spread over the data so that its order does not matter.

Owns the choice of examples; what the rows are good for is the caller's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from fisherkit.data import Batch, Source
from fisherkit.rows.collection import Rows
from fisherkit.rows.streamed import StreamedRows


class ThinnedSource(Source):
    """Every k-th example of the data.

    Args:
        source: all of it.
        stride: k.
    """

    def __init__(self, source: Source, stride: int) -> None:
        super().__init__(source.batches, source.model)
        self.source, self.stride = source, stride

    def __iter__(self) -> Iterator[Batch]:
        """One pass over all batches."""
        return (batch for _, batch in self.numbered())

    def numbered(self) -> Iterator[tuple[int, Batch]]:
        """The same with the numbers that all of the data give them."""
        seen = 0
        for number, batch in self.source.numbered():
            first = -seen % self.stride
            if first < batch.size:
                yield number, batch.take(slice(first, None, self.stride))
            seen += batch.size


def thinned(rows: Rows | StreamedRows, stride: int, first: int = 0) -> Rows:
    """Rows of every k-th example; for stored ones every k-th row.

    Args:
        rows: all of them.
        stride: k.
        first: of stored rows, the one to begin with.

    Cost: streamed, reading the data once, and the rows of the examples that are taken.
    """
    if isinstance(rows, StreamedRows):
        problem = replace(rows.problem, source=ThinnedSource(rows.problem.source, stride), progress=False)
        return Rows.cat([chunk.rows for chunk in problem.batches("sample")])
    return rows.reordered(torch.arange(first, rows.count, stride, device=rows.device)).compact()
