"""(s · JJᵀ + λI)⁻¹ of rows J: what Woodbury's identity and updates in the rows' span, Jᵀ(JJᵀ + λI)⁻¹c, are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.errors import SingularMatrixError
from fisherkit.rows.collection import Rows
from fisherkit.rows.shared import SharedRows

PRECISE = 1e-2
"""Rounding in a solution from which on inner products are multiplied in float64."""


@dataclass(frozen=True)
class DampedGram:
    """s · JJᵀ + λI, R × R, by its lower Cholesky factor, float64; ``rounding`` is what it leaves of a solution."""

    factor: Float[Tensor, "R R"]
    rounding: float
    precise: bool

    def solve(self, w: Float[Tensor, "R K"]) -> Float[Tensor, "R K"]:
        """(s · JJᵀ + λI)⁻¹ W, float64."""
        return torch.cholesky_solve(w.double(), self.factor)

    def logdet(self) -> Float[Tensor, ""]:
        """log det(s · JJᵀ + λI)."""
        return 2 * self.factor.diagonal().log().sum()


def rounding_of(dtype: torch.dtype, largest: float, damping: float) -> float:
    """What rounding leaves of a solution, relative to it; from the Gram's largest eigenvalue."""
    return torch.finfo(dtype).eps * (1 + largest / damping) if damping else math.inf


def damped_grams(
    parts: Sequence[Rows | SharedRows], damping: float, *, scale: float = 1.0, precise: bool = False, call: str,
    try_: str,
) -> list[DampedGram]:  # fmt: skip
    """Of the rows of every part, in float32 or float64; one wait for the device, however many there are.

    Inner products are multiplied in float64 at once (``precise``), or only where λ does not hide rounding, or where
    without it there is no factor.

    Raises:
        SingularMatrixError: there is no factor at all.
    """
    grams = [_products(part, precise, scale) for part in parts]
    # Bounds of the eigenvalues.
    largest = [torch.linalg.vector_norm(gram, 1, 1).max() if len(gram) else gram.sum() for gram in grams]
    tried = [damped_cholesky(gram, damping) for gram in grams]
    read = torch.stack([*largest, *(failed.double() for _, failed in tried)]).tolist()
    found = []
    for part, (factor, _), size, failed in zip(parts, tried, read[: len(parts)], read[len(parts) :], strict=True):
        rounding, exact = rounding_of(part.dtype, size, damping), precise or part.dtype == torch.float64
        if not exact and (rounding >= PRECISE or failed):
            exact = True
            factor, again = damped_cholesky(_products(part, True, scale), damping)
            failed = float(again)
        if failed:
            raise SingularMatrixError(
                call, "a Gram matrix that is singular to working precision", "a positive definite one",
                why="the rows are linearly dependent, as repeated examples are, and the damping is below rounding",
                try_=try_,
            )  # fmt: skip
        found.append(DampedGram(factor, rounding, exact))
    return found


def _products(rows: Rows | SharedRows, precise: bool, scale: float) -> Float[Tensor, "R R"]:
    """s · JJᵀ, of which a factor reads one half."""
    found = rows.cross_gram(rows, precise) if isinstance(rows, Rows) else rows.gram(precise)
    return found if scale == 1 else found.mul_(scale)


def damped_cholesky(matrix: Float[Tensor, "n n"], damping: float | Tensor) -> tuple[Float[Tensor, "n n"], Tensor]:
    """Of A + λI, made in A's memory; the second is 0 where there is a factor."""
    matrix.diagonal().add_(damping)
    return torch.linalg.cholesky_ex(matrix)
