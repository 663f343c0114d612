"""One block's linear system, and which solver it gets.

(Σ_t c_t F_t + λI) δ = Σ_t c_t F_t (θ_t − θ_c), in float64. Owns the choice of the solver by a written rule; the solvers
are the operators' own. Knows neither models nor files.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.arguments import check_count
from fisherkit.errors import InvalidArgumentError, NotConvergedWarning, SingularMatrixError
from fisherkit.operators import (
    DenseOperator,
    Factorization,
    FisherOperator,
    IterativeFactorization,
    SumOperator,
    add,
)
from fisherkit.solvers import SolveInfo, relative_residual

REFINEMENTS = 5
CHUNK = 1 << 20

METHODS = ("auto", "direct", "cg")

DENSE_SIZE = 3000
"""A matrix without a direct inverse is written out and factored up to this d: d³/3 operations and 24 d² bytes, at most
a second and 216 MB; above it, conjugate gradients are cheaper."""


@dataclass(frozen=True)
class Solver:
    """How blocks are solved.

    Args:
        method: one of `METHODS`.
        tolerance: largest accepted relative residual.
        max_steps: of conjugate gradients in each block.
    """

    method: str
    tolerance: float
    max_steps: int

    def check(self, call: str) -> None:
        """Raise for settings that cannot be used.

        Raises:
            InvalidArgumentError: an unknown method, or a tolerance or number of steps out of range.
        """
        if self.method not in METHODS:
            raise InvalidArgumentError(call=call, got=f"method={self.method!r}", expected=f"one of {list(METHODS)}")
        if not 0 < self.tolerance < 1:
            raise InvalidArgumentError(call=call, got=f"tolerance={self.tolerance}", expected="0 < tolerance < 1")
        check_count(call, "max_steps", self.max_steps)

    def solve(
        self, terms: Iterable[tuple[FisherOperator, Float[Tensor, "d"]]], damping: float
    ) -> tuple[Float[Tensor, "d"], SolveInfo]:
        """δ, and how it was found.

        Args:
            terms: c_t F_t and θ_t − θ_c of each model, in float64; taken one by one.
            damping: λ.

        Raises:
            SingularMatrixError: λ is 0 and the method needs an inverse that does not exist.
            InvalidArgumentError: no terms.
        """
        total: FisherOperator | None = None
        rhs: Tensor | None = None
        for operator, difference in terms:
            product = operator.matvec(difference)
            total = operator if total is None else add(total, operator)
            rhs = product if rhs is None else rhs.add_(product)
            del operator, difference, product
        if total is None or rhs is None:
            raise InvalidArgumentError(call="merge", got="no Fisher with a weight", expected="at least one")
        if not bool(rhs.any()):
            return rhs, SolveInfo("closed_form", 0, rhs.new_zeros(1), True, damping)
        return self._solve(total, rhs, damping)

    def _solve(
        self, total: FisherOperator, rhs: Float[Tensor, "d"], damping: float
    ) -> tuple[Float[Tensor, "d"], SolveInfo]:
        if total.is_diagonal and self.method != "cg":
            return self._diagonal(total, rhs, damping)
        small = total.inversion == "iterative" and total.size <= DENSE_SIZE
        if self.method == "direct" or (self.method == "auto" and small):
            total = DenseOperator(total.space, _symmetric(total.to_dense()))
        elif self.method == "cg":
            total = SumOperator([total])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)  # said once, for all blocks, by the merge
            inverse = total.factorize(damping, tolerance=self.tolerance, max_steps=self.max_steps)
            solution, info = inverse.matvec(rhs, return_info=True)
        if not isinstance(inverse, IterativeFactorization):
            solution, info = self._refined(inverse, rhs, solution, info)
        converged = bool((info.residual <= self.tolerance).all())
        return solution, SolveInfo(info.method, info.steps, info.residual, converged, damping)

    def _refined(
        self, inverse: Factorization, rhs: Float[Tensor, "d"], solution: Float[Tensor, "d"], info: SolveInfo
    ) -> tuple[Float[Tensor, "d"], SolveInfo]:
        """Iterative refinement: Woodbury's form with little damping leaves more than rounding."""
        for _ in range(REFINEMENTS):
            if bool((info.residual <= self.tolerance).all()):
                break
            remainder = rhs - inverse.operator.matvec(solution) - inverse.damping * solution
            better = solution + inverse.matvec(remainder)
            residual = relative_residual(
                inverse.operator.matvec, better.unsqueeze(1), rhs.unsqueeze(1), damping=inverse.damping
            )
            if not bool((residual < info.residual).all()):
                break
            solution, info = better, SolveInfo(info.method, info.steps + 1, residual, True, info.damping)
        return solution, info

    def _diagonal(
        self, total: FisherOperator, rhs: Float[Tensor, "d"], damping: float
    ) -> tuple[Float[Tensor, "d"], SolveInfo]:
        shifted, solution = total.diagonal().add_(damping), torch.empty_like(rhs)
        left, whole = rhs.new_zeros(1), rhs.new_zeros(1)
        # A part at a time: a block may be an embedding of a billion entries, and each step makes a temporary.
        for start in range(0, len(rhs), CHUNK):
            part = slice(start, start + CHUNK)
            scale, right = shifted[part], rhs[part]
            # Where no Fisher says anything and nothing is damped, the limit of small damping stays at the center.
            solution[part] = torch.where(scale > 0, right / torch.where(scale > 0, scale, 1), 0)
            left += (scale * solution[part] - right).square().sum()
            whole += right.square().sum()
        residual = (left / whole).sqrt()
        return solution, SolveInfo("closed_form", 0, residual, bool((residual <= self.tolerance).all()), damping)


def singular_block(error: SingularMatrixError, names: Sequence[str]) -> SingularMatrixError:
    """The error of a block's solver in the words of a merge."""
    return SingularMatrixError(
        call="merge(damping=0)",
        got=f"a sum of Fishers that is singular in the block of {', '.join(map(repr, names[:4]))}",
        expected="a positive definite sum",
        why=f"without damping nothing says where unmeasured directions should lie ({error.why})",
        try_="damping=fk.RelativeDamping(1e-6), which leaves them at the center",
    )


def _symmetric(matrix: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    return matrix.add(matrix.mT).mul_(0.5)
