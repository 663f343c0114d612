"""rᵀ(F + λI)⁻¹r' between many rows: what an inverse needs to know of rows, and the way that works for all.

A `RowProducts` is the bilinear map of a damped inverse, ready for rows; it takes one side (queries) once and meets the
other in blocks. Inverses with something better than solving for the queries supply it (`Factorization._row_products`).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.rows.base import spans
from fisherkit.rows.collection import Rows
from fisherkit.space import ParameterSpace

Part: TypeAlias = tuple[tuple[str, ...], Tensor]
"""Names of a unit's parameters, and its summand ``[R, Q]``."""

Bases: TypeAlias = tuple[Tensor, Tensor]
"""U_G ``[O, O]`` and U_A ``[I, I]``, or ``[I+1, I+1]`` with a bias, orthogonal."""


class RowSolution(ABC):
    """(F + λI)⁻¹ applied to the queries' rows, as meeting other rows needs it."""

    @abstractmethod
    def parts(self, rows: Rows) -> Iterator[Part]:
        """rᵀ(F + λI)⁻¹q of rows r and queries q, cut along r's units: Σ over them is `products`."""

    def products(self, rows: Rows) -> Float[Tensor, "R Q"]:
        """rᵀ(F + λI)⁻¹q."""
        return functools.reduce(torch.add, (part for _, part in self.parts(rows)))

    def unit(self, space: ParameterSpace, names: tuple[str, ...]) -> tuple[Float[Tensor, "d Q"], Bases | None]:
        """A unit's part X of (F + λI)⁻¹Q; with bases, W of X = (U_G ⊗ U_A) W. Not of all."""
        raise NotImplementedError(f"{type(self).__name__} has no solutions by unit")


class RowProducts(ABC):
    """The map r, q ↦ rᵀ(F + λI)⁻¹q.

    Args:
        kept: how many numbers a solution holds for one query.
        passing: how many more its making holds.
    """

    def __init__(self, kept: int, passing: int) -> None:
        self.kept, self.passing = kept, passing

    @property
    def numbers_per_query(self) -> int:
        """At most, at one time."""
        return self.kept + self.passing

    @abstractmethod
    def solve(self, queries: Rows) -> RowSolution:
        """The queries' side."""


class SolvedProducts(RowProducts):
    """Solutions for the queries, ``[D, Q]`` by ``solve``, then products with the other rows as they are kept."""

    def __init__(self, solve: Callable[[Rows], Tensor], size: int) -> None:
        super().__init__(size, 3 * size)  # beside the solution the row, and a solver's two temporaries
        self._solve = solve

    def solve(self, queries: Rows) -> Solved:
        """Solve for all queries at once."""
        return Solved(self._solve(queries))


class Solved(RowSolution):
    """Columns X = (F + λI)⁻¹Q."""

    def __init__(self, columns: Float[Tensor, "D Q"]) -> None:
        self.columns = columns

    def parts(self, rows: Rows) -> Iterator[Part]:
        """Products of the other rows with the solutions, unit by unit."""
        yield from rows.matmul_by_unit(self.columns)

    def unit(self, space: ParameterSpace, names: tuple[str, ...]) -> tuple[Float[Tensor, "d Q"], None]:
        """The unit's part of the solutions, written out."""
        return space.take(self.columns, names), None


class BlockProducts(RowProducts):
    """Sums of others, one for each part of the parameters."""

    def __init__(self, parts: Sequence[tuple[ParameterSpace, RowProducts]]) -> None:
        super().__init__(sum(part.kept for _, part in parts), max(part.passing for _, part in parts))
        self._parts = parts

    def solve(self, queries: Rows) -> RowSolution:
        """Solve for the queries block by block."""
        return _BlockSolution([(space, part.solve(queries.restrict(space))) for space, part in self._parts])


class _BlockSolution(RowSolution):
    def __init__(self, solutions: Sequence[tuple[ParameterSpace, RowSolution]]) -> None:
        self._solutions = solutions

    def parts(self, rows: Rows) -> Iterator[Part]:
        for space, solution in self._solutions:
            yield from solution.parts(rows.restrict(space))

    def products(self, rows: Rows) -> Float[Tensor, "R Q"]:
        found = (solution.products(rows.restrict(space)) for space, solution in self._solutions)
        return functools.reduce(torch.add, found)

    def unit(self, space: ParameterSpace, names: tuple[str, ...]) -> tuple[Float[Tensor, "d Q"], Bases | None]:
        own, solution = next((own, solution) for own, solution in self._solutions if names[0] in own.names)
        return solution.unit(own, names)


def solved_squares(solve: Callable[[Tensor], Tensor], rows: Rows) -> Float[Tensor, "R"]:
    """rᵀ(F + λI)⁻¹r of each row by solves, a few rows at a time; float64."""
    parts = []
    for span in spans(rows.count, 4 * rows.space.size):
        columns = rows.some(span).dense().mT
        parts.append((columns.double() * solve(columns).double()).sum(0))
    return torch.cat(parts)


def aligned(spaces: Sequence[ParameterSpace], rows: Rows) -> bool:
    """Whether every unit of the rows lies in one of the spaces."""
    home = {name: i for i, space in enumerate(spaces) for name in space.names}
    return all(len({home[name] for name in slot.names}) == 1 for slot in rows.slots)
