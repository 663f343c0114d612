"""Cheaper scores that are not exact, by name: queries of low rank, random projections of both sides.

Each turns solved queries X = (F + λI)⁻¹Q, layer by layer, into something smaller that still meets rows. Only layers
whose rows are kept as two factors are compressed; the rest, small or written out, stays exact. Owns the two
compressions. Knows neither data nor Fishers.
"""

from __future__ import annotations

import copy
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherkit.arguments import is_integer
from fisherkit.errors import InvalidArgumentError, InvalidTypeError
from fisherkit.influence.blocks import RowBlock
from fisherkit.operators.layer_layout import LayerLayout
from fisherkit.operators.row_forms import Bases, ColumnSolution
from fisherkit.rows.base import UnitRows, spans
from fisherkit.rows.collection import Rows
from fisherkit.rows.factored import FactoredRows


@dataclass(frozen=True)
class ApproximateScores:
    """Scores and how far off they are.

    Args:
        scores: as `InfluenceScores.scores` would have them.
        error: of each query, ‖approximate − exact‖ / ‖exact‖ over the training examples on which both were computed.
        checked: how many these are, spread evenly over the training data.
    """

    scores: Float[Tensor, "Q N"]
    error: Float[Tensor, "Q"]
    checked: int


class UnitQueries(ABC):
    """Solved queries of one unit.

    Args:
        parts: what is kept of them, along axis 0.
    """

    def __init__(self, *parts: Float[Tensor, "Q ..."]) -> None:
        self.parts = parts

    def over(self, parts: Iterable[Float[Tensor, "Q ..."]]) -> UnitQueries:
        """The same compression of other queries."""
        other = copy.copy(self)
        other.parts = tuple(parts)
        return other

    @abstractmethod
    def products(self, rows: UnitRows) -> Float[Tensor, "R Q"]:
        """With other rows."""


class Approximation(ABC):
    """A compression of solved queries.

    Args:
        size: how much is kept.
        seed: of the random numbers; the same seed gives the same scores.

    Raises:
        InvalidTypeError: no integers.
        InvalidArgumentError: a size below 1.
    """

    def __init__(self, size: int, seed: int) -> None:
        call = type(self).__name__
        for name, value in (("its size", size), ("seed", seed)):
            if not is_integer(value):
                raise InvalidTypeError(call=call, got=f"{name} of type {type(value).__name__}", expected="an integer")
        if size < 1:
            raise InvalidArgumentError(call=call, got=f"a size of {size}", expected="1 or more")
        self.size, self.seed = size, seed

    def compress(self, solution: ColumnSolution, probe: Rows) -> CompressedQueries:
        """The queries by unit.

        Args:
            solution: X.
            probe: rows of the form that those to be met will have.
        """
        units = []
        for number, slot in enumerate(probe.slots):
            columns, bases = solution.unit(probe.space, slot.names)
            units.append(self._unit(columns, bases, slot.rows, number))
        return CompressedQueries(units)

    def _unit(self, columns: Float[Tensor, "d Q"], bases: Bases | None, rows: UnitRows, number: int) -> UnitQueries:
        if not isinstance(rows, FactoredRows):
            return _ExactUnit(columns)
        layout = LayerLayout(rows.outputs, rows.inputs, rows.bias, rows.transposed)
        whole = self.size >= min(layout.outputs, layout.width)
        grid = layout.to_grid(columns) if bases is None else columns.mT.unflatten(1, (layout.outputs, layout.width))
        if whole:
            return _ExactUnit(columns if bases is None else layout.to_flat(bases[0] @ grid @ bases[1].mT))
        return self._layer(grid, bases, torch.Generator().manual_seed(self.seed + number))

    @abstractmethod
    def _layer(self, grid: Float[Tensor, "Q O J"], bases: Bases | None, generator: torch.Generator) -> UnitQueries:
        """A layer's queries as matrices from inputs, the bias's among them, to outputs; or these in other bases."""


class LowRankQueries(Approximation):
    """Each query's solution of each layer as a matrix of low rank, found by a randomized range finder.

    Halko, Martinsson and Tropp, arXiv 0909.4061, with one power iteration. A score then takes rank · (inputs + outputs)
    multiplications a layer instead of inputs · outputs. The solutions of the kfac structure are of low rank nearly
    exactly.

    Args:
        rank: of a layer's solution.
        seed: of the range finder.
    """

    def __init__(self, rank: int = 32, seed: int = 0) -> None:
        super().__init__(rank, seed)

    def _layer(self, grid: Float[Tensor, "Q O J"], bases: Bases | None, generator: torch.Generator) -> UnitQueries:
        start = torch.randn(grid.shape[2], self.size, generator=generator, dtype=torch.float64).to(grid)
        basis = torch.linalg.qr(grid @ start).Q
        basis = torch.linalg.qr(grid @ torch.linalg.qr(grid.mT @ basis).Q).Q
        sides = basis, grid.mT @ basis
        if bases is not None:
            sides = bases[0] @ sides[0], bases[1] @ sides[1]
        return _LowRankUnit(*sides)


