"""What a pass over the data adds up: frozen records of tensors with ``add`` and ``merge``.

``add`` takes one more chunk of rows, ``merge`` what another pass added up, so that batches, devices and tasks add the
same way. No normalization here: the builder divides by N once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fisherkit.operators.linalg import spectrum
from fisherkit.rows.base import UnitRows, second_moment
from fisherkit.rows.chunks import Chunk
from fisherkit.rows.factored import FactoredRows
from fisherkit.rows.last_layer import LastLayerRows


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
class SecondMoment:
    """Σ x xᵀ, kept as the vectors themselves while they are fewer than their entries.

    Args:
        width: w, entries of a vector.
        vectors: what has been added, each ``[n, T, w]``, as long as it is fewer than w vectors; empty after that.
        matrix: Σ x xᵀ ``[w, w]``; None as long as there are vectors.
    """

    width: int
    vectors: tuple[Tensor, ...] = ()
    matrix: Float[Tensor, "w w"] | None = None

    def add(self, *parts: Float[Tensor, "n T w"], spanning: bool = True) -> SecondMoment:
        """With more vectors.

        Args:
            parts: the vectors.
            spanning: whether the vectors span what matters; else their number says nothing about the rank that a basis
                must have, and the matrix is formed.
        """
        few = self.matrix is None and spanning and self._number(self.vectors) + self._number(parts) < self.width
        if few:
            return SecondMoment(self.width, (*self.vectors, *parts))
        new = functools.reduce(torch.Tensor.add_, map(second_moment, parts))
        return SecondMoment(self.width, (), new if self.empty else new.add_(self.dense()))

    def merge(self, other: SecondMoment) -> SecondMoment:
        """With another pass's."""
        if other.matrix is None:
            return self.add(*other.vectors) if other.vectors else self
        return SecondMoment(self.width, (), other.matrix if self.empty else self.dense() + other.matrix)

    @property
    def empty(self) -> bool:
        """Whether nothing has been added."""
        return self.matrix is None and not self.vectors

    def dense(self) -> Float[Tensor, "w w"]:
        """Σ x xᵀ."""
        return second_moment(self._stacked()) if self.matrix is None else self.matrix

    def spectrum(self, call: str) -> tuple[Float[Tensor, "r"], Float[Tensor, "w r"]]:
        """Eigenvalues and orthonormal eigenvectors, without those of the null space of few vectors."""
        if self.matrix is not None:
            return spectrum(self.matrix, call)
        # xᵀ = q r, so Σ x xᵀ = q (r rᵀ) qᵀ; forming no w × w matrix, and orthonormal at any condition.
        q, r = torch.linalg.qr(self._stacked().mT)
        values, vectors = torch.linalg.eigh(r.double() @ r.double().mT)
        return values.clamp_min(0), q @ vectors.to(q.dtype)

    def _stacked(self) -> Float[Tensor, "n w"]:
        return torch.cat([x.reshape(-1, self.width) for x in self.vectors])

    def _number(self, parts: Sequence[Tensor]) -> int:
        return sum(x.numel() for x in parts) // self.width


