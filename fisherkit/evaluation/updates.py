"""The kinds' updates as the paper writes them, from rows and in sample space, for all dampings at once.

Two formulas (Wu, Yu, Zhang, Woodland, arXiv 2406.06420, eq. 5, 8 and 49). Where the gradient is a known combination
∇L = Jᵀc of the rows, (JᵀJ + λI)⁻¹∇L = Jᵀ(JJᵀ + λI)⁻¹c: nothing cancels however small λ is. Where it is not, it is split
into its part in the rows' span and the rest, which no row sees and λ alone divides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.rows.collection import Rows

Columns = Float[Tensor, "D K"]


def in_span(
    rows: Rows, c: Float[Tensor, "R"], dampings: Sequence[float], gram: Float[Tensor, "R R"] | None = None
) -> Columns:
    """Jᵀ(JJᵀ + λI)⁻¹c for every λ, by the smaller of the R × R and the D × D matrix.

    Args:
        rows: J in float64.
        c: the right-hand side in sample space.
        dampings: λ.
        gram: JJᵀ if it is known.

    Cost: one Gram matrix and one product with Jᵀ; O(min(R, D)³) for each λ.
    """
    if rows.space.size < rows.count:
        normal, gradient = rows.normal_matrix(), rows.rmatmul(c.unsqueeze(1))[:, 0]
        return torch.stack([_solve(normal, gradient, damping) for damping in dampings], 1)
    gram = rows.gram() if gram is None else gram
    return rows.rmatmul(torch.stack([_solve(gram, c, damping) for damping in dampings], 1))


def any_gradient(rows: Rows, gradient: Float[Tensor, "D"], dampings: Sequence[float], rounding: float) -> Columns:
    """(JᵀJ + λI)⁻¹g for every λ, by g's part in the rows' span and the rest.

    Args:
        rows: J in float64.
        gradient: g in float64.
        dampings: λ.
        rounding: of rows and gradient; a rest that is no larger, relative to g, is none.
    """
    values, vectors = torch.linalg.eigh(rows.gram())
    seen = values > len(values) * torch.finfo(torch.float64).eps * values[-1].clamp_min(0)
    inverse = torch.where(seen, 1 / torch.where(seen, values, 1.0), 0.0)
    inner = inverse * (vectors.mT @ rows.matmul(gradient.unsqueeze(1))[:, 0])
    w = [inner / (torch.where(seen, values, 0.0) + damping) for damping in dampings]
    # The last column is g's part in the span.
    found = rows.rmatmul(vectors @ torch.stack([*w, inner], 1))
    rest = gradient - found[:, -1]
    if rest.norm() <= 100 * rounding * gradient.norm():
        return found[:, :-1]
    return found[:, :-1] + rest.unsqueeze(1) / rest.new_tensor(list(dampings))


def by_block(rows: Rows, update: Callable[[tuple[str, ...]], Columns], count: int) -> Columns:
    """Each module's own update, put together; float64.

    Args:
        rows: over all parameters.
        update: names of a module's parameters to its update, in their order.
        count: K.
    """
    like = next(iter(rows.slots[0].rows.tensors().values()))
    whole = torch.empty(rows.space.size, count, dtype=torch.float64, device=like.device)
    for names in rows.space.joined_blocks(slot.names for slot in rows.slots):
        rows.space.put(whole, names, update(names))
    return whole


def _solve(matrix: Float[Tensor, "n n"], c: Float[Tensor, "n"], damping: float) -> Float[Tensor, "n"]:
    """(A + λI)⁻¹c; through the eigenvalues where λ is below the rounding of a singular A."""
    damped = matrix.clone()
    damped.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed) == 0:
        return torch.cholesky_solve(c.unsqueeze(1), factor)[:, 0]
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ ((vectors.mT @ c) / (values.clamp_min(0) + damping))
