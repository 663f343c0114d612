"""From rows to an operator: adds the problem's chunks up by structure, within the memory budget, and divides by N.

Where all layers at once would not fit, some are taken after others, each part with passes of its own over the data.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch

from fisherkit import io
from fisherkit.arithmetic import may_overflow, overflow
from fisherkit.coverage import Coverage, CoverageEntry
from fisherkit.data import Batch
from fisherkit.errors import DataError, MemoryBudgetError, NonFiniteError, listed, warn
from fisherkit.memory import LiveBytes, available_memory
from fisherkit.operators import BlockDiagonalOperator, FisherOperator, ShardedOperator, state_of
from fisherkit.operators.composite import join
from fisherkit.operators.linalg import check_finite, checked_before, checked_together
from fisherkit.operators.low_rank import LowRankOperator
from fisherkit.progress import say
from fisherkit.rows.chunks import Chunk
from fisherkit.rows.collection import Rows, RowSource
from fisherkit.rows.factored import FactoredRows
from fisherkit.rows.generic import now
from fisherkit.rows.problem import LONG, BetterPlanError, Problem, Tally
from fisherkit.rows.shared import SharedRows
from fisherkit.rows.streamed import FEWEST, LaterRows, StreamedRows, matrix_free, products_before_rows
from fisherkit.rows.verified import fingerprint, remember
from fisherkit.space import ParameterSpace, infinite
from fisherkit.structures import Names, Part, Parts, Structure, Sums
from fisherkit.words import duration, readable

MANY = 64
"""Output vectors an example from which on a run's cost is told before it."""

KEPT = 1 << 28
"""Where no `memory_budget` is given and a structure reads the rows twice, rows of up to so many bytes, or as many as
the result takes, stay in memory for the second reading; more are made again. Keeping them saves a fifth of the time."""

SHOWN = 12
"""Parts that a plan names."""

TRIED = 4
"""Backward passes, at most, by which a plan measures a batch."""

T = TypeVar("T")


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

    @property
    def share(self) -> dict[str, str]:
        """What is recorded of rows that were left out."""
        return {} if self.dropped_share is None else {"dropped_share": repr(self.dropped_share)}

    def counted(self) -> dict[str, str]:
        """All that it adds to what is recorded."""
        tally, coverage = self.tally.some(), self.coverage.to_json()
        return {"examples": str(tally.examples), "rows": str(tally.rows), "coverage": coverage, **self.share}


@dataclass(frozen=True)
class BuildPlan:
    """What a build takes, told before its first pass; ``str`` is for people.

    Attributes:
        structure: by name.
        parts: the parameters of the layers that are taken together, one part after the other.
        passes: over the data, all parts' together; of structures that go on until they change no more, about.
        backward_passes: in all of them; None where the number of examples is not known.
        seconds: of all passes, by a first batch that was measured; None likewise.
        result_bytes: of the operator.
        peak_bytes: about, of memory beyond what the model and the data have: the operator, or only a part of it where
            parts go to a file, beside the sums of the largest part and what a first batch takes, which is counted.
        memory_budget: bytes that operator and sums may take.
        refused: why the build will be refused, with what would do instead; "" where it will not.
    """

    structure: str
    parts: tuple[tuple[str, ...], ...]
    passes: int
    backward_passes: int | None
    seconds: float | None
    result_bytes: int
    peak_bytes: int
    memory_budget: int
    refused: str = ""

    def __str__(self) -> str:
        number = len(self.parts)
        parts = f"{number:,} part{'s' * (number > 1)}, {self.passes:,} pass{'es' * (self.passes > 1)} over the data"
        time = "of a time that is not known, since the data do not say how many examples they have"
        if self.seconds is not None:
            time = f"{self.backward_passes:,} backward passes, about {duration(self.seconds)} by a first batch"
        lines = [
            f"{self.structure} in {parts}", time,
            f"result {readable(self.result_bytes)}, peak {readable(self.peak_bytes)} beside model and data, "
            f"memory_budget {readable(self.memory_budget)}",
        ]  # fmt: skip
        shown = [f"part {i}: {listed(names, 4)}" for i, names in enumerate(self.parts[:SHOWN], 1)] if number > 1 else []
        more = [f"and {number - SHOWN:,} more"] if number > SHOWN else []
        refusal = [f"it will be refused: {self.refused}"] if self.refused else []
        return "\n".join([*lines, *shown, *more, *refusal])


