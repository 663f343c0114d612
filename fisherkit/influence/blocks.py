"""Rows of examples in blocks: made from the data in every pass, or made once and kept.

A block has the rows of neighbouring examples and says which example each belongs to. Owns the cutting of the data by
memory. Knows no Fisher matrix and no score.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from fisherkit.data import Batch, Source
from fisherkit.rows.collection import Rows
from fisherkit.rows.problem import Problem

MOST = 2048
"""Examples in a block: from here on products are as fast as they get."""


@dataclass(frozen=True)
class RowBlock:
    """Rows of some neighbouring examples.

    Args:
        rows: the rows.
        owner: which of the block's examples each row belongs to, in ascending order.
        mask: which positions ``[B, P]`` of each example count.
    """

    rows: Rows
    owner: Int[Tensor, "R"]
    mask: Bool[Tensor, "B P"]

    @property
    def size(self) -> int:
        """B, its examples, those without a row included."""
        return self.mask.shape[0]

    def by_example(self, values: Shaped[Tensor, "R ..."]) -> Shaped[Tensor, "B ..."]:
        """Sum what there is for each row over an example's rows; 0 where there is none."""
        total = values.new_zeros(self.size, *values.shape[1:])
        return total.index_add_(0, self.owner, values)

    def by_position(self, values: Shaped[Tensor, "R ..."]) -> Shaped[Tensor, "B P ..."]:
        """What there is for each position's one row; 0 at positions that do not count."""
        total = values.new_zeros(*self.mask.shape, *values.shape[1:])
        total[self.mask] = values
        return total


class RowBlocks(ABC):
    """Blocks in the order of the data, as often as they are asked for.

    Args:
        settings: what the rows depend on beside the data, as JSON has it (`ModelRows.settings`).
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    @abstractmethod
    def __iter__(self) -> Iterator[RowBlock]:
        """One pass."""

    @abstractmethod
    def count(self) -> int:
        """How many examples there are, as far as the data tell without a pass."""

    def counted(self) -> int:
        """How many there are for sure, at the price of a pass over the data."""
        return self.count()


class LiveBlocks(RowBlocks):
    """Blocks of at most so many examples, made from the data in every pass."""

    def __init__(self, problem: Problem, limit: int, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.problem, self.limit = problem, limit

    def __iter__(self) -> Iterator[RowBlock]:
        problem = replace(self.problem, source=LimitedSource(self.problem.source, self.limit))
        for chunk in problem.batches("rows"):
            yield RowBlock(chunk.rows, chunk.owner, chunk.counted_positions[0])

    def count(self) -> int:
        """What the data say."""
        return self.problem.source.count()

    def counted(self) -> int:
        """Without the model; a loader may drop or merge examples of its data set."""
        return sum(batch.size for batch in self.problem.source)

    def row_bytes(self) -> int:
        """What one example's rows take."""
        return self.problem.row_bytes(self.problem.plan.space.names)


class KeptBlocks(RowBlocks):
    """All blocks, in memory."""

    def __init__(self, blocks: Sequence[RowBlock], settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.blocks = blocks

    def __iter__(self) -> Iterator[RowBlock]:
        return iter(self.blocks)

    def count(self) -> int:
        """All examples of all blocks."""
        return sum(block.size for block in self.blocks)


class OncePerExample:
    """A number for each example: made block by block in the first pass over the data, known in every later one."""

    def __init__(self, function: Callable[[RowBlock], Float[Tensor, "B"]]) -> None:
        self._function = function
        self._known: Tensor | None = None

    def of(self, block: RowBlock, start: int) -> Float[Tensor, "B"]:
        """Of a block whose first example is at this place; later passes may cut the data otherwise."""
        known = 0 if self._known is None else len(self._known)
        if self._known is None or start >= known:
            made = self._function(block)
            self._known = made if self._known is None else torch.cat([self._known, made])
        return self._known[start : start + block.size]


class LimitedSource(Source):
    """The same data in batches of at most so many examples."""

    def __init__(self, source: Source, limit: int) -> None:
        super().__init__(source.batches, source.model)
        self.source, self.limit = source, limit

    def __iter__(self) -> Iterator[Batch]:
        return (batch for _, batch in self.numbered())

    def numbered(self) -> Iterator[tuple[int, Batch]]:
        """The same with the number of the batch that each is cut from."""
        for number, batch in self.source.numbered():
            for start in range(0, batch.size, self.limit):
                yield number, batch.take(slice(start, min(start + self.limit, batch.size)))

    def steps(self) -> None:
        """Not known."""


def joined(blocks: Sequence[RowBlock]) -> RowBlock:
    """One block of several."""
    if len(blocks) == 1:
        return blocks[0]
    starts = torch.tensor([0] + [block.size for block in blocks]).cumsum(0).tolist()
    positions = max(block.mask.shape[1] for block in blocks)
    masks = [torch.nn.functional.pad(block.mask, (0, positions - block.mask.shape[1])) for block in blocks]
    owner = torch.cat([block.owner + start for block, start in zip(blocks, starts, strict=False)])
    return RowBlock(Rows.cat([block.rows for block in blocks]), owner, torch.cat(masks))


def in_groups(blocks: RowBlocks, most: int) -> Iterator[RowBlock]:
    """Blocks joined as long as they have no more than so many examples together."""
    pending: list[RowBlock] = []
    for block in blocks:
        if pending and sum(b.size for b in pending) + block.size > most:
            yield joined(pending)
            pending = []
        pending.append(block)
    yield joined(pending)
