"""A Fisher matrix written out, with its Cholesky factor for solves and its spectrum for all else, both in float64."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherkit import io
from fisherkit.operators.base import FisherOperator
from fisherkit.operators.factorization import DirectFactorization, Factorization
from fisherkit.operators.linalg import (
    Spectrum,
    check_symmetric,
    check_tensor,
    damped_reciprocal,
    nearest_semidefinite,
    singular,
    spectrum,
)
from fisherkit.space import ParameterSpace


class DenseOperator(FisherOperator):
    """F as a D × D matrix.

    Args:
        space: the parameters it acts on.
        matrix: F [D, D], symmetric positive semi-definite and finite; its dtype and device are the operator's.
            Kept, not copied.
    """

    tag: ClassVar[str] = "dense"

    def __init__(self, space: ParameterSpace, matrix: Float[Tensor, "..."]) -> None:
        call = "DenseOperator(matrix)"
        matrix = check_symmetric(check_tensor(matrix, [space.size, space.size], call), call)
        super().__init__(space, dtype=matrix.dtype, device=matrix.device)
        self._matrix = matrix

    @cached_property
    def _spectrum(self) -> Spectrum:
        return spectrum(self._matrix, "DenseOperator(matrix)")

    def _matmat(self, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        return self._matrix @ columns

    def _diagonal(self) -> Float[Tensor, "D"]:
        return self._matrix.diagonal().clone()

    def _factorize(self, damping: float, tolerance: float, max_steps: int | None) -> Factorization:
        factor = self._cholesky(damping)
        if factor is not None:
            return DirectFactorization(
                self, damping, lambda v: torch.cholesky_solve(v.double(), factor).to(v.dtype),
                lambda: 2 * factor.diagonal().log().sum(),
            )  # fmt: skip
        if damping == 0.0:
            raise singular("DenseOperator.factorize", damping, f"its rank is below D = {self.size:,}")
        # F + λI is positive definite, only not to Cholesky in float64: the spectrum still gives the null space λ.
        values, vectors, _ = self._spectrum
        reciprocal = damped_reciprocal(values, damping, torch.float64, "DenseOperator.factorize").unsqueeze(-1)
        return DirectFactorization(
            self, damping, lambda v: (vectors @ (reciprocal * (vectors.mT @ v.double()))).to(v.dtype),
            lambda: (values + damping).log().sum(),
        )  # fmt: skip

    def _cholesky(self, damping: float) -> Float[Tensor, "D D"] | None:
        """Lower Cholesky factor of F + λI in float64, or None where a pivot is nothing but rounding."""
        damped = self._matrix.to(torch.float64, copy=True)
        damped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        # A pivot is what elimination leaves of its diagonal entry: judged against that entry, scales do not matter.
        rounding = self.size * torch.finfo(torch.float64).eps * damped.diagonal()
        sound = int(failed) == 0 and bool((factor.diagonal().square() > rounding).all())
        return factor if sound else None

    def _draw(self, generator: torch.Generator | None, count: int) -> Float[Tensor, "D n"]:
        values, vectors, _ = self._spectrum
        noise = torch.randn(self.size, count, dtype=self.dtype, device=self.device, generator=generator)
        return (vectors @ (values.sqrt().unsqueeze(-1) * (vectors.mT @ noise.double()))).to(self.dtype)

    def _scaled(self, scale: float) -> DenseOperator:
        return DenseOperator(self.space, scale * self._matrix)

    def _plus(self, other: FisherOperator) -> FisherOperator | None:
        if other.is_dense:
            return DenseOperator(self.space, self._matrix + other._to_dense())
        return DenseOperator(self.space, self._matrix + other._diagonal().diag()) if other.is_diagonal else None

    def _frobenius(self) -> Float[Tensor, ""]:
        return self._matrix.double().norm()

    def _converted(self, dtype: torch.dtype, device: torch.device) -> FisherOperator:
        matrix, _ = nearest_semidefinite(self._matrix, "DenseOperator(matrix)")
        return DenseOperator(self.space, matrix.to(device, dtype))

    is_dense = True
    inversion = "direct"

    @property
    def decomposed_side(self) -> int:
        return self.size

    def _usual_damping(self) -> float:
        return 1.0

    def _moment(self, places: Int[Tensor, "O J"]) -> Float[Tensor, "J J"]:
        return torch.stack([self._matrix[row.unsqueeze(-1), row] for row in places]).mean(0)

    def _eigenvalues(self, k: int) -> Float[Tensor, "k"]:
        return self._spectrum.values.flip(0)[:k]

    def _eigenvectors(self, k: int) -> Float[Tensor, "D k"]:
        return self._spectrum.basis.flip(1)[:, :k].to(self.dtype)

    def _to_dense(self) -> Float[Tensor, "D D"]:
        return self._matrix.clone()

    def _state(self) -> io.State:
        return io.State(self.tag, self.space.names, {"matrix": self._matrix})

    @classmethod
    def _from_state(cls, space: ParameterSpace, state: io.State) -> DenseOperator:
        return cls(space, state.tensors["matrix"])