@dataclass(frozen=True)
class KroneckerFactors:
    """Σ a aᵀ over examples and positions, their number, and Σ g gᵀ over rows and positions.

    Args:
        activation: of the inputs, the constant input of a bias appended.
        gradient: of the output gradients.
        count: number of (example, position) pairs in ``activation``.
        transposed: whether the weight is stored ``[I, O]``.
    """

    activation: SecondMoment
    gradient: SecondMoment
    count: int
    transposed: bool

    @classmethod
    def zeros(cls, rows: FactoredRows) -> KroneckerFactors:
        """Of the right sizes."""
        return cls(SecondMoment(rows.inputs + rows.bias), SecondMoment(rows.outputs), 0, rows.transposed)

    def add(
        self,
        rows: FactoredRows,
        *,
        first: bool,
        whole: bool,
        counted: tuple[Bool[Tensor, "..."], ...],
        exists: Bool[Tensor, "B T"] | None,
        token: bool,
        reduce: bool,
    ) -> KroneckerFactors:
        """With more rows.

        Args:
            rows: of one chunk.
            first: whether the batch's activations are new.
            whole: whether every position of every example counts.
            counted: masks ``[B, T]`` of the positions that count, for layers with as many positions; for others, every
                position of the examples that count in the first mask.
            exists: which positions ``[B, T]`` of each example outputs that count depend on: those count, once each.
                None where the forward pass shows whose all positions are.
            token: whether every position of the outputs is an example.
            reduce: average activations and sum gradients over positions before taking second moments.
        """
        # Rows lie in the span of the factors' vectors where each of their positions is one of those.
        spanning = whole and exists is None and not reduce
        if isinstance(rows, LastLayerRows):
            # A row of a position is zero at all others, so that "reduce" has the same sum.
            gradient = self.gradient.merge(SecondMoment(rows.outputs, (), rows.gradient_moment()))
        else:
            g = rows.gradients.sum(1, keepdim=True) if reduce else rows.gradients
            gradient = self.gradient.add(g, spanning=spanning)
        if not first:
            return KroneckerFactors(self.activation, gradient, self.count, self.transposed)
        shape = rows.activations.shape[:2]
        own = counted[0].shape == shape
        chunks = rows.chunks(constant=True)
        if spanning and exists is None and (own or not token):
            activation = self.activation.add(*(a for _, a in chunks))
            return KroneckerFactors(activation, gradient, self.count + shape.numel(), self.transposed)
        everywhere = counted[0].any(1, keepdim=True)
        if exists is None:
            mask = next((m for m in counted if m.shape == shape), everywhere).expand(shape)
        else:
            mask, own = everywhere & exists.to(everywhere.device), True
        # A token has its own position where the layer has the outputs'; elsewhere it shares all of its sequence's.
        examples = counted[0].sum(1) if token and not own else everywhere.squeeze(1).long()
        averaged = reduce and not (token and own)
        weight = examples.unsqueeze(1) * (mask.any(1, keepdim=True) if averaged else mask)
        activation = self.activation
        for span, a in chunks:
            if averaged:
                total = (a * mask[span].unsqueeze(-1)).sum(1, keepdim=True)
                a = total / mask[span].sum(1).clamp_min(1)[:, None, None]
            kept = weight[span] > 0
            weighed = a[kept] * weight[span][kept].to(a.dtype).sqrt().unsqueeze(1)
            activation = activation.add(weighed.unsqueeze(1), spanning=spanning)
        return KroneckerFactors(activation, gradient, self.count + int(weight.sum()), self.transposed)

    def merge(self, other: KroneckerFactors) -> KroneckerFactors:
        """With another pass's."""
        return KroneckerFactors(
            self.activation.merge(other.activation),
            self.gradient.merge(other.gradient),
            self.count + other.count,
            self.transposed,
        )


@dataclass(frozen=True)
class RotatedSquares:
    """Σ_r of the squares of row_r's matrix in a Kronecker eigenbasis: EKFAC's eigenvalues.

    Args:
        activation_basis: ``[I(+1), r]``.
        gradient_basis: ``[O, s]``.
        total: the sum.
    """

    activation_basis: Float[Tensor, "I r"]
    gradient_basis: Float[Tensor, "O s"]
    total: Float[Tensor, "s r"]

    def add(self, rows: FactoredRows) -> RotatedSquares:
        """With more rows."""
        total = self.total.flatten()
        for rotated in rows.rotated(self.activation_basis, self.gradient_basis):
            total = total + rotated.squared_sum()
        return RotatedSquares(self.activation_basis, self.gradient_basis, total.reshape(self.total.shape))

    def merge(self, other: RotatedSquares) -> RotatedSquares:
        """With another pass's, in the same basis."""
        return RotatedSquares(self.activation_basis, self.gradient_basis, self.total + other.total)


SMALL_BLOCK = 256
"""Units without a Kronecker rule get an exact block up to this many parameters and an exact diagonal above."""

Names = tuple[str, ...]


@dataclass
class LayerSums:
    """What a pass adds up by unit for Kronecker factors: the factors, and exact blocks or diagonals of other units.

    Args:
        token: whether every position of the outputs is an example.
        reduce: Kronecker factors from sums over shared positions instead of each position.
        factors: of units whose rows are factored.
        blocks: of other units, small ones.
        squares: of other units.
    """

    token: bool
    reduce: bool
    factors: dict[Names, KroneckerFactors] = field(default_factory=dict)
    blocks: dict[Names, NormalMatrix] = field(default_factory=dict)
    squares: dict[Names, Squares] = field(default_factory=dict)

    def add(self, chunk: Chunk) -> None:
        """With more rows."""
        for slot in chunk.rows.slots:
            rows, names = slot.rows, slot.names
            if isinstance(rows, FactoredRows):
                known = self.factors.get(names) or KroneckerFactors.zeros(rows)
                self.factors[names] = known.add(
                    rows, first=chunk.first, whole=chunk.whole, counted=chunk.counted_positions,
                    exists=slot.exists, token=self.token, reduce=self.reduce,
                )  # fmt: skip
            elif rows.size <= SMALL_BLOCK:
                dense = rows.dense()
                block = self.blocks.get(names) or NormalMatrix(dense.new_zeros(rows.size, rows.size))
                self.blocks[names] = block.add(dense)
            else:
                total = rows.squared_sum()
                self.squares[names] = Squares(total).merge(self.squares.get(names) or Squares(torch.zeros_like(total)))