class RandomProjection(Approximation):
    """Both sides of every layer projected to ``size`` random directions of inputs and as many of outputs.

    Training examples are then ``size²`` numbers a layer. Unbiased; the error falls as 1 / size, in relation to
    ‖x_q‖ ‖∇ℓ_n‖, and so is large for scores that are small against that (Johnson and Lindenstrauss; per layer as in
    Choe et al., arXiv 2405.13954). Layers of no more than ``size`` inputs (the bias is one) or outputs, and rows that
    are not kept as factors, are left whole: their error is 0.

    Args:
        size: random directions of each side.
        seed: of the directions.
    """

    def __init__(self, size: int = 32, seed: int = 0) -> None:
        super().__init__(size, seed)

    def _layer(self, grid: Float[Tensor, "Q O J"], bases: Bases | None, generator: torch.Generator) -> UnitQueries:
        on_outputs, on_inputs = (
            (torch.randn(width, self.size, generator=generator, dtype=torch.float64) / self.size**0.5).to(grid)
            for width in grid.shape[1:]
        )
        left, right = on_outputs.mT, on_inputs
        if bases is not None:
            left, right = left @ bases[0], bases[1].mT @ right
        return _ProjectedUnit(on_inputs, on_outputs, (left @ grid @ right).flatten(1))


class CompressedQueries:
    """Solved queries of all units.

    Args:
        units: in the order of the rows' slots.
    """

    def __init__(self, units: Sequence[UnitQueries]) -> None:
        self.units = units

    def products(self, rows: Rows) -> Float[Tensor, "R Q"]:
        """With other rows."""
        products = (unit.products(slot.rows) for unit, slot in zip(self.units, rows.slots, strict=True))
        return functools.reduce(torch.Tensor.add_, products)

    def room(self, queries: int) -> CompressedQueries:
        """So many of this form, all 0; memory that is taken at once does not fall to pieces."""
        return CompressedQueries(
            [unit.over(part.new_zeros(queries, *part.shape[1:]) for part in unit.parts) for unit in self.units]
        )

    @property
    def bytes_per_query(self) -> int:
        """What one query takes."""
        parts = [part for unit in self.units for part in unit.parts]
        return sum(part.element_size() * math.prod(part.shape[1:]) for part in parts)

    def put(self, places: Int[Tensor, "q"], others: CompressedQueries) -> None:
        """Others in the place of some of these."""
        for mine, theirs in zip(self.units, others.units, strict=True):
            for whole, part in zip(mine.parts, theirs.parts, strict=True):
                whole[places] = part

    def first(self, queries: int) -> CompressedQueries:
        """So many of them."""
        return CompressedQueries([unit.over(part[:queries] for part in unit.parts) for unit in self.units])


@dataclass(frozen=True)
class CompressedGroup:
    """Some neighbouring queries.

    Args:
        queries: one an example; 0 where no label counts.
        error: of each, as `ApproximateScores` has it.
    """

    queries: CompressedQueries
    error: Float[Tensor, "Q"]


def compressed_groups(
    solutions: Iterable[tuple[RowBlock, ColumnSolution]],
    count: int,
    approximation: Approximation,
    sample: Rows,
    most_bytes: int,
) -> Iterator[CompressedGroup]:
    """All queries, compressed, in groups of at most so many bytes.

    Args:
        solutions: blocks of queries, solved.
        count: of all queries.
        approximation: compresses them.
        sample: rows on which the error is measured.
        most_bytes: of a group; one block of queries there is at least.
    """
    whole: CompressedQueries | None = None
    errors = torch.empty(0)
    size = held = 0
    for block, solution in solutions:
        compressed = approximation.compress(solution, sample)
        exact = solution.products(sample).double()
        error = (compressed.products(sample) - exact).norm(dim=0) / exact.norm(dim=0)
        del solution, exact  # not to be held while a group meets the training rows
        if whole is not None and held + block.size > size:
            yield CompressedGroup(whole.first(held), errors[:held])
            whole, held = None, 0
        if whole is None:
            size = max(block.size, min(count, most_bytes // max(1, compressed.bytes_per_query)))
            whole, errors = compressed.room(size), error.new_zeros(size)
        whole.put(held + block.owner, compressed)
        errors[held + block.owner] = error.nan_to_num(0.0)
        held, count = held + block.size, count - block.size
    if whole is not None:
        yield CompressedGroup(whole.first(held), errors[:held])


class _ExactUnit(UnitQueries):
    def __init__(self, columns: Float[Tensor, "d Q"]) -> None:
        super().__init__(columns.mT)

    def products(self, rows: UnitRows) -> Float[Tensor, "R Q"]:
        return rows.matmul(self.parts[0].mT)


class _LowRankUnit(UnitQueries):
    """On outputs ``[Q, O, k]``, and on inputs ``[Q, J, k]``."""

    def products(self, rows: UnitRows) -> Float[Tensor, "R Q"]:
        rows, found = _factored(rows), []
        queries, _, rank = self.parts[0].shape
        for span in spans(queries, 8 * rows.count * rows.positions * rank):
            on_outputs, on_inputs = (side[span].movedim(0, 1).flatten(1) for side in self.parts)
            met = []
            for turned in rows.rotated(on_inputs, on_outputs):
                a = turned.activations[:] if turned.example is None else turned.activations[turned.example]
                met.append((turned.gradients * a).sum(1).unflatten(1, (-1, rank)).sum(2))
            found.append(torch.cat(met))
        return torch.cat(found, 1)


class _ProjectedUnit(UnitQueries):
    def __init__(
        self, on_inputs: Float[Tensor, "J p"], on_outputs: Float[Tensor, "O p"], queries: Float[Tensor, "Q d"]
    ) -> None:
        super().__init__(queries)
        self._on_inputs, self._on_outputs = on_inputs, on_outputs

    def products(self, rows: UnitRows) -> Float[Tensor, "R Q"]:
        turned = _factored(rows).rotated(self._on_inputs, self._on_outputs)
        return torch.cat([part.dense() @ self.parts[0].mT for part in turned])


def _factored(rows: UnitRows) -> FactoredRows:
    assert isinstance(rows, FactoredRows)  # noqa: S101  (a plan keeps a unit's rows in one way)
    return rows
