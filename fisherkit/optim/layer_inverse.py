"""(G ⊗ A + λI)⁻¹ of one layer from leading eigenpairs of both factors, and the eigenpairs themselves.

What a factor's leading eigenvectors do not span gets the mean of its eigenvalues that are left, so that its trace is
kept; with all eigenpairs, or where the rest is truly zero, the inverse is exact. Leading eigenpairs by subspace
iteration (Halko, Martinsson, Tropp, arXiv 0909.4061), from where the last ones were. Low-rank Kronecker factors: Puiu,
arXiv 2206.15397. Knows tensors, and nothing of rows or steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.arithmetic import all_finite
from fisherkit.errors import NonFiniteError, SingularMatrixError
from fisherkit.operators.layer_layout import LayerLayout
from fisherkit.operators.linalg import singular, spectrum

FIRST, LATER, MORE = 4, 1, 16
"""Subspace iterations from random vectors, of which there are so many more, and from the last eigenvectors."""


@dataclass(frozen=True)
class Spectrum:
    """A factor as Q diag(v) Qᵀ + rest · (I − QQᵀ).

    Args:
        values: v.
        basis: Q, orthonormal columns.
        rest: eigenvalue of everything else; 0-dimensional.
    """

    values: Float[Tensor, "r"]
    basis: Float[Tensor, "w r"]
    rest: Float[Tensor, ""]

    @property
    def trace(self) -> Float[Tensor, ""]:
        """Of the whole."""
        width, rank = self.basis.shape
        return self.values.sum() + (width - rank) * self.rest


def leading_spectrum(
    matrix: Float[Tensor, "w w"], rank: int | None, start: Float[Tensor, "w r"] | None, call: str
) -> Spectrum:
    """The leading eigenpairs of a factor.

    Args:
        matrix: the factor.
        rank: how many; None for all.
        start: where to start from; None for random vectors from a fixed seed.
        call: for errors.

    Raises:
        NonFiniteError: NaN or infinite entries.
    """
    width = len(matrix)
    if not all_finite(matrix):
        raise NonFiniteError(
            call="a step", got="Kronecker factors with NaN or infinite entries", expected="finite ones",
            why="activations or gradients have grown out of range", try_="a smaller lr, or a trust_region",
        )  # fmt: skip
    if rank is None or rank >= width:
        values, vectors = spectrum(matrix, call)
        return Spectrum(values, vectors.to(matrix.dtype).contiguous(), values.new_zeros(()))
    if start is not None and start.shape == (width, rank):
        q, iterations = start, LATER
    else:
        shape, generator = (width, min(width, rank + MORE)), torch.Generator().manual_seed(0)
        q, iterations = torch.randn(shape, generator=generator, dtype=torch.float64).to(matrix), FIRST
    for _ in range(iterations):
        q = torch.linalg.qr(matrix @ q)[0]
    small = (q.mT @ (matrix @ q)).double()
    values, turn = torch.linalg.eigh((small + small.mT) / 2)
    values, turn = values[-rank:].clamp_min(0), turn[:, -rank:]
    rest = (matrix.diagonal().double().sum() - values.sum()).clamp_min(0) / (width - rank)
    return Spectrum(values, q @ turn.to(q.dtype), rest)


class LayerInverse:
    """(G ⊗ A + λI)⁻¹ on one layer's parameters.

    Args:
        layout: how they lie.
        activation: A.
        gradient: G.
        values: eigenvalues ``[s, r]`` where both bases span, if they are not the factors' products (EKFAC).
        damping: λ.

    Raises:
        SingularMatrixError: an eigenvalue and the damping are both zero.
    """

    def __init__(
        self, layout: LayerLayout, activation: Spectrum, gradient: Spectrum,
        values: Float[Tensor, "s r"] | None, damping: float,
    ) -> None:  # fmt: skip
        self._layout, self._a, self._g = layout, activation.basis, gradient.basis
        products = gradient.values.unsqueeze(1) * activation.values if values is None else values.double()
        whole = self._a.shape[0] == self._a.shape[1] and self._g.shape[0] == self._g.shape[1]
        both, outer = _reciprocal(products, damping), None
        if not whole:
            neither = _reciprocal(gradient.rest * activation.rest, damping)
            on_g, on_a = (
                _reciprocal(one.values * other.rest, damping)
                for one, other in ((gradient, activation), (activation, gradient))
            )
            both = both - on_g.unsqueeze(1) - on_a + neither
            outer = tuple(x.to(self._a.dtype) for x in (neither, on_g - neither, on_a - neither))
        self._both, self._outer = both.to(self._a.dtype), outer

    def solve(self, flat: Float[Tensor, "d"]) -> Float[Tensor, "d"]:
        """The inverse times a vector."""
        v = self._layout.to_grid(flat.unsqueeze(1))[0]
        on_g = self._g.mT @ v
        found = self._both * (on_g @ self._a)
        if self._outer is None:
            return self._layout.to_flat((self._g @ found @ self._a.mT).unsqueeze(0)).squeeze(1)
        neither, left, right = self._outer
        inner = self._g @ torch.addmm(left.unsqueeze(1) * on_g, found, self._a.mT)
        result = torch.addmm(inner, (v @ self._a) * right, self._a.mT).add_(neither * v)
        return self._layout.to_flat(result.unsqueeze(0)).squeeze(1)


def _reciprocal(values: Tensor, damping: float) -> Tensor:
    result = (values.double() + damping).reciprocal()
    if not bool(result.isfinite().all()):
        raise SingularMatrixError(**singular("a step", damping, "some of a layer's eigenvalues are 0"))
    return result
