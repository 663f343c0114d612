"""A reusable inverse of F + λI: what `FisherOperator.factorize` returns.

Two hooks: a solve on columns and a log determinant; more, about rows, have defaults that need only the solve. A
`RowProducts` is rᵀ(F + λI)⁻¹r' between many rows; it takes one side (queries) once and meets the other in blocks.
Inverses with something better than solving for the queries supply it (`Factorization._row_products`).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, final, overload

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.arguments import check_count, check_type
from fisherkit.arithmetic import MatMat, without_autocast
from fisherkit.rows.base import spans
from fisherkit.rows.collection import Rows
from fisherkit.solvers import SolveInfo, conjugate_gradient, relative_residual
from fisherkit.space import ParameterSpace, Vector

if TYPE_CHECKING:
    from fisherkit.operators.base import FisherOperator


UnitSummand: TypeAlias = tuple[tuple[str, ...], Tensor]
"""Names of a unit's parameters, and its summand ``[R, Q]``."""

Bases: TypeAlias = tuple[Tensor, Tensor]
"""U_G ``[O, O]`` and U_A ``[I, I]``, or ``[I+1, I+1]`` with a bias, orthogonal."""


class RowSolution(ABC):
    """(F + λI)⁻¹ applied to the queries' rows, as meeting other rows needs it."""

    @abstractmethod
    def parts(self, rows: Rows) -> Iterator[UnitSummand]:
        """rᵀ(F + λI)⁻¹q of rows r and queries q, cut along r's units: Σ over them is `products`."""

    def products(self, rows: Rows) -> Float[Tensor, "R Q"]:
        """rᵀ(F + λI)⁻¹q."""
        return functools.reduce(torch.add, (part for _, part in self.parts(rows)))

    def unit(self, space: ParameterSpace, names: tuple[str, ...]) -> tuple[Float[Tensor, "d Q"], Bases | None]:
        """A unit's part X of (F + λI)⁻¹Q; with bases, W of X = (U_G ⊗ U_A) W. Not of all."""
        raise NotImplementedError(f"{type(self).__name__} has no solutions by unit")


class RowProducts:
    """The map r, q ↦ rᵀ(F + λI)⁻¹q: ``solve`` makes the queries' side.

    Of one query a solution holds ``held`` numbers, and its making ``passing`` more.
    """

    solve: Callable[[Rows], RowSolution]

    def __init__(self, held: int, passing: int) -> None:
        self.held, self.passing, self.numbers_per_query = held, passing, held + passing


class SolvedProducts(RowProducts):
    """Solutions for the queries, ``[D, Q]`` by ``solve``, then products with the other rows as they are kept."""

    def __init__(self, solve: Callable[[Rows], Tensor], size: int) -> None:
        super().__init__(size, 3 * size)  # beside the solution the row, and a solver's two temporaries
        self.solve = lambda queries: _Solved(solve(queries))


@dataclass(frozen=True)
class _Solved(RowSolution):
    """Columns X = (F + λI)⁻¹Q."""

    columns: Float[Tensor, "D Q"]

    def parts(self, rows: Rows) -> Iterator[UnitSummand]:
        yield from rows.matmul_by_unit(self.columns)

    def unit(self, space: ParameterSpace, names: tuple[str, ...]) -> tuple[Float[Tensor, "d Q"], None]:
        return space.take(self.columns, names), None


class BlockProducts(RowProducts):
    """Sums of others, one for each part of the parameters."""

    def __init__(self, parts: Sequence[tuple[ParameterSpace, RowProducts]]) -> None:
        super().__init__(sum(part.held for _, part in parts), max(part.passing for _, part in parts))
        self._parts = parts
        self.solve = lambda queries: _BlockSolution([(own, one.solve(queries.restrict(own))) for own, one in parts])


@dataclass(frozen=True)
class _BlockSolution(RowSolution):
    solutions: Sequence[tuple[ParameterSpace, RowSolution]]

    def parts(self, rows: Rows) -> Iterator[UnitSummand]:
        for space, solution in self.solutions:
            yield from solution.parts(rows.restrict(space))

    def products(self, rows: Rows) -> Float[Tensor, "R Q"]:
        found = (solution.products(rows.restrict(space)) for space, solution in self.solutions)
        return functools.reduce(torch.add, found)

    def unit(self, space: ParameterSpace, names: tuple[str, ...]) -> tuple[Float[Tensor, "d Q"], Bases | None]:
        own, solution = next((own, solution) for own, solution in self.solutions if names[0] in own.names)
        return solution.unit(own, names)


