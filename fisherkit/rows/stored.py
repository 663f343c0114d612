"""Rows written out, ``[R, d]``: right for small parameters and for layers with many shared positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherkit.rows.base import UnitRows, inner_products, product


class StoredRows(UnitRows):
    """The rows as one matrix.

    Args:
        values: ``[R, d]``.
    """

    form = "stored"

    def __init__(self, values: Float[Tensor, "R d"]) -> None:
        super().__init__(*values.shape)
        self.values = values

    def matmul(self, u: Float[Tensor, "d K"]) -> Float[Tensor, "R K"]:
        """J U."""
        return product(self.values, u)

    def rmatmul(self, w: Float[Tensor, "R K"], out: Float[Tensor, "d K"] | None = None) -> Float[Tensor, "d K"]:
        """Jᵀ W."""
        return torch.mm(self.values.mT, w, out=out)

    def gram(self, other: StoredRows, precise: bool = True) -> Float[Tensor, "R S"]:
        """J J'ᵀ."""
        return inner_products(self.values, self.values if other is self else other.values, precise)

    def squared_sum(self) -> Float[Tensor, "d"]:
        """Σ_r row_r²."""
        return self.values.square().sum(0)

    def dense(self) -> Float[Tensor, "R d"]:
        """The matrix."""
        return self.values

    def scaled(self, scale: float) -> StoredRows:
        """Every row times a number."""
        return StoredRows(self.values * scale)

    def reordered(self, order: Int[Tensor, "R"], regular: bool = False) -> StoredRows:
        """The rows in another order."""
        return StoredRows(self.values[order])

    def double(self) -> StoredRows:
        """The rows in float64."""
        return StoredRows(self.values.double())

    @classmethod
    def cat(cls, parts: Sequence[StoredRows]) -> StoredRows:
        """All rows of the parts."""
        return parts[0] if len(parts) == 1 else cls(torch.cat([part.values for part in parts]))

    def tensors(self) -> dict[str, Tensor]:
        """The matrix."""
        return {"values": self.values}
