"""From rows to an operator: adds the problem's chunks up by structure, within the memory budget, and divides by N."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import cast

from fisherkit.coverage import Coverage, CoverageEntry
from fisherkit.data import Batch
from fisherkit.errors import DataError, MemoryBudgetError
from fisherkit.memory import available_memory, readable
from fisherkit.operators import FisherOperator
from fisherkit.operators.low_rank import LowRankOperator
from fisherkit.processes import Processes
from fisherkit.progress import duration, say
from fisherkit.rows.chunks import Chunk
from fisherkit.rows.collection import Rows, RowSource
from fisherkit.rows.factored import FactoredRows
from fisherkit.rows.later import FEWEST, LaterRows, products_before_rows
from fisherkit.rows.problem import LONG, BetterPlanError, Problem, Tally
from fisherkit.rows.shared import SharedRows
from fisherkit.rows.streamed import StreamedRows, matrix_free
from fisherkit.rows.verified import remember
from fisherkit.structures import Part, Parts, Structure, Sums

MANY = 64
"""Output vectors an example from which on a run's cost is told before it."""


@dataclass(frozen=True)
class Built:
    """An operator and how it came about.

    ``tally`` is how many examples and rows there are, or who counts them when asked for it, where rows are made later.
    ``dropped_share`` is, of the trace of F, what went with the rows that were left out; None if none were to be.
    """

    operator: FisherOperator
    tally: Tally | StreamedRows
    coverage: Coverage
    dropped_share: float | None


