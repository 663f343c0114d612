"""From rows to an operator: the only place that knows N, the structures and the memory budget together.

Reads the problem's chunks, adds them up by structure and divides by N once. It does not know which kind it builds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.accumulators import (
    SMALL_BLOCK,
    KroneckerFactors,
    LayerSums,
    Names,
    NormalMatrix,
    RotatedSquares,
    SecondMoment,
    Squares,
)
from fisherkit.coverage import Coverage, CoverageEntry
from fisherkit.errors import DataError, MemoryBudgetError
from fisherkit.memory import available_memory, readable
from fisherkit.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalOperator,
    EigenKroneckerOperator,
    FisherOperator,
    KroneckerOperator,
    state_of,
)
from fisherkit.operators.kronecker import Spectrum, scaled_spectrum
from fisherkit.operators.low_rank import LowRankOperator
from fisherkit.progress import duration, say
from fisherkit.rows.chunks import Chunk
from fisherkit.rows.collection import Rows, RowSource
from fisherkit.rows.factored import FactoredRows
from fisherkit.rows.largest import LargestRows
from fisherkit.rows.problem import LONG, BetterPlanError, Problem
from fisherkit.rows.streamed import StreamedRows
from fisherkit.rows.verified import remember

MANY = 64
"""Output vectors an example from which on a run's cost is told before it."""

Parts = dict[Names, tuple[FisherOperator, str, str]]
"""Operator, structure and reason of each part of the parameters."""


@dataclass(frozen=True)
class Built:
    """An operator and how it came about.

    Args:
        operator: the Fisher.
        examples: N.
        rows: R.
        coverage: what was done with each parameter.
        dropped: for each example or token, the trace that the kind left out of the output Fisher; None if nothing.
        dropped_share: of the trace of F, what went with the rows that were left out; None if none were to be.
    """

    operator: FisherOperator
    examples: int
    rows: int
    coverage: Coverage
    dropped: Float[Tensor, "n"] | None
    dropped_share: float | None


