"""(s · JJᵀ + λI)⁻¹ of rows J: what Woodbury's identity and updates in the rows' span, Jᵀ(JJᵀ + λI)⁻¹c, are made of."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.errors import SingularMatrixError
from fisherkit.operators.linalg import damped_cholesky, singular
from fisherkit.rows.collection import Rows

PRECISE = 1e-2
"""Rounding in a solution from which on inner products are multiplied in float64."""


def rounding_of(dtype: torch.dtype, largest: float, damping: float) -> float:
    """What rounding leaves of a solution, relative to it; from the Gram's largest eigenvalue."""
    return torch.finfo(dtype).eps * (1 + largest / damping)


class DampedGram:
    """The Cholesky factor of s · JJᵀ + λI, R × R, in float64.

    Args:
        rows: J, in float32 or float64.
        scale: s.
        damping: λ > 0.
        call: for the error.
        precise: whether inner products are multiplied in float64; None for where λ does not hide their rounding, and
            where without it there is no factor.

    Raises:
        SingularMatrixError: rounding leaves no factor.
    """

    def __init__(self, rows: Rows, scale: float, damping: float, call: str, *, precise: bool | None = None) -> None:
        exact = rows.dtype == torch.float64
        gram = rows.gram(precise=bool(precise)).mul_(scale)
        # The largest row sum bounds the largest eigenvalue.
        self.rounding = rounding_of(rows.dtype, float(gram.abs().sum(1).max()) if len(gram) else 0.0, damping)
        self.precise = bool(precise) or exact
        factor = None if not self.precise and self.rounding >= PRECISE else damped_cholesky(gram, damping)
        if factor is None and not self.precise:
            del gram
            self.precise, factor = True, damped_cholesky(rows.gram(precise=True).mul_(scale), damping)
        if factor is None:
            why = "the rows are linearly dependent and the damping is below rounding"
            raise SingularMatrixError(**singular(call, damping, why))
        self.factor = factor

    def solve(self, w: Float[Tensor, "R K"]) -> Float[Tensor, "R K"]:
        """(s · JJᵀ + λI)⁻¹ W, float64."""
        return torch.cholesky_solve(w.double(), self.factor)

    def logdet(self) -> Float[Tensor, ""]:
        """log det(s · JJᵀ + λI)."""
        return 2 * self.factor.diagonal().log().sum()