class Builder:
    """Builds structures of one problem; a ``memory_budget`` of None is half of what is available.

    ``weights`` gives the `parameters_hash` that the model must have where rows are made after the build, of which
    ``rows_made`` then gets what was built.
    """

    def __init__(
        self, problem: Problem, *, normalization: str, memory_budget: int | None, reduce: bool,
        weights: Callable[[], str], max_rows: int | None = None, storage: str = "auto",
        kept_dtype: torch.dtype | None = None, shard: bool = False,
    ) -> None:  # fmt: skip
        self.normalization, self.storage, self.weights = normalization, storage, weights
        self.rows_made: Callable[[Built], object] = id
        device = problem.plan.example_parameter.device
        self.processes = problem.processes
        self.shards = self.processes.size if shard else 1
        self.frugal = memory_budget is None
        self.budget = available_memory(device) // 2 if memory_budget is None else memory_budget
        self.budget = min(self.processes.gathered(self.budget))  # what is decided by it must be decided alike
        self.settings = {
            "token": problem.token, "reduce": reduce, "max_rows": max_rows, "memory_budget": self.budget,
            "processes": self.processes, "kept_dtype": kept_dtype, "expected": problem.source.expected,
        }  # fmt: skip
        self.problem, self.folds = problem, not reduce
        self.counted: list[Tally] = []
        self.needed = 0
        self.foretold = False

    def build(self, structure: type[Structure]) -> Built:
        """The operator of a structure."""
        return self._planned(lambda: self._built(structure))

    def plan(self, structure: type[Structure], *, to_file: bool = False) -> BuildPlan:
        """What `build` will take, or `build_into` if parts go to a file; costs three batches of one of the parts."""
        return self._planned(lambda: self._foreseen(structure, to_file))

    def build_into(self, structure: type[Structure], keeper: PartsFile) -> Built | None:
        """Hand every part over when it is finished, so that no two are in memory; what fits at once is returned."""
        return self._planned(lambda: self._kept(structure, keeper))

    def _planned(self, work: Callable[[], T]) -> T:
        """The result of work that begins anew where a later batch uses parameters otherwise than the first examples."""
        try:
            return work()
        except BetterPlanError as found:
            if found.plan is not self.problem.plan:
                remember(found.plan)
            self.problem = replace(self.problem, plan=found.plan, by_owner=found.by_owner)
            self.counted.clear()
        return self._planned(work)

    def _chosen(self, kind: type[Structure], *, closely: bool = False) -> Structure:
        """The structure of all parameters, and the problem as it wants it; ``closely``: what it takes matters."""
        structure = kind.of(self.problem.plan, **self.settings)
        by_owner = bool(self.problem.by_owner) if structure.counts_positions else self.problem.by_owner
        self.problem = replace(
            self.problem, summed=not structure.needs_rows, by_owner=by_owner, revisable=True, budget=self.budget,
            folds=self.folds,
        ).measured()  # fmt: skip
        squares = self.problem.summed and not structure.counts_positions and self.problem.vectors_per_example == 1
        for unit in self.problem.plan.ruled:
            # Only rows that are kept, or squared alone, gain from being written out; sums are taken from the factors.
            unit.stored = unit.stored and (structure.keeps_rows or squares)
        self.needed = -(-structure.fitted(self.problem) // self.shards)
        if (closely or self.needed > self.budget // 16) and self.problem.all_count():
            self.problem = replace(self.problem, whole=True)
            self.needed = -(-structure.bytes(self.problem) // self.shards)
        return structure

    def _beside(self, held: int, structure: Structure, problem: Problem) -> int:
        """Of what a process holds at the end, what it may hold while a part is made."""
        return max(0, held - structure.bytes(problem) // self.shards) if held else 0

    def _built(self, kind: type[Structure]) -> Built:
        structure = self._chosen(kind)
        fits, free = self.needed <= self.budget, structure.streams and self.storage != "rows"
        later = self._products_before_rows() if fits and free else None
        if free and (later is not None or self.storage == "stream" or not fits):
            self.problem.confirm()
            return self._result(*self._streamed(structure, later))
        self._require(structure)
        groups = self._groups(structure, held=self.needed)
        if self.processes.size > 1:  # whose batches may be of different sizes: the most parts fit in all
            groups = max(self.processes.gathered(groups), key=len)
        if len(groups) == 1 and self.shards == 1:
            return self._result(*self._part(structure, self.needed))
        blocks: dict[Names, FisherOperator] = {}
        entries: list[CoverageEntry] = []
        load = [0.0] * self.shards
        for names in groups:
            _, parts, tally, _ = self._part(structure, self.needed, names, len(groups))
            entries += [self._entry(own, part) for own, part in parts.items()]
            blocks |= self._owned({own: part.operator for own, part in parts.items()}, load)
            del parts
        space = structure.space
        entries.sort(key=lambda entry: space.names.index(entry.parameters[0]))
        return Built(self._together(space, blocks), tally, Coverage(tuple(entries)), None)

    def _owned(self, blocks: dict[Names, FisherOperator], load: list[float]) -> dict[Names, FisherOperator]:
        """Those that this process keeps: of sharded ones its own, and what all have a part of."""
        if self.shards == 1:
            return blocks
        # About the operations of a decomposition, and the more of them, the more bytes.
        costs = {names: block.nbytes**1.5 for names, block in blocks.items() if block.together.size == 1}
        owner = self.processes.owners(costs, load)
        return {
            names: block
            for names, block in blocks.items()
            if owner.get(names, self.processes.rank) == self.processes.rank
        }

    def _together(self, space: ParameterSpace, blocks: dict[Names, FisherOperator]) -> FisherOperator:
        """One operator of all blocks, wherever they are."""
        ordered = dict(sorted(blocks.items(), key=lambda block: space.names.index(block[0][0])))
        if self.shards == 1:
            return BlockDiagonalOperator(space, list(ordered.values()))
        device, dtype = self.problem.plan.example_parameter.device, self.problem.plan.dtype
        common = {names: block for names, block in ordered.items() if block.together.size > 1}
        own = {names: block for names, block in ordered.items() if names not in common}
        rest = space.restrict(n for n in space.names if not any(n in names for names in common))
        parts = [ShardedOperator.of(rest, own, self.processes, dtype=dtype, device=device)] if rest.names else []
        return join(space, [*parts, *common.values()])

    def _kept(self, kind: type[Structure], keeper: PartsFile) -> Built | None:
        structure = self._chosen(kind)
        rules = [(unit.names, self.problem.plan.rule_name(unit), unit.reason) for unit in self.problem.plan.units]
        finest = max(self.processes.gathered(self._groups(structure)), key=len)
        groups = keeper.begin(finest, f"{self.problem.by_owner} {rules}")
        for names in groups if structure.in_parts else ():
            self._require(*self._restricted(structure, names))
        if len(groups) == 1 and not keeper.finished(0):
            return self._built(kind)
        made = False
        for number, names in enumerate(groups):
            if not keeper.finished(number):
                made = True
                operator, parts, tally, _ = self._part(structure, 0, names, len(groups))
                keeper.keep(number, [part.operator for part in parts.values()], self._result(operator, parts, tally))
                del operator, parts
        if not made:
            # Which compares the data with those of the parts.
            self.processes.each("reading the data", functools.partial(deque, self.problem.source, 0))
        return None

    def _foreseen(self, kind: type[Structure], to_file: bool) -> BuildPlan:
        structure = self._chosen(kind, closely=True)
        self.problem.confirm()
        held = 0 if to_file else self.needed
        streams = structure.streams and (self.needed > self.budget or self.storage == "stream")
        groups = [structure.space.names] if streams else self._groups(structure, held)
        peaks, readings, done = list[tuple[int, int, int]](), 0, 0
        for names in groups:
            own, problem = self._restricted(structure, names)
            beside = self._beside(held, own, problem) if len(groups) > 1 else 0
            times = 1 if streams else self._readings(own, problem, beside + own.peak(problem))
            readings += times
            rows = problem.row_bytes(names) * problem.examples if times < own.passes else 0
            there = min(beside, done)  # of the parts before
            peaks.append((there + own.peak(problem), there + own.summed(problem), rows))
            done += own.bytes(problem) // self.shards
        refused = ""
        try:
            if not streams and not (to_file and structure.in_parts):
                self._require(structure)
            for names in groups if to_file and structure.in_parts else ():
                self._require(*self._restricted(structure, names))
        except MemoryBudgetError as error:
            refused = str(error)
        largest = max(range(len(groups)), key=lambda i: peaks[i][0] + peaks[i][2])
        backward, seconds, memory, _ = first = self._measured(structure, groups[largest], readings, peaks[largest][2])
        most, size = 0.0, self.problem.first_size / self.problem.examples
        for i, (taken, summed, rows) in enumerate(peaks):
            # Rows that are kept share activations, and have patches as inputs; the last batch's are in its ``memory``.
            *_, memory, one = self._measured(structure, groups[i], 1, rows) if rows and i != largest else first
            kept = one / size if rows else 0.0
            most = max(most, taken + kept, summed + memory + kept * (1 - size))
        return BuildPlan(
            structure.name, tuple(groups), readings, backward, seconds, 0 if streams else self.needed,
            memory if streams else round(most), self.budget, refused,
        )  # fmt: skip

    def _measured(
        self, whole: Structure, names: Names, readings: int, keeps: int
    ) -> tuple[int | None, float | None, int, int]:  # fmt: skip
        """By a first batch: backward passes and seconds of so many readings, None where N is not known; two in bytes.

        Of some parameters: a pass's beside the sums, as activations, gradients, and what adding up takes; and those of
        the batch's rows that are kept, if any are.
        """
        structure, problem = self._restricted(whole, names)
        live, rows, fits = LiveBytes(), list[int](), structure.summed(problem) <= self.budget

        def some() -> Iterator[Chunk]:
            rows.clear()
            for chunk in itertools.islice(problem.first_chunks(), TRIED):
                rows.append(chunk.rows.count)
                yield chunk
                del chunk

        def add(chunks: Iterator[Chunk]) -> Sums | None:
            if fits:
                return structure.empty(problem).added(chunks)
            deque(chunks, 0)  # sums that are refused may not even fit the machine
            return None

        def twice() -> Iterator[Chunk]:
            yield from some()
            live.restart()  # now the sums are there
            yield from _noting(some(), noted) if keeps else some()

        noted: list[Chunk] = []
        with live:
            sums = add(twice())
        kept = live.now
        noted.clear()
        memory, kept = live.most - live.now, kept - live.now
        del sums
        start = now(structure.device)
        add(some())
        seconds, size = now(structure.device) - start, problem.first_size
        if len(rows) == TRIED:  # of perhaps many more
            more = max(1.0, size * problem.vectors_per_example / max(1, sum(rows)))
            seconds, kept = seconds * more, round(kept * more)
            memory = round(memory * more) if structure.keeps_rows and fits else memory
        examples = problem.source.expected()
        if examples is None:
            return None, None, memory, kept
        micro = -(-examples // size)
        vectors = 0 if problem.rowless else problem.backward_vectors
        return readings * micro * vectors, readings * seconds * examples / size, memory, kept

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _restricted(self, structure: Structure, names: Names) -> tuple[Structure, Problem]:
        """The structure and the problem of some layers' parameters."""
        if len(names) == len(structure.space.names):
            return structure, self.problem
        plan = self.problem.plan.restricted(names)
        return type(structure).of(plan, **self.settings), replace(self.problem, plan=plan, rowless=False, head=0)

    def _groups(self, structure: Structure, held: int = 0) -> list[Names]:
        """The parameters of each part: a layer is of the first where it fits beside what is ``held`` at the end."""

        def fits(names: Names) -> bool:
            own, problem = self._restricted(structure, names)
            return self._beside(held, own, problem) + own.peak(problem) <= self.budget

        whole = structure.space.names
        if not structure.in_parts or fits(whole):
            return [whole]
        self.problem.confirm()
        groups: list[Names] = []
        idle = self.problem.plan.unused.issuperset
        for layer in self.problem.layers():
            own = (i for i, others in enumerate(groups) if idle(others) or idle(layer) or fits((*others, *layer)))
            if (place := next(own, None)) is None:
                groups.append(layer)
            else:
                groups[place] = structure.space.restrict((*groups[place], *layer)).names
        return groups

    def _part(
        self, structure: Structure, held: int, names: Names | None = None, of: int = 1
    ) -> tuple[FisherOperator, Parts, Tally, float | None]:
        """As `_result` takes it, of some parameters, which are one of so many parts."""
        whole = self.problem
        self.counted.clear()
        if names is not None:
            whole.refuse_changed()
            structure, self.problem = self._restricted(structure, names)
            held = self._beside(held, structure, self.problem) + structure.peak(self.problem)
        try:
            most = structure.most_examples(self.problem)
            self.problem = self.problem if most is None else replace(self.problem, most_examples=most)
            sums = self._summed(structure, held, of)
            tally = Tally.of([*self.counted, Tally(rows=-sums.dropped)]).some()
            operator: FisherOperator | None = None
            try:
                with checked_together():
                    operator = structure.operator(sums, self._scale(tally))
                # What is made of rows or of a decomposition is looked at where that cannot be told from the rows.
                if may_overflow(tally.squares, structure.dtype):
                    check_finite(operator._diagonal(), f'structure="{structure.name}"')
            except NonFiniteError as error:
                if not structure.own:  # which says itself what is wrong
                    raise
                raise _overflow(structure, error, operator) from error
            if not structure.own and operator.nbytes > self.budget >= structure.bytes(self.problem):
                raise MemoryBudgetError(
                    f'structure="{structure.name}"', f"an operator of {readable(operator.nbytes)}",
                    f"at most {readable(self.budget)}, the memory budget",
                    why=f"the structure's `bytes` said {readable(structure.bytes(self.problem))}",
                    try_="`bytes` of the structure's own class",
                )  # fmt: skip
            with checked_before():
                return operator, structure.parts(sums, operator), tally, sums.dropped_share
        except BetterPlanError as found:
            if names is None:
                raise
            raise BetterPlanError(whole.plan.revised(found.plan), found.by_owner, found.batch) from found
        finally:
            self.problem = whole

    def _result(
        self, operator: FisherOperator, parts: Parts, tally: Tally | StreamedRows, share: float | None = None
    ) -> Built:
        coverage = Coverage(tuple(self._entry(names, part) for names, part in parts.items()))
        return Built(operator, tally, coverage, share)

    def _readings(self, structure: Structure, problem: Problem, taken: int) -> int:
        """How often rows are made, which are kept where they fit beside what is ``taken``; by default, few are."""
        rows = 0 if structure.keeps_rows or structure.passes == 1 else problem.row_bytes(structure.space.names)
        room = self.budget - taken
        if self.frugal and structure.passes == 2:  # with more passes, rows that are kept save more of them
            room = min(room, max(KEPT, structure.bytes(problem)))
        return structure.passes if rows == 0 or rows * problem.examples > room else 1

    def _summed(self, structure: Structure, taken: int, parts: int) -> Sums:
        """The sums of all passes over the rows, which are read again where they do not fit in memory."""
        description, empty = structure.name, structure.empty(self.problem)
        kept: list[Chunk] = []
        if structure.keeps_rows:
            compared = parts > 1 or self.problem.source.recorded
            rows = self._counted(self.problem.batches(description, compared=compared), parts)
            return self._all_reduced(lambda: empty.added(rows))
        readings = self._readings(structure, self.problem, taken)
        keep = readings < structure.passes
        chunks = self._counted(self.problem.chunks(description, compared=readings * parts > 1), readings * parts)
        sums: Sums = self._all_reduced(lambda: empty.added(_noting(chunks, kept) if keep else chunks))
        while True:
            # Of matrices that are decomposed for it, what is wrong with one is seen in the end.
            try:
                with checked_together():
                    going = structure.next_pass(sums)
            except NonFiniteError as error:
                if not structure.own:
                    raise
                raise _overflow(structure, error) from error
            if going is None:
                return sums
            del sums  # of which the next pass has what it needs
            again = kept if keep else self.problem.chunks(description)
            sums = self._all_reduced(functools.partial(going.added, again), counted=True)

    def _all_reduced(self, add: Callable[[], Sums], counted: bool = False) -> Sums:
        """What a pass adds up; of several processes, what all of them add up, and the examples of all."""
        if self.processes.size == 1:
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
            self._count_all()
        return self.processes.all_reduced(sums)

    def _count_all(self) -> None:
        """Examples, rows and dropped traces of all processes, in the order of the ranks."""
        self.counted = self.processes.gathered(Tally.of(self.counted))
        Tally.of(self.counted).some()

    def _products_before_rows(self) -> float | None:
        """How many products to make before rows that fit in memory; None to make rows at once."""
        if self.storage != "auto" or self.processes.size > 1:
            return None
        problem = self.problem
        found = products_before_rows(problem.plan, problem.vectors_per_example, problem.examples)
        if found < FEWEST:
            return None
        problem.confirm()
        return found if matrix_free(problem) else None

    def _streamed(
        self, structure: Structure, later: float | None
    ) -> tuple[FisherOperator, Parts, Tally | StreamedRows]:
        """Rows that are made anew for every product; or, after so many products, once and for all."""
        source, settled = self.problem.source, fingerprint(self.problem.plan.model)
        problem = replace(self.problem, revisable=False, weights=self.weights(), settled=settled)

        def counted() -> StreamedRows:
            streamed = StreamedRows(problem)
            self.counted.append(streamed.tally)
            return streamed

        rows: RowSource
        tally: Tally | StreamedRows
        scale: float | Callable[[], float]
        need = f"rows would take {readable(self.needed)}"
        if later is not None:
            rows = streamed = LaterRows(problem, functools.partial(self._made_later, type(structure)), later)
            for _ in source:  # so that data that change until they are used are refused
                pass
            tally, scale = streamed, lambda: self._scale(streamed.some())
            after = f"they pay from {later + 1:,.0f} products on" if later < math.inf else "products need none"
            part, reason = "full, rows later", f"{need} and are not made yet: {after}"
        else:
            rows = self.processes.each("counting", counted)
            if self.processes.size > 1:
                self._count_all()
                rows = SharedRows(rows, self.processes)
            tally = Tally.of(self.counted).some()
            part, scale = "full, streamed rows", self._scale(tally)
            fits = self.needed <= self.budget
            reason = f'{need}, storage="stream"' if fits else f"{need}, the budget is {readable(self.budget)}"
        whole = LowRankOperator(rows, scale, dtype=structure.dtype, device=structure.device, memory_budget=self.budget)
        names = (unit.names for unit in self.problem.plan.units)
        return whole, dict.fromkeys(names, Part.of(whole, part, reason)), tally

    def _made_later(self, kind_of_structure: type[Structure], streamed: StreamedRows) -> RowSource:
        """The rows that products were made without; streamed, if a batch shows that they do not fit."""
        self.storage, self.problem = "now", replace(
            self.problem, weights=self.weights(), settled=streamed.problem.settled
        )  # fmt: skip
        self.counted.clear()
        built = self.build(kind_of_structure)
        tally = built.tally.some()
        if streamed.counted is not None and streamed.counted[:2] != tally[:2]:
            raise DataError(
                "a pass over the data", f"N, R = {tally.examples:,}, {tally.rows:,}",
                f"{streamed.counted.examples:,}, {streamed.counted.rows:,}, as in the first product",
                why="rows that are made later must be of the same Fisher", try_='storage="rows"',
            )  # fmt: skip
        streamed.counted = tally
        self.rows_made(built)
        return cast(LowRankOperator, built.operator).row_source

    # -- shared --------------------------------------------------------------------------------------------------------

    def _scale(self, tally: Tally) -> float:
        return 1.0 if self.normalization == "sum" else 1.0 / tally.examples

    def _counted(self, chunks: Iterable[Chunk], readings: int = 1) -> Iterator[Chunk]:
        """Count examples, rows and dropped traces on the way; foretell first what so many readings will cost."""
        self._foretell(readings)
        for chunk in chunks:
            dropped = () if chunk.dropped is None else (chunk.dropped,)
            self.counted.append(Tally(chunk.counted, chunk.rows.count, dropped, chunk.squares))
            yield chunk
            del chunk  # not to be held while the next one is made
        if self.processes.size == 1:
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
            warn(f"{text}. Try: {self._instead()}.")

    @property
    def _many(self) -> bool:
        """Whether there are so many backward passes that it is worth knowing what they take."""
        return self.problem.backward_vectors > MANY and not self.problem.rowless

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

    def _require(self, structure: Structure, problem: Problem | None = None) -> None:
        """Refuse what does not fit; of a part, as its problem is given, what does not fit by itself."""
        needed = self.needed if problem is None else structure.bytes(problem) // self.shards
        if needed <= self.budget:
            return
        of = "" if problem is None else f" for {listed(structure.space.names, 4)} alone"
        why, try_ = "nothing has been computed yet", structure.instead.format(structure)
        found = self.problem.forecast() if self._many else None
        if found is not None:
            why += f"; {self._cost(found)}"
        if self._many and structure.keeps_rows:  # the others' results are as large for any kind
            try_ += f", or {self._instead()}"
        if structure.in_parts and problem is None:
            try_ += ", or fk.build_file, which writes part after part to a file"
        raise MemoryBudgetError(
            f'structure="{structure.name}"', f"a need of {readable(needed)}{of}",
            f"at most {readable(self.budget)}, the memory budget", why=why, try_=f"{try_}, or a larger memory_budget=",
        )  # fmt: skip

    def _entry(self, names: tuple[str, ...], part: Part) -> CoverageEntry:
        plan = self.problem.plan
        units = [unit for unit in plan.units if unit.names[0] in names]
        rules = {plan.rule_name(unit) for unit in units}
        reason = "; ".join(filter(None, (units[0].reason if part.of_rows else "", part.reason)))
        return CoverageEntry(names, ", ".join(sorted(rules)), part.structure, part.nbytes, reason)


def _overflow(structure: Structure, error: NonFiniteError, operator: FisherOperator | None = None) -> NonFiniteError:
    """What to say of sums that are not finite, of rows that are."""
    call = f'structure="{structure.name}"'
    if operator is None:
        return overflow(call, error.call, structure.dtype)
    return overflow(call, infinite(structure.space, operator._diagonal()), structure.dtype)


def _noting(chunks: Iterable[Chunk], kept: list[Chunk]) -> Iterator[Chunk]:
    """The chunks, their factored rows kept for other passes."""
    for chunk in chunks:
        slots = [slot for slot in chunk.rows.slots if isinstance(slot.rows, FactoredRows)]
        if slots:
            kept.append(replace(chunk, rows=Rows(chunk.rows.space, slots)))
        yield chunk
        del chunk, slots


class PartsFile:
    """Finished parts go to a file, which of several processes the first one makes."""

    def __init__(self, builder: Builder, make: Callable[[Callable[[], list[Any]]], io.PartsFile]) -> None:
        self.builder, self._data = builder, list[Any]()
        processes = builder.processes

        def begun() -> io.PartsFile | None:
            return make(lambda: self._data) if processes.rank == 0 else None

        self._file: Any = processes.each("build_file", begun)

    def first(self, work: Callable[[io.PartsFile], T]) -> T:
        """What the first process does with the file, and what comes of it, in all of them."""
        return self.builder.processes.by_first("build_file", lambda: work(self._file))

    def begin(self, parts: Sequence[Names], plan: str) -> Sequence[Names]:
        """As the file knows them."""
        return self.first(lambda file: file.begin(parts, plan, self.builder.budget))

    def finished(self, number: int) -> bool:
        """Whether it is in the file."""
        return self.first(lambda file: file.finished(number))

    def keep(self, number: int, blocks: Sequence[FisherOperator], built: Built) -> None:
        """Write it, with what tells the data, every process's, from others."""
        self._data = self.builder.processes.gathered(self.builder.problem.source.digests)
        self.first(lambda file: file.put(number, [state_of(block) for block in blocks], built.counted()))
