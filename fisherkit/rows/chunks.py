"""A micro-batch's output vectors as numbered slots, and the chunks of rows that are made of them.

Between output space and rows: which slots there are, which of them count, and how many go through one backward pass.
Knows neither the data's loop nor what becomes of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fisherkit.data import Batch
from fisherkit.outputs import Columns, OutputRule, Outputs, OutputVectors, vectors_of
from fisherkit.rows.base import RowSelection
from fisherkit.rows.collection import Rows


@dataclass(frozen=True)
class Chunk:
    """Rows of some output vectors of one micro-batch; ``owner`` is the example of each, or ``owned`` tells it.

    ``regular`` if rows are ordered by example and every example has equally many. The ``first`` chunk adds all examples
    that count to N (``counted``), and the trace that the kind left out of each one's output Fisher (``dropped``).
    ``counted_positions`` are those ``[B, P]`` of the outputs that count, all if ``whole``; then those of the inputs
    that are data, if the batch says so in an attention mask. ``squares`` is about the most that Σ_r ‖row_r‖² can be, of
    rows that were looked at (`Rows.finite`); infinite where the outputs' Hessian stands for vectors.
    """

    rows: Rows
    owned: Int[Tensor, "R"] | RowSelection
    regular: bool
    first: bool
    counted: int
    whole: bool
    counted_positions: tuple[Bool[Tensor, "..."], ...]
    dropped: Float[Tensor, "n"] | None
    squares: float = 0.0

    @property
    def owner(self) -> Int[Tensor, "R"]:
        """The example of each row."""
        return self.owned.owner if isinstance(self.owned, RowSelection) else self.owned

    @classmethod
    def whole_batch(cls, rows: Rows, outputs: Outputs, batch: Batch, counts: tuple[int, int]) -> Chunk:
        """All rows of a micro-batch at once, for sums that do not ask whose each is; ``counts`` as in `Slots.of`."""
        counting = _counting(outputs.mask, batch)
        nobody = torch.empty(0, dtype=torch.long, device=outputs.mask.device)
        return cls(rows, nobody, False, True, counts[0], outputs.whole and len(counting) == 1, counting, None, math.inf)


def _counting(mask: Bool[Tensor, "B P"], batch: Batch) -> tuple[Bool[Tensor, "..."], ...]:
    """Which positions of the outputs count, then which of the inputs are data, if an attention mask says so."""
    attention = batch.kwargs.get("attention_mask")
    if isinstance(attention, Tensor) and attention.ndim == 2:
        return mask, attention.bool() & mask.any(1, keepdim=True)
    return (mask,)


@dataclass(frozen=True)
class Slots:
    """The output vectors of a micro-batch before any backward pass, ``number`` an example.

    ``flat`` if every position has vectors of its own. ``counted`` examples (or tokens) count, ``whole`` if every
    position does; ``dropped`` is, for each that counts, the output Fisher's trace that the kind left out.
    """

    found: OutputVectors
    mask: Bool[Tensor, "B P"]
    flat: bool
    number: int
    counted: int
    whole: bool
    dropped: Float[Tensor, "n"] | None

    @classmethod
    def of(
        cls, outputs: Outputs, rule: OutputRule, token: bool, counts: tuple[int, int], *, traced: bool = True
    ) -> Slots:
        """Those of a kind; ``counts`` are how many examples (or tokens) and positions count.

        ``traced`` says whether it is asked what the kind left out.
        """
        flat, mask = (token or rule.positionwise) and outputs.z.shape[1] > 1, outputs.mask
        counted, positions = counts
        whole = positions == mask.numel()
        found = vectors_of(rule, outputs.positionwise() if flat else outputs, whole)
        dropped = found.dropped if traced else None
        dropped = dropped() if callable(dropped) else dropped
        dropped = None if dropped is None else dropped[mask.flatten() if flat else mask.any(1)]
        number = found.number * (mask.shape[1] if flat else 1)
        return cls(found, mask, flat, number, counted, whole, dropped)

    def vectors(self, some: slice) -> Float[Tensor, "k B P C"]:
        """The output vectors of some slots."""
        v = self.found.v
        if isinstance(v, Tensor) and not self.flat:
            return v[:, some].transpose(0, 1)
        if isinstance(v, Columns) and not self.flat and v.whole is not None and some == slice(0, self.number):
            return v.whole().transpose(0, 1)
        index = torch.arange(some.start, some.stop, device=self.mask.device)
        batch, positions = self.mask.shape
        examples, found = torch.arange(batch, device=index.device), self.found
        if not self.flat:
            shape = len(index), batch
            own = found.select(examples.expand(shape).flatten(), index.unsqueeze(1).expand(shape).flatten())
            return own.unflatten(0, shape)
        position, vector = (index // found.number).unsqueeze(1), (index % found.number).unsqueeze(1)
        unit = examples * positions + position
        own = found.select(unit.flatten(), vector.expand_as(unit).flatten()).unflatten(0, unit.shape)
        whole = own.new_zeros(*unit.shape, positions, own.shape[-1])
        whole[torch.arange(len(index), device=index.device).unsqueeze(1), examples, position] = own.squeeze(2)
        return whole

    def keep(self, some: slice) -> Bool[Tensor, "B k"] | None:
        """Which of some slots are rows; None for all."""
        found, mask = self.found, self.mask
        if self.whole and found.keep is None:
            return None
        if not self.flat:
            keep = mask.any(1, keepdim=True).expand(-1, some.stop - some.start)
            keep = keep if found.keep is None else keep & found.keep[:, some]
        else:
            index = torch.arange(some.start, some.stop, device=mask.device)
            position, vector = index // found.number, index % found.number
            keep = mask[:, position]
            if found.keep is not None:
                keep = keep & found.keep.reshape(*mask.shape, -1)[:, position, vector]
        return None if bool(keep.all()) else keep

    def chunks(
        self, batch: Batch, step: int, make_rows: Callable[[Float[Tensor, "k B P C"], RowSelection], Rows],
        call: str | None = None,
    ) -> Iterator[Chunk]:  # fmt: skip
        """Rows of all slots, of so many vectors an example at a time (``step``).

        They are looked at, and an error names the ``call``; those for None are not.
        """
        positions = _counting(self.mask, batch)
        for first in range(0, self.number, step):
            some = slice(first, min(first + step, self.number))
            v, keep = self.vectors(some), self.keep(some)
            selection = RowSelection(v.shape[0], batch.size, v.device, keep)
            rows = make_rows(v, selection)
            yield Chunk(
                rows, selection, keep is None, first == 0,
                self.counted if first == 0 else 0, self.whole and len(positions) == 1, positions,
                self.dropped if first == 0 else None, 0.0 if call is None else rows.finite(call),
            )  # fmt: skip
            del rows  # not to be held while the next are made


def joined(chunks: list[Chunk]) -> Chunk:
    """One micro-batch's rows in order: every chunk has rows of every example, so they are sorted by example."""
    if len(chunks) == 1:
        return chunks[0]
    owner = torch.cat([chunk.owner for chunk in chunks])
    order = torch.argsort(owner, stable=True)
    rows = Rows.cat([chunk.rows for chunk in chunks]).reordered(order, all(chunk.regular for chunk in chunks))
    return replace(chunks[0], rows=rows, owned=owner[order], squares=sum(chunk.squares for chunk in chunks))
