"""What a pass over the data adds up: frozen records of tensors with ``add`` and ``merge``.

``add`` takes one more chunk of rows, ``merge`` what another pass added up, so that batches, devices and tasks add the
same way. No normalization here: the builder divides by N once.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from fisherkit.rows.base import UnitRows
from fisherkit.rows.factored import FactoredRows


@dataclass(frozen=True)
class Squares:
    """Σ_r row_r², the diagonal."""

    total: Float[Tensor, "d"]

    def add(self, rows: UnitRows) -> Squares:
        """With more rows."""
        return Squares(self.total + rows.squared_sum())

    def merge(self, other: Squares) -> Squares:
        """With another pass's."""
        return Squares(self.total + other.total)


@dataclass(frozen=True)
class NormalMatrix:
    """Σ_r row_r row_rᵀ, a dense block."""

    total: Float[Tensor, "d d"]

    def add(self, rows: Float[Tensor, "R d"]) -> NormalMatrix:
        """With more rows, written out."""
        return NormalMatrix(self.total + rows.mT @ rows)

    def merge(self, other: NormalMatrix) -> NormalMatrix:
        """With another pass's."""
        return NormalMatrix(self.total + other.total)


@dataclass(frozen=True)
class KroneckerFactors:
    """Σ a aᵀ over examples and positions, their number, and Σ g gᵀ over rows and positions.

    Args:
        activation: ``[I(+1), I(+1)]``, the constant input of a bias appended.
        gradient: ``[O, O]``.
        count: number of (example, position) pairs in ``activation``.
        transposed: whether the weight is stored ``[I, O]``.
    """

    activation: Float[Tensor, "I I"]
    gradient: Float[Tensor, "O O"]
    count: int
    transposed: bool

    @classmethod
    def zeros(cls, rows: FactoredRows) -> KroneckerFactors:
        """Of the right sizes."""
        width = rows.inputs + rows.bias
        g = rows.gradients
        return cls(g.new_zeros(width, width), g.new_zeros(rows.outputs, rows.outputs), 0, rows.transposed)

    def add(
        self, rows: FactoredRows, *, first: bool, counted: tuple[Bool[Tensor, "..."], ...], token: bool, reduce: bool
    ) -> KroneckerFactors:
        """With more rows.

        Args:
            rows: of one chunk.
            first: whether the batch's activations are new.
            counted: masks ``[B, T]`` of the positions that count, for layers with as many positions; for others, every
                position of the examples that count in the first mask.
            token: whether every position of the outputs is an example.
            reduce: average activations and sum gradients over positions before taking second moments.
        """
        g = rows.gradients.sum(1) if reduce else rows.gradients.flatten(0, 1)
        gradient = self.gradient + g.mT @ g
        if not first:
            return KroneckerFactors(self.activation, gradient, self.count, self.transposed)
        a = rows.homogeneous()
        own = counted[0].shape == a.shape[:2]
        everywhere = counted[0].any(1, keepdim=True)
        mask = next((m for m in counted if m.shape == a.shape[:2]), everywhere).expand(a.shape[:2])
        # A token has its own position where the layer has the outputs'; elsewhere it shares all of its sequence's.
        examples = counted[0].sum(1) if token and not own else everywhere.squeeze(1).long()
        if reduce and not (token and own):
            a = (a * mask.unsqueeze(-1)).sum(1, keepdim=True) / mask.sum(1).clamp_min(1)[:, None, None]
            mask = mask.any(1, keepdim=True)
        weight = (examples.unsqueeze(1) * mask).flatten()
        a, weight = a.flatten(0, 1)[weight > 0], weight[weight > 0]
        activation = self.activation + (a * weight.unsqueeze(1)).mT @ a
        return KroneckerFactors(activation, gradient, self.count + int(weight.sum()), self.transposed)

    def merge(self, other: KroneckerFactors) -> KroneckerFactors:
        """With another pass's."""
        return KroneckerFactors(
            self.activation + other.activation,
            self.gradient + other.gradient,
            self.count + other.count,
            self.transposed,
        )


@dataclass(frozen=True)
class RotatedSquares:
    """Σ_r of the squares of row_r's matrix in a Kronecker eigenbasis: EKFAC's eigenvalues."""

    activation_basis: Float[Tensor, "I I"]
    gradient_basis: Float[Tensor, "O O"]
    total: Float[Tensor, "O I"]

    def add(self, rows: FactoredRows) -> RotatedSquares:
        """With more rows."""
        rotated = FactoredRows(
            rows.homogeneous() @ self.activation_basis, rows.gradients @ self.gradient_basis, rows.example, bias=False
        )
        squares = rotated.squared_sum().reshape(self.total.shape)
        return RotatedSquares(self.activation_basis, self.gradient_basis, self.total + squares)

    def merge(self, other: RotatedSquares) -> RotatedSquares:
        """With another pass's, in the same basis."""
        return RotatedSquares(self.activation_basis, self.gradient_basis, self.total + other.total)