class Builder:
    """Builds structures of one problem; a ``memory_budget`` of None is half of what is available.

    ``weights`` is the `parameters_hash` that the model must have where rows are made after the build; ``told`` then
    gets what was built of them.
    """

    def __init__(
        self, problem: Problem, *, normalization: str, memory_budget: int | None, reduce: bool,
        max_rows: int | None = None, storage: str = "auto", weights: str | None = None,
        told: Callable[[Built], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self.normalization, self.storage, self.weights, self.told = normalization, storage, weights, told
        device = problem.plan.example_parameter.device
        self.processes = problem.processes
        self.budget = available_memory(device) // 2 if memory_budget is None else memory_budget
        if self.processes is not None:  # what is decided by it must be decided alike
            self.budget = min(self.processes.gathered(self.budget))
        self.settings = {
            "token": problem.token, "reduce": reduce, "max_rows": max_rows, "memory_budget": self.budget,
            "processes": self.processes,
        }  # fmt: skip
        self.problem = replace(problem, revisable=True, budget=self.budget)
        self.counted: list[Tally] = []
        self.needed = 0
        self.foretold = False

    def build(self, structure: type[Structure]) -> Built:
        """The operator of a structure.

        Raises:
            MemoryBudgetError, DataError: the structure cannot fit, before the pass over the data; no example counts.
        """
        try:
            return self._built(structure)
        except BetterPlanError as found:
            # A later batch used parameters that the first examples do not, or used some in another way.
            if found.plan is not self.problem.plan:
                remember(found.plan)
            self.problem = replace(self.problem, plan=found.plan, by_owner=found.by_owner)
            self.counted.clear()
        return self.build(structure)

    def _built(self, kind_of_structure: type[Structure]) -> Built:
        structure = kind_of_structure.of(self.problem.plan, **self.settings)
        by_owner = bool(self.problem.by_owner) if structure.counts_positions else self.problem.by_owner
        self.problem = replace(self.problem, summed=not structure.needs_rows, by_owner=by_owner)
        self.problem.measure()
        for unit in self.problem.plan.ruled:
            # Only rows that are kept gain from being written out; sums are taken from the factors.
            unit.stored = unit.stored and structure.keeps_rows
        self.needed = structure.fitted(self.problem)
        share = None
        fits, free = self.needed <= self.budget, structure.streams and self.storage != "rows"
        later = self._products_before_rows() if fits and free else None
        if free and (later is not None or self.storage == "stream" or not fits):
            operator, parts, tally = self._streamed(structure, later)
        else:
            self._require(structure)
            self.problem = replace(self.problem, most_examples=structure.most_examples(self.problem))
            sums = self._summed(structure)
            self.counted.append(Tally(rows=-sums.dropped))
            share, tally = sums.dropped_share, Tally.of(self.counted).some()
            operator = structure.operator(sums, self._scale(tally))
            parts = structure.parts(sums, operator)
            del sums
        coverage = Coverage(tuple(self._entry(names, part) for names, part in parts.items()))
        return Built(operator, tally, coverage, share)

    def _summed(self, structure: Structure) -> Sums:
        """The sums of all passes over the rows, which are read again where they do not fit in memory."""
        description, empty = structure.name, structure.empty(self.problem)
        kept: list[Chunk] = []
        if structure.keeps_rows:
            compared = self.problem.source.recorded
            return self._met(lambda: empty.added(self._counted(self.problem.batches(description, compared=compared))))
        rows = self.problem.row_bytes(self.problem.plan.space.names) if structure.passes > 1 else 0
        keep = rows > 0 and self.needed + rows * self.problem.examples <= self.budget
        readings = 1 if keep else structure.passes
        chunks = self._counted(self.problem.chunks(description, compared=readings > 1), readings)
        sums: Sums | None = self._met(lambda: empty.added(_noting(chunks, kept) if keep else chunks))
        while sums is not None:
            found, going = sums, structure.next_pass(sums)
            sums = None if going is None else self._added(going, kept if keep else self.problem.chunks(description))
        return found

    def _added(self, sums: Sums, chunks: Iterable[Chunk]) -> Sums:
        """With another pass's, of examples that have been counted."""
        return self._met(lambda: sums.added(chunks), counted=True)

    def _met(self, add: Callable[[], Sums], counted: bool = False) -> Sums:
        """What a pass adds up; of several processes, what all of them add up, and the examples of all."""
        if self.processes is None:
            return add()

        def tried() -> tuple[Sums | None, Batch | None]:
            try:
                return add(), None
            except BetterPlanError as found:
                return None, found.batch

        sums, batch = self.processes.each("a pass over the data", tried)
        for better in self.processes.gathered(batch):
            if better is not None:
                raise self.problem.better(better)
        if sums is None:
            raise LookupError("neither sums nor a reason to begin again")
        if not counted:
            self._count_all(self.processes)
        return sums.met(self.processes)

    def _count_all(self, processes: Processes) -> None:
        """Examples, rows and dropped traces of all processes, in the order of the ranks."""
        self.counted = list(processes.gathered(Tally.of(self.counted)))
        Tally.of(self.counted).some()

    def _products_before_rows(self) -> float | None:
        """How many products to make before rows that fit in memory; None to make rows at once."""
        if self.storage != "auto" or self.processes is not None:
            return None
        problem = self.problem
        found = products_before_rows(problem.plan, problem.vectors_per_example, problem.examples)
        return found if found >= FEWEST and matrix_free(problem) else None

    def _streamed(
        self, structure: Structure, later: float | None
    ) -> tuple[FisherOperator, Parts, Tally | StreamedRows]:
        """Rows that are made anew for every product; or, after so many products, once and for all."""
        problem, source = replace(self.problem, revisable=False, weights=self.weights), self.problem.source

        def counted() -> StreamedRows:
            streamed = StreamedRows(problem)
            self.counted.append(streamed.tally)
            return streamed

        rows: RowSource
        tally: Tally | StreamedRows
        scale: float | Callable[[], float]
        need = f"rows would take {readable(self.needed)}"
        if later is not None:
            streamed = StreamedRows(problem)
            rows = LaterRows(streamed, functools.partial(self._made_later, type(structure), streamed), later)
            for _ in source:  # so that data that change until they are used are refused
                pass
            tally, scale = streamed, lambda: self._scale(streamed.some())
            after = f"they pay from {later + 1:,.0f} products on" if later < math.inf else "products need none"
            part, reason = "full, rows later", f"{need} and are not made yet: {after}"
        else:
            rows = counted() if self.processes is None else self.processes.each("counting", counted)
            if self.processes is not None:
                self._count_all(self.processes)
                rows = SharedRows(rows, self.processes)
            tally = Tally.of(self.counted).some()
            part, scale = "full, streamed rows", self._scale(tally)
            fits = self.needed <= self.budget
            reason = f'{need}, storage="stream"' if fits else f"{need}, the budget is {readable(self.budget)}"
        whole = LowRankOperator(
            rows, scale, dtype=structure.dtype, device=structure.device, memory_budget=self.budget
        )  # fmt: skip
        return whole, dict.fromkeys((unit.names for unit in self.problem.plan.units), Part(whole, part, reason)), tally

    def _made_later(self, kind_of_structure: type[Structure], streamed: StreamedRows) -> RowSource:
        """The rows that products were made without; streamed, if a batch shows that they do not fit."""
        self.storage, self.problem = "now", replace(self.problem, weights=self.weights)
        self.counted.clear()
        built = self.build(kind_of_structure)
        tally = built.tally.some()
        if streamed.counted is not None and streamed.counted[:2] != tally[:2]:
            raise DataError(
                call="a pass over the data", got=f"N, R = {tally.examples:,}, {tally.rows:,}",
                expected=f"{streamed.counted.examples:,}, {streamed.counted.rows:,}, as in the first product",
                why="rows that are made later must be of the same Fisher", try_='storage="rows"',
            )  # fmt: skip
        streamed.counted = tally
        self.told(built)
        return cast(LowRankOperator, built.operator).row_source

    # -- shared --------------------------------------------------------------------------------------------------------

    def _scale(self, tally: Tally) -> float:
        """1/N or 1."""
        return 1.0 if self.normalization == "sum" else 1.0 / tally.examples

    def _counted(self, chunks: Iterable[Chunk], readings: int = 1) -> Iterator[Chunk]:
        """Count examples, rows and dropped traces on the way; foretell first what so many readings will cost."""
        self._foretell(readings)
        for chunk in chunks:
            self.counted.append(
                Tally(chunk.counted, chunk.rows.count, () if chunk.dropped is None else (chunk.dropped,))
            )
            yield chunk
        if self.processes is None:
            Tally.of(self.counted).some()

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
        return self.problem.vectors_per_example > MANY and not self.problem.rowless

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

    def _require(self, structure: Structure) -> None:
        """Refuse what does not fit."""
        if self.needed <= self.budget:
            return
        why, try_ = "nothing has been computed yet", structure.instead.format(structure)
        found = self.problem.forecast() if self._many else None
        if found is not None:
            why += f"; {self._cost(found)}"
        if self._many and structure.keeps_rows:  # the others' results are as large for any kind
            try_ += f", or {self._instead()}"
        raise MemoryBudgetError(
            call=f'structure="{structure.name}"', got=f"a need of {readable(self.needed)}",
            expected=f"at most memory_budget = {readable(self.budget)}", why=why,
            try_=f"{try_}, or a larger memory_budget",
        )  # fmt: skip

    def _entry(self, names: tuple[str, ...], part: Part) -> CoverageEntry:
        plan = self.problem.plan
        units = [unit for unit in plan.units if unit.names[0] in names]
        rules = {plan.rule_name(unit) for unit in units}
        reason = "; ".join(filter(None, (units[0].reason if part.kept else "", part.reason)))
        return CoverageEntry(names, ", ".join(sorted(rules)), part.structure, part.operator.nbytes, reason)


def _noting(chunks: Iterable[Chunk], kept: list[Chunk]) -> Iterator[Chunk]:
    """The chunks, their factored rows kept for other passes."""
    for chunk in chunks:
        slots = [slot for slot in chunk.rows.slots if isinstance(slot.rows, FactoredRows)]
        if slots:
            kept.append(replace(chunk, rows=Rows(chunk.rows.space, slots)))
        yield chunk
