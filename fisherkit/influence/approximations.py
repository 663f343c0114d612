"""Cheaper scores that are not exact: solved queries kept as matrices of low rank, layer by layer.

Only layers whose rows are kept as two factors are compressed; the rest, small or written out, stays exact. Knows
neither data nor Fishers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.arguments import check_count, check_number
from fisherkit.influence.blocks import RowBlock
from fisherkit.operators.factorization import Bases, RowSolution
from fisherkit.operators.layer_layout import LayerLayout
from fisherkit.rows.base import UnitRows, spans
from fisherkit.rows.collection import Rows
from fisherkit.rows.factored import FactoredRows


@dataclass(frozen=True)
class UnitQueries:
    """A unit's solved queries.

    Args:
        parts: as they are, ``[Q, d]``; or of low rank, on outputs ``[Q, O, k]`` and on inputs ``[Q, J, k]``.
        layout: of the layer, where they are of low rank.
    """

    parts: tuple[Float[Tensor, "Q ..."], ...]
    layout: LayerLayout | None = None

    def products(self, rows: UnitRows) -> Float[Tensor, "R Q"]:
        """With other rows."""
        if self.layout is None:
            return rows.matmul(self.parts[0].mT)
        if not isinstance(rows, FactoredRows):  # a batch's were made the slow way
            return rows.matmul(self.layout.to_flat(self.parts[0] @ self.parts[1].mT))
        found = []
        queries, _, rank = self.parts[0].shape
        for span in spans(queries, 8 * rows.count * rows.positions * rank):
            on_outputs, on_inputs = (side[span].movedim(0, 1).flatten(1) for side in self.parts)
            met = []
            for turned in rows.rotated(on_inputs, on_outputs):
                a = turned.activations[:] if turned.example is None else turned.activations[turned.example]
                met.append((turned.gradients * a).sum(1).unflatten(1, (-1, rank)).sum(2))
            found.append(torch.cat(met))
        return torch.cat(found, 1)


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


class LowRankQueries:
    """Each query's solution of each layer as a matrix of low rank, found by a randomized range finder.

    Halko, Martinsson and Tropp, arXiv 0909.4061, with one power iteration. A score then takes rank · (inputs + outputs)
    multiplications a layer instead of inputs · outputs. The solutions of the kfac structure are of low rank nearly
    exactly.

    Args:
        rank: of a layer's solution.
        seed: of the range finder; the same seed gives the same scores.

    Raises:
        InvalidArgumentError: rank is below 1.
        InvalidTypeError: rank or seed is no integer.
    """

    def __init__(self, rank: int = 32, seed: int = 0) -> None:
        self.rank = check_count("LowRankQueries", "rank", rank)
        self.seed = check_number("LowRankQueries", "seed", seed, least=-math.inf, integer=True)

    def compress(self, solution: RowSolution, probe: Rows) -> CompressedQueries:
        """Solved queries by unit, for rows of the form that the probe has."""
        units = []
        for number, slot in enumerate(probe.slots):
            columns, bases = solution.unit(probe.space, slot.names)
            units.append(self._unit(columns, bases, slot.rows, number))
        return CompressedQueries(units)

    def _unit(self, columns: Float[Tensor, "d Q"], bases: Bases | None, rows: UnitRows, number: int) -> UnitQueries:
        if not isinstance(rows, FactoredRows):
            return UnitQueries((columns.mT,))
        layout = LayerLayout(rows.outputs, rows.inputs, rows.bias, rows.transposed)
        grid = layout.to_grid(columns) if bases is None else columns.mT.unflatten(1, (layout.outputs, layout.width))
        if self.rank >= min(layout.outputs, layout.width):
            whole = columns if bases is None else layout.to_flat(bases[0] @ grid @ bases[1].mT)
            return UnitQueries((whole.mT,))
        generator = torch.Generator().manual_seed(self.seed + number)
        start = torch.randn(grid.shape[2], self.rank, generator=generator, dtype=torch.float64).to(grid)
        basis = torch.linalg.qr(grid @ start).Q
        basis = torch.linalg.qr(grid @ torch.linalg.qr(grid.mT @ basis).Q).Q
        sides = basis, grid.mT @ basis
        return UnitQueries(sides if bases is None else (bases[0] @ sides[0], bases[1] @ sides[1]), layout)


class CompressedQueries:
    """Solved queries of all units, in the order of the rows' slots."""

    def __init__(self, units: Sequence[UnitQueries]) -> None:
        self.units = units

    def products(self, rows: Rows) -> Float[Tensor, "R Q"]:
        """With other rows."""
        products = (unit.products(slot.rows) for unit, slot in zip(self.units, rows.slots, strict=True))
        return functools.reduce(torch.Tensor.add_, products)

    @property
    def tensors(self) -> list[Float[Tensor, "Q ..."]]:
        """All that they are made of."""
        return [part for unit in self.units for part in unit.parts]

    def of(self, tensors: Iterable[Float[Tensor, "Q ..."]]) -> CompressedQueries:
        """Queries made of other tensors, which are in the order and of the kinds of this object's `tensors`."""
        own = iter(tensors)
        return CompressedQueries([UnitQueries(tuple(next(own) for _ in u.parts), u.layout) for u in self.units])


def compressed_groups(
    solutions: Iterable[tuple[RowBlock, RowSolution]], count: int, approximation: LowRankQueries, sample: Rows,
    most_bytes: int,
) -> Iterator[tuple[CompressedQueries, Float[Tensor, "Q"]]]:  # fmt: skip
    """All queries, compressed, in groups of neighbours of at most so many bytes, and the error of each query.

    A group has one block of queries at least; the error is measured on the sample, and 0 of queries without a label
    that counts.
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
            yield whole.of(part[:held] for part in whole.tensors), errors[:held]
            whole, held = None, 0
        if whole is None:
            each = sum(part.element_size() * math.prod(part.shape[1:]) for part in compressed.tensors)
            size = max(block.size, min(count, most_bytes // max(1, each)))
            # Memory that is taken at once does not fall to pieces.
            whole = compressed.of(part.new_zeros(size, *part.shape[1:]) for part in compressed.tensors)
            errors = error.new_zeros(size)
        for kept, part in zip((*whole.tensors, errors), (*compressed.tensors, error.nan_to_num(0.0)), strict=True):
            kept[held + block.owner] = part
        held, count = held + block.size, count - block.size
    if whole is not None:
        yield whole.of(part[:held] for part in whole.tensors), errors[:held]