def aligned(spaces: Sequence[ParameterSpace], rows: Rows) -> bool:
    """Whether every unit of the rows lies in one of the spaces."""
    home = {name: i for i, space in enumerate(spaces) for name in space.names}
    return all(len({home[name] for name in slot.names}) == 1 for slot in rows.slots)


# -- inverses ----------------------------------------------------------------------------------------------------------


DIRECT_TOLERANCE = 1e-3  # a direct solve that leaves more than this is reported as not converged


class Factorization(ABC):
    """(F + λI)⁻¹, ready to be applied many times; the damping λ is already a number."""

    method = "direct"

    def __init__(self, operator: FisherOperator, damping: float) -> None:
        self.operator = operator
        self.damping = damping

    def __repr__(self) -> str:
        return f"<inverse of {self.operator!r} + {self.damping:g} I, {self.method}>"

    @abstractmethod
    def _solve(self, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        """(F + λI)⁻¹ V."""

    @abstractmethod
    def _logdet(self) -> Float[Tensor, ""]:
        """log det(F + λI)."""

    def _row_products(self, probe: Rows, queries: int, others: int) -> RowProducts:
        """rᵀ(F + λI)⁻¹q in the way that is cheapest for so many queries and other rows."""
        return SolvedProducts(self._solve_rows, self.operator.size)

    def _unit_products(self, probe: Rows) -> RowProducts:
        """The same with solutions that can be had by units."""
        return SolvedProducts(self._solve_rows, self.operator.size)

    def _solve_rows(self, queries: Rows) -> Float[Tensor, "D Q"]:
        """(F + λI)⁻¹Qᵀ of rows Q."""
        return self._solve(queries.dense().mT)

    def _row_squares(self, rows: Rows) -> Float[Tensor, "R"]:
        """rᵀ(F + λI)⁻¹r of each row; by solves a few rows at a time, and float64."""
        parts = []
        for span in spans(rows.count, 4 * rows.space.size):
            columns = rows.some(span).dense().mT
            parts.append((columns.double() * self._solve(columns).double()).sum(0))
        return torch.cat(parts)

    def _solve_with_info(
        self, columns: Float[Tensor, "D K"], checkpoint: Path | None = None, *, progress: bool = False
    ) -> tuple[Float[Tensor, "D K"], SolveInfo]:
        """The solution and a report; what is done in one go has no progress to show, and no place to go on from."""
        solution = self._solve(columns)
        relative = relative_residual(self.operator._matmat, solution, columns, damping=self.damping)
        converged = bool((relative <= DIRECT_TOLERANCE).all())
        return solution, SolveInfo(self.method, 0, relative, converged, self.damping)

    @overload
    def matvec(self, v: Vector, *, return_info: Literal[False] = ...) -> Vector: ...
    @overload
    def matvec(self, v: Vector, *, return_info: Literal[True]) -> tuple[Vector, SolveInfo]: ...
    @final
    @without_autocast()
    def matvec(self, v: Vector, *, return_info: bool = False) -> Vector | tuple[Vector, SolveInfo]:
        """(F + λI)⁻¹ v.

        Args:
            v: as in `FisherOperator.matvec`.
            return_info: also return method, steps, relative residual per column and whether it converged; costs one
                product with F for direct methods.

        Returns:
            The solution in v's form and the operator's dtype, or a pair with its `SolveInfo`.
        """
        columns, restore = self.operator._columns(v, "factorize().matvec")
        if not return_info:
            return restore(self._solve(columns) if columns.shape[1] else columns.clone())
        solution, info = self._solve_with_info(columns)
        return restore(solution), info

    @final
    def __matmul__(self, v: Vector) -> Vector:
        return self.matvec(v)

    @final
    @without_autocast()
    def logdet(self) -> Float[Tensor, ""]:
        """log det(F + λI), float64.

        Raises:
            NoClosedFormError: the inverse is iterative.
        """
        return self._logdet()

    @final
    @without_autocast()
    def sample(
        self, generator: torch.Generator | None = None, n: int | None = None
    ) -> Float[Tensor, "D"] | Float[Tensor, "D n"]:
        """One draw from N(0, (F + λI)⁻¹), the Laplace posterior around the parameters, or n of them in columns.

        Perturb and solve: if b ~ N(0, F + λI) then (F + λI)⁻¹ b has covariance (F + λI)⁻¹, whatever the structure.

        Args:
            generator: source of randomness on the operator's device; None draws from torch's global one.
            n: how many independent draws; None for one, as a vector.

        Returns:
            ``[D]``, or ``[D, n]`` (columns last), in the operator's dtype. The same seed and n give the same draws; n
            draws of one call are not those of n calls. Several processes all get the draws that one process gets,
            but with ``shard=True``, and of a "block" whose processes keep rows where one keeps a matrix: these draw
            from other numbers, the same in all processes.

        Raises:
            InvalidTypeError, InvalidArgumentError: n is not a positive integer, or the generator not a torch.Generator.

        Cost: one solve with n columns, and n products with a root of F, for which rows that are streamed from the data
            take one pass.
        """
        operator, count = self.operator, 1 if n is None else n
        call, advice = f"{operator._name}.factorize().sample", "torch.Generator().manual_seed(0)"

        def check() -> None:
            check_type(call, "generator", generator, torch.Generator | None, "a torch.Generator or None", try_=advice)
            check_count(call, "n", count)

        operator.together.each(call, check)
        noise = torch.randn(operator.size, count, dtype=operator.dtype, device=operator.device, generator=generator)
        draws = self._solve(self.damping**0.5 * noise + operator._draw(generator, count))
        return draws.squeeze(-1) if n is None else draws


class DirectFactorization(Factorization):
    """(F + λI)⁻¹ by functions that solve for columns and that give the log determinant."""

    def __init__(
        self, operator: FisherOperator, damping: float, solve: Callable[[Tensor], Tensor], logdet: Callable[[], Tensor]
    ) -> None:
        super().__init__(operator, damping)
        self._inverse, self._log_determinant = solve, logdet

    def _solve(self, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        return self._inverse(columns)

    def _logdet(self) -> Float[Tensor, ""]:
        return self._log_determinant()


class IterativeFactorization(Factorization):
    """(F + λI)⁻¹ by conjugate gradients; every solve runs anew.

    Args:
        operator: F.
        damping: λ.
        tolerance: relative residual at which to stop.
        max_steps: at most this many products.
    """

    method = "conjugate_gradient"

    def __init__(self, operator: FisherOperator, damping: float, tolerance: float, max_steps: int | None) -> None:
        super().__init__(operator, damping)
        self.tolerance, self.max_steps = tolerance, max_steps

    @cached_property
    def preconditioner(self) -> MatMat | None:
        """The operator's approximate inverse, made when it is needed: that may take a pass over the data."""
        return self.operator._approximate_inverse(self.damping)

    def _solve(self, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        return self._solve_with_info(columns)[0]

    def _solve_with_info(
        self, columns: Float[Tensor, "D K"], checkpoint: Path | None = None, *, progress: bool = False
    ) -> tuple[Float[Tensor, "D K"], SolveInfo]:
        return conjugate_gradient(
            self.operator._matmat, columns, damping=self.damping, preconditioner=self.preconditioner,
            tolerance=self.tolerance, max_steps=self.max_steps, progress=progress, checkpoint=checkpoint,
        )  # fmt: skip

    def _logdet(self) -> Float[Tensor, ""]:
        raise self.operator._no_closed_form(
            "logdet", "it is solved iteratively", "fk.estimators.lanczos_logdet(fisher, damping=...)"
        )


def diagonal_inverse(operator: FisherOperator, damping: float) -> MatMat:
    """Product with the inverse of the diagonal of F + λI, the default preconditioner."""
    diagonal = operator._diagonal() + damping
    # Parameters that F does not touch have diagonal 0; with damping 0 they stay as they are.
    scale = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).reciprocal().unsqueeze(-1)
    return scale.mul
