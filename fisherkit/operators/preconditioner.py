"""An approximate inverse of F + λI for conjugate gradients: the exact one of a sample of the rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.conjugate import MatMat
from fisherkit.operators.factorization import diagonal_inverse
from fisherkit.rows.collection import Rows
from fisherkit.rows.streamed import StreamedRows
from fisherkit.rows.thinned import thinned

if TYPE_CHECKING:
    from fisherkit.operators.low_rank import LowRankOperator

SHARE = 20
"""A product with the sample's rows may take this fraction of one with all rows ..."""

MOST = 2000
"""... and it has at most so many of them: their Gram matrix is decomposed in seconds."""

FEWEST = 50
"""With fewer, the sample says too little to be worth its products."""


class SampledInverse:
    """(F_s + λ'I)⁻¹ by Woodbury's identity, where F_s = scale · JᵀJ is of a sample of F's rows and λ' ≥ λ.

    A sample of s rows knows F's large eigenvalues. Its own small ones are noise: rows that hardly overlap make
    eigenvalues of about (what they have in common with no others) / s, where F has much less. λ' is the smallest of
    them, so that this noise and the directions that the sample does not know count alike, as in Erdogdu and Montanari,
    "Convergence rates of sub-sampled Newton methods", 2015 (arXiv 1508.02810).
    """

    def __init__(self, rows: Rows, scale: float, damping: float) -> None:
        self._rows, self._scale = rows, scale
        values, vectors = torch.linalg.eigh(scale * rows.gram())
        rounding = values[-1] * torch.finfo(torch.float32).eps
        noise = values[values > rounding]
        self.damping = max(damping, float(noise[0]) if len(noise) else 0.0)
        # 1/λ' − scale · Jᵀ (scale · JJᵀ + λ')⁻¹ J / λ', times λ': a preconditioner's scale does not matter.
        self._vectors, self._weights = vectors, (scale / (values.clamp_min(0) + self.damping)).unsqueeze(1)

    def __call__(self, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        """λ' (F_s + λ'I)⁻¹ V."""
        known = self._vectors.mT @ self._rows.matmul(columns).double()
        return columns - self._rows.rmatmul((self._vectors @ (self._weights * known)).to(columns.dtype))


def preconditioner_of_rows(operator: LowRankOperator, damping: float) -> MatMat | None:
    """An approximate inverse of F + λI for a Fisher that has rows.

    A sample's inverse where enough of a sample fits. Else the diagonal's, but only if rows are no fewer than
    parameters: below that F has a null space, which its diagonal would tear apart.
    """
    rows = operator.row_source
    if isinstance(rows, (Rows, StreamedRows)):
        stride = sample_stride(rows.count, operator.size, _row_bytes(rows), operator.memory_budget)
        if stride is not None:
            sample = thinned(rows, stride)
            return SampledInverse(sample, operator.scale * rows.count / sample.count, damping)
    return None if rows.count < operator.size else diagonal_inverse(operator, damping)


def sample_stride(count: int, size: int, row_bytes: float, budget: int) -> int | None:
    """Take every k-th row: k, or None if no sample is worth it."""
    # s rows and four s × s matrices in float64: 32 s² + row_bytes s <= budget.
    fits = int(((row_bytes**2 + 128 * budget) ** 0.5 - row_bytes) / 64)
    wanted = min(MOST, count // SHARE, size // 2, fits)
    return None if wanted < FEWEST else -(-count // wanted)


def _row_bytes(rows: Rows | StreamedRows) -> float:
    if isinstance(rows, Rows):
        return rows.nbytes / rows.count
    return rows.problem.row_bytes(rows.space.names) / rows.problem.vectors_per_example