class Builder:
    """Builds the structures of one problem.

    Args:
        problem: model, data, kind and conventions.
        normalization: "mean" or "sum".
        memory_budget: bytes; None for half of what is available.
        reduce: Kronecker factors from sums over shared positions ("reduce") instead of each position ("expand").
        max_rows: of the full structure, how many rows to keep, those of largest norm; None for all.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        normalization: str,
        memory_budget: int | None,
        reduce: bool,
        max_rows: int | None = None,
    ) -> None:
        self.normalization, self.reduce, self.max_rows = normalization, reduce, max_rows
        self.space = problem.plan.space
        first = problem.plan.example_parameter
        self.dtype, self.device = problem.plan.dtype, first.device
        self.budget = available_memory(first.device) // 2 if memory_budget is None else memory_budget
        self.problem = replace(problem, revisable=True, budget=self.budget)
        self.examples = self.rows = 0
        self.dropped: list[Tensor] = []
        self.dropped_share: float | None = None
        self.needed = 0
        self.foretold = False

    def build(self, structure: str) -> Built:
        """The operator of a structure.

        Raises:
            MemoryBudgetError: before the pass over the data, if the structure cannot fit.
            DataError: no example counts.
        """
        try:
            return self._built(structure)
        except BetterPlanError as found:
            # A later batch used parameters that the first examples do not, or used some in another way.
            remember(found.plan)
            self.problem = replace(self.problem, plan=found.plan)
            self.examples = self.rows = 0
            self.dropped = []
        return self.build(structure)

    def _built(self, structure: str) -> Built:
        make: dict[str, Callable[[], tuple[FisherOperator, Parts]]] = {
            "full": self._full if self.max_rows is None else partial(self._largest, self.max_rows),
            "block": self._block,
            "diagonal": self._diagonal,
            "kfac": lambda: self._join(self._kfac()),
            "ekfac": lambda: self._join(self._ekfac()),
        }
        self.problem.summed = structure in ("diagonal", "kfac", "ekfac")
        self.problem.measure()
        for unit in self.problem.plan.ruled:
            # Only rows that are kept gain from being written out; sums are taken from the factors.
            unit.stored = unit.stored and structure in ("full", "block")
        operator, parts = make[structure]()
        coverage = Coverage(tuple(self._entry(names, *part) for names, part in parts.items()))
        dropped = torch.cat(self.dropped) if self.dropped else None
        return Built(operator, self.examples, self.rows, coverage, dropped, self.dropped_share)

    # -- structures ----------------------------------------------------------------------------------------------------

    def _full(self) -> tuple[FisherOperator, Parts]:
        for lean in (False, True):
            self.problem.choose(lean=lean)
            needed = self.problem.row_bytes(self.space.names) * self.problem.source.count()
            if needed <= self.budget:
                break
        self.needed = needed
        units = {unit.names: unit.reason for unit in self.problem.plan.units}
        if needed <= self.budget:
            chunks = self._counted(self.problem.batches("full", compared=False))
            return self._kept(Rows.gathered(chunk.rows for chunk in chunks))
        for counted, rows_here, dropped in self.problem.counts("count"):
            self._count(counted, rows_here, dropped)
        self._require_examples()
        whole = self._low_rank(StreamedRows(replace(self.problem, revisable=False), self.rows))
        reason = f"rows would take {readable(needed)}, the budget is {readable(self.budget)}"
        return whole, dict.fromkeys(units, (whole, "full, streamed rows", reason))

    def _largest(self, most: int) -> tuple[FisherOperator, Parts]:
        """The rows of largest norm; where not all fit, of micro-batches that fit beside those that are held."""
        for lean in (False, True):
            self.problem.choose(lean=lean)
            whole = self.problem.row_bytes(self.space.names) * self.problem.source.count()
            example = self.problem.row_bytes(self.space.names)
            # Each may be the only one of its example, which then keeps its activations for it.
            held = 2 * most * self.problem.row_bytes(self.space.names, vectors=1)
            if min(whole, held + example) <= self.budget:
                break
        self._require(min(whole, held + example), "full", f"max_rows below {most:,}, or None, which streams all rows")
        if whole > self.budget:
            self.problem.most_examples = (self.budget - held) // example
        largest = LargestRows(most)
        for chunk in self._counted(self.problem.batches("full", compared=False)):
            largest.add(chunk.rows)
        rows, self.dropped_share = largest.result()
        self.rows = rows.count
        note = f"{rows.count:,} of {largest.seen:,} rows, {100 * self.dropped_share:.3g}% of the trace left out"
        return self._kept(rows, note if rows.count < largest.seen else "")

    def _kept(self, rows: Rows, note: str = "") -> tuple[FisherOperator, Parts]:
        """The operator of rows in memory, and its parts."""
        kinds = {slot.names: f"full, {slot.rows.kind} rows" for slot in rows.slots}
        reasons = {unit.names: "; ".join(filter(None, (unit.reason, note))) for unit in self.problem.plan.units}
        return self._low_rank(rows), {n: (self._low_rank(rows.part(n)), kinds[n], reasons[n]) for n in reasons}

    def _block(self) -> tuple[FisherOperator, Parts]:
        """Each module's block by its rows or its dense matrix, whichever is smaller; one pass for all."""
        examples, item = self.problem.source.count(), torch.finfo(self.dtype).bits // 8
        spaces = {names: self.space.restrict(names) for names in self.problem.plan.modules}
        as_rows = {names: examples * self.problem.row_bytes(names) for names in spaces}
        as_dense = {names: item * space.size**2 for names, space in spaces.items()}
        self._require(sum(min(as_rows[n], as_dense[n]) for n in spaces), "block", 'structure="kfac" or "diagonal"')
        dense = [names for names in spaces if as_dense[names] < as_rows[names]]
        matrices = {names: NormalMatrix(self._zeros(spaces[names].size, spaces[names].size)) for names in dense}
        kept_space = self.space.restrict(n for names in spaces if names not in dense for n in names)
        kept: list[Rows] = []
        for chunk in self._counted(self.problem.batches("block", compared=False)):
            for names in dense:
                matrices[names] = matrices[names].add(chunk.rows.restrict(spaces[names]).dense())
            if kept_space.names:
                kept.append(chunk.rows.restrict(kept_space))
        rows = Rows.cat(kept) if kept else None
        parts: Parts = {}
        for names, space in spaces.items():
            if names in matrices:
                block: FisherOperator = DenseOperator(space, self.scale * matrices[names].total)
                parts[names] = block, "block, dense", "d² numbers are fewer than its rows'"
            elif rows is not None:
                block = self._low_rank(rows.restrict(space))
                parts[names] = block, "block, rows", "its rows are fewer numbers than d²"
        return self._join(parts)

    def _diagonal(self) -> tuple[FisherOperator, Parts]:
        self._require(
            torch.finfo(self.dtype).bits // 8 * self.space.size, "diagonal", "params= to choose fewer parameters"
        )
        totals: dict[Names, Squares] = {}
        for chunk in self._counted(self.problem.chunks("diagonal", compared=False)):
            for slot in chunk.rows.slots:
                known = totals.get(slot.names)
                totals[slot.names] = Squares(slot.rows.squared_sum()) if known is None else known.add(slot.rows)
        parts: Parts = {
            names: (DiagonalOperator(self.space.restrict(names), total.total.mul_(self.scale)), "diagonal", "")
            for names, total in totals.items()
        }
        joined, _ = self._join(parts)
        return DiagonalOperator(self.space, joined.diagonal()), parts

    def _kfac(self) -> Parts:
        """Kronecker factors where the unit's rows are factored, else an exact block or diagonal."""
        factors, parts = self._factors("kfac", None)
        for names, f in factors.items():
            scales = 1 / max(f.count, 1), self.scale
            a, g = (m.dense().mul_(scale) for scale, m in zip(scales, (f.activation, f.gradient), strict=True))
            operator = KroneckerOperator(
                self.space.restrict(names), a, g, f.transposed, symmetric=True,
                activation_spectrum=_scaled_spectrum(f.activation, scales[0]),
                gradient_spectrum=_scaled_spectrum(f.gradient, scales[1]),
            )  # fmt: skip
            parts[names] = operator, "kfac", ""
        return self._ordered(parts)

    def _ekfac(self) -> Parts:
        """Kfac's eigenbases, then second moments of the rows in them; rows that do not fit in memory are made twice."""
        kept: dict[Names, list[FactoredRows]] = {}
        needed = self._kfac_bytes() + self.problem.row_bytes(self.space.names) * self.problem.source.count()
        factors, parts = self._factors("ekfac", kept if needed <= self.budget else None)
        totals: dict[Names, RotatedSquares] = {}
        for names, f in factors.items():
            a, g = (moment.spectrum("ekfac")[1].to(self.dtype).contiguous() for moment in (f.activation, f.gradient))
            totals[names] = RotatedSquares(a, g, self._zeros(g.shape[1], a.shape[1]))
            for rows in kept.pop(names, []):
                totals[names] = totals[names].add(rows)
        if needed > self.budget:
            for chunk in self.problem.chunks("ekfac"):
                for slot in chunk.rows.slots:
                    if slot.names in totals and isinstance(slot.rows, FactoredRows):
                        totals[slot.names] = totals[slot.names].add(slot.rows)
        for names, t in totals.items():
            operator = EigenKroneckerOperator(
                self.space.restrict(names), t.activation_basis, t.gradient_basis, self.scale * t.total,
                factors[names].transposed,
            )  # fmt: skip
            parts[names] = operator, "ekfac", ""
        return self._ordered(parts)

    def _factors(
        self, structure: str, kept: dict[Names, list[FactoredRows]] | None
    ) -> tuple[dict[Names, KroneckerFactors], Parts]:
        """One pass: the factors of units that have them, the parts of all others; the former's rows go to ``kept``."""
        self._require(self._kfac_bytes(), structure, 'structure="diagonal", or params= without the widest layers')
        sums = LayerSums(self.problem.token, self.reduce)
        readings = 2 if structure == "ekfac" and kept is None else 1
        for chunk in self._counted(self.problem.chunks(structure, compared=readings > 1), readings):
            sums.add(chunk)
            if kept is not None:
                for slot in chunk.rows.slots:
                    if isinstance(slot.rows, FactoredRows):
                        kept.setdefault(slot.names, []).append(slot.rows)
        parts: Parts = {}
        for names, matrix in sums.blocks.items():
            block_operator = DenseOperator(self.space.restrict(names), self.scale * matrix.total)
            parts[names] = block_operator, "exact block", f"no Kronecker rule, d <= {SMALL_BLOCK}"
        for names, total in sums.squares.items():
            diagonal = DiagonalOperator(self.space.restrict(names), self.scale * total.total)
            parts[names] = diagonal, "exact diagonal", f"no Kronecker rule, d > {SMALL_BLOCK}"
        return sums.factors, parts

    # -- shared --------------------------------------------------------------------------------------------------------

    @property
    def scale(self) -> float:
        """1/N or 1."""
        return 1.0 if self.normalization == "sum" else 1.0 / self.examples

    def _counted(self, chunks: Iterable[Chunk], readings: int = 1) -> Iterator[Chunk]:
        """Count examples, rows and dropped traces on the way; foretell first what so many readings will cost."""
        self._foretell(readings)
        for chunk in chunks:
            self._count(chunk.counted, chunk.rows.count, chunk.dropped)
            yield chunk
        self._require_examples()

    def _count(self, examples: int, rows: int, dropped: Tensor | None) -> None:
        self.examples += examples
        self.rows += rows
        if dropped is not None:
            self.dropped.append(dropped)

    def _foretell(self, readings: int) -> None:
        """Say what a run of many output vectors will take: on the error stream, or in a warning where it is long."""
        if self.foretold or not self._many:
            return
        self.foretold = True
        found = self.problem.forecast()
        if found is None:
            return
        seconds = found[1] * readings
        text = f"{self._cost(found, readings)}; {readable(self.needed)} of memory for the result"
        if self.problem.progress:
            say(f"{text}. Instead: {self._instead()}." if seconds > LONG else f"{text}.")
        elif seconds > LONG:
            warnings.warn(f"{text}. Try: {self._instead()}.", UserWarning, stacklevel=2)

    @property
    def _many(self) -> bool:
        """Whether there are so many backward passes that it is worth knowing what they take."""
        return self.problem.vectors_per_example > MANY and not self.problem.closed

    def _cost(self, found: tuple[int, float], readings: int = 1) -> str:
        passes, seconds = readings * found[0], readings * found[1]
        return (
            f"the {self.problem.kind.kind_name} kind has {self.problem.vectors_per_example:,} output vectors an "
            f"example here, which is {passes:,} backward passes: about {duration(seconds)}, by one that was measured"
        )

    def _instead(self) -> str:
        """What takes a few backward passes, or none."""
        few = "fk.TruncatedFisher(rank=2) or fk.SampledFisher(draws=1), two vectors an example and one"
        head = ', or params= of the last layer alone, whose structure="kfac" or "diagonal" needs no backward pass'
        return few + (head if self.problem.kind.of_hessian else "")

    def _require_examples(self) -> None:
        if self.examples == 0:
            raise DataError(
                call="data",
                got="no example with a label that counts",
                expected="at least one",
                why="all labels are ignore_index",
                try_="check the labels",
            )

    def _low_rank(self, rows: RowSource) -> LowRankOperator:
        return LowRankOperator(rows, self.scale, dtype=self.dtype, device=self.device, memory_budget=self.budget)

    def _ordered(self, parts: Parts) -> Parts:
        return {unit.names: parts[unit.names] for unit in self.problem.plan.units}

    def _join(self, parts: Parts) -> tuple[FisherOperator, Parts]:
        return BlockDiagonalOperator(self.space, [operator for operator, _, _ in parts.values()]), parts

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=self.dtype, device=self.device)

    def _kfac_bytes(self) -> int:
        item = torch.finfo(self.dtype).bits // 8
        return item * self.problem.plan.factor_numbers()

    def _require(self, needed: int, structure: str, try_: str) -> None:
        self.needed = needed
        if needed > self.budget:
            why, found = "nothing has been computed yet", self.problem.forecast() if self._many else None
            if found is not None:
                why += f"; {self._cost(found)}"
            if self._many and structure in ("full", "block"):  # the others' results are as large for any kind
                try_ += f", or {self._instead()}"
            raise MemoryBudgetError(
                call=f'structure="{structure}"', got=f"a need of {readable(needed)}",
                expected=f"at most memory_budget = {readable(self.budget)}", why=why,
                try_=f"{try_}, or a larger memory_budget",
            )  # fmt: skip

    def _entry(self, names: Names, operator: FisherOperator, structure: str, reason: str) -> CoverageEntry:
        units = self.problem.plan.units
        rules = {self.problem.plan.rule_name(unit) for unit in units if unit.names[0] in names}
        streamed = isinstance(operator, LowRankOperator) and not isinstance(operator.row_source, Rows)
        memory = 0 if streamed else state_of(operator).nbytes
        return CoverageEntry(names, ", ".join(sorted(rules)), structure, memory, reason)


def _scaled_spectrum(moment: SecondMoment, scale: float) -> Spectrum | None:
    """How to decompose the scaled moment without its matrix; None if the matrix is all there is."""
    return scaled_spectrum(partial(moment.spectrum, "kfac"), scale) if moment.matrix is None else None
