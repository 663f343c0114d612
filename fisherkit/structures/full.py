"""The whole matrix by its rows: all of them, or those of largest norm."""

from __future__ import annotations

import collections
import itertools
import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from fisherkit.operators import FisherOperator
from fisherkit.operators.low_rank import LowRankOperator
from fisherkit.processes import Processes
from fisherkit.rows.chunks import Chunk
from fisherkit.rows.collection import LargestRows, Rows, RowSource, squared_norms
from fisherkit.rows.problem import Problem
from fisherkit.rows.shared import SharedRows, shared
from fisherkit.structures.base import Part, Parts, Structure, Sums


@dataclass(frozen=True)
class KeptRows(Sums):
    """Rows in memory, at most ``most``, those of largest norm; None for all. ``everyones``: those of all processes."""

    constant = ("most", "dropped_share", "everyones")

    rows: Rows | None = None
    most: int | None = None
    dropped: int = 0
    dropped_share: float | None = None
    everyones: SharedRows | None = None

    def added(self, chunks: Iterable[Chunk]) -> KeptRows:
        """With more rows, taken as they come so that they exist once."""
        known = () if self.rows is None else (self.rows,)
        parts = itertools.chain(known, map(operator.attrgetter("rows"), chunks))
        first = next(parts, None)
        if first is None:
            return self
        parts = itertools.chain([first], parts)
        del first
        if self.most is None:
            return KeptRows(Rows.gathered(parts))
        largest = LargestRows(self.most)
        collections.deque(map(largest.add, parts), 0)
        rows, share = largest.result()
        return KeptRows(rows, self.most, self.dropped + largest.seen - rows.count, share)

    def all_reduced(self, processes: Processes) -> KeptRows:
        """All processes' rows, each where it is; of those of largest norm, the largest of all."""
        if self.most is None:
            return replace(self, everyones=shared(self.rows, processes))
        rows, share = self.rows, self.dropped_share or 0.0
        squares = torch.zeros(0, dtype=torch.float64) if rows is None else squared_norms(rows).cpu()
        lost = float(squares.sum()) * share / (1 - share) if share < 1 else 0.0
        everyone = processes.gathered((squares, self.dropped, lost))
        whole = torch.cat([one[0] for one in everyone])
        largest = whole.argsort(descending=True, stable=True)[: self.most]
        start = sum(len(one[0]) for one in everyone[: processes.rank])
        own = largest[(largest >= start) & (largest < start + len(squares))].sort().values - start
        if rows is not None and len(own) < rows.count:
            rows = rows.reordered(own.to(rows.device)).compact()
        total, kept = float(whole.sum()) + sum(one[2] for one in everyone), float(whole[largest].sum())
        dropped = sum(one[1] for one in everyone) + len(whole) - len(largest)
        share = (total - kept) / total if dropped and total > 0 else 0.0
        return KeptRows(rows, self.most, dropped, share, shared(rows, processes))

    @property
    def whole(self) -> Rows | SharedRows:
        """The rows that were kept, of all processes where there are several."""
        found = self.everyones or self.rows
        if found is None:
            raise LookupError("no rows have been added")
        return found


class RowStructure(Structure):
    """A structure whose operator is made of rows in memory, block by block."""

    keeps_rows = in_steps = True

    def by_rows(self, rows: RowSource, scale: float) -> LowRankOperator:
        """The operator of rows, wherever they are."""
        return LowRankOperator(rows, scale, dtype=self.dtype, device=self.device, memory_budget=self.memory_budget)


class Full(RowStructure):
    """F itself."""

    name = "full"
    meaning = "the whole matrix by its rows, JᵀJ/N; solved through the rows' Gram matrix"
    of_all_rows = True

    @property
    def instead(self) -> str:  # type: ignore[override]
        if self.max_rows is None:
            return 'storage="stream", which makes all rows anew for every product'
        return f"max_rows below {self.max_rows:,}, or None, which streams all rows"

    @property
    def streams(self) -> bool:
        """All rows can be had again and again; the largest are known once."""
        return self.max_rows is None

    def bytes(self, problem: Problem) -> int:
        """All rows; of those of largest norm, twice as many as are kept and those of one example."""
        example = problem.row_bytes(self.space.names)
        whole = example * problem.examples
        return whole if self.max_rows is None else min(whole, self._held(problem) + example)

    def peak(self, problem: Problem) -> int:
        """Of several batches' rows one unit's exist twice while they are put together."""
        if self.max_rows is not None or problem.first_size >= problem.examples:
            return self.bytes(problem)
        return self.bytes(problem) + problem.examples * max(problem.row_bytes(u.names) for u in problem.plan.units)

    def summed(self, problem: Problem) -> int:
        """All batches' rows; of those of largest norm, what is there before a batch, and what one more makes of one."""
        if self.max_rows is None:
            return self.bytes(problem)
        vectors, alone = problem.vectors_per_example, problem.row_bytes(self.space.names, vectors=1)
        each, most = problem.row_bytes(self.space.names) / vectors, self.max_rows
        batch, before = problem.first_size * vectors, (problem.examples - problem.first_size) * vectors
        first = batch * each if batch <= 2 * most else most * alone
        second = 2 * batch * each if 2 * batch <= most else most * alone
        held = max(2 * most // batch * batch * each, most * alone + most // batch * batch * each)
        return round(min(held, before * each) + second - first)

    def fitted(self, problem: Problem) -> int:
        """Kept for speed, or with the fewest numbers where that does not fit."""
        for lean in (False, True):
            problem.choose(lean=lean)
            needed = self.bytes(problem)
            if needed <= self.memory_budget:
                break
        return needed

    def most_examples(self, problem: Problem) -> int | None:
        """Where not all rows fit, as many as fit beside those that are held."""
        example = problem.row_bytes(self.space.names)
        if self.max_rows is None or example * problem.examples <= self.memory_budget:
            return None
        return (self.memory_budget - self._held(problem)) // example

    def _held(self, problem: Problem) -> int:
        # Each may be the only one of its example, which then keeps its activations for it.
        return 2 * (self.max_rows or 0) * problem.row_bytes(self.space.names, vectors=1)

    def empty(self, problem: Problem | None = None) -> KeptRows:
        return KeptRows(most=self.max_rows)

    def operator(self, sums: KeptRows, scale: float) -> FisherOperator:
        return self.by_rows(sums.whole, scale)

    def parts(self, sums: KeptRows, operator: LowRankOperator) -> Parts:
        rows, share = sums.whole, f"{100 * (sums.dropped_share or 0):.3g}% of the trace left out"
        note = f"{rows.count:,} of {rows.count + sums.dropped:,} rows, {share}" if sums.dropped else ""
        parts: Parts = {}
        for slot in rows.slots:
            own = self.by_rows(rows.part(slot.names), operator.scale)
            parts[slot.names] = Part.of(own, f"full, {slot.rows.form} rows", note, of_rows=True)
        return parts
