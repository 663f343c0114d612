"""An approximate inverse of Σ_t G_t ⊗ A_t + λI, with which conjugate gradients converge in few steps.

A sum of Kronecker products has no closed-form inverse once it has three terms, the damping being one of them. What is
inverted here instead: in a basis P of one side in which all terms are nearly diagonal, the sum falls into one small
matrix Σ_t g_t[p] A_t + λe[p]I for each basis vector p, and those are factored exactly. Where they would be too many
numbers, the other side is made diagonal as well. Terms that are no Kronecker products are first approximated by one.
Owns these approximations; the matrix that is solved for is never approximated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.arithmetic import MatMat
from fisherkit.operators.base import FisherOperator
from fisherkit.operators.layer_layout import LayerLayout

MOST_NUMBERS = 1 << 22
"""Numbers that the factored small matrices may take, 32 MB; fixed, so that a solve does not depend on free memory.

Every step reads them all twice, which costs more than the products themselves as soon as they leave the caches, and
saves a third of the steps.
"""

AT_ONCE = 1 << 20
"""Numbers of small matrices that are factored at once."""

FLOOR_POWER = 0.75
"""P treats λ as (λ / mean eigenvalue)^this of its side's scale: the share of the damping that this side stands for.

With 1, P stretches directions that the damping rules, and conjugate gradients waste steps there; with ½, P does not
diagonalise what lies between. Measured on sums of two and three layers' Fishers, relative dampings 1e-2 to 1e-8.
"""

LEAST_FLOOR = 1e-12
ROUNDING = 1e-14


@dataclass(frozen=True)
class _Terms:
    """Σ_t G_t ⊗ A_t in float64, zero terms left out."""

    layout: LayerLayout
    gradients: list[Float[Tensor, "O O"]]
    activations: list[Float[Tensor, "J J"]]

    @property
    def mean_eigenvalue(self) -> Float[Tensor, ""]:
        pairs = zip(self.gradients, self.activations, strict=True)
        return torch.stack([_mean_eigenvalue(g) * _mean_eigenvalue(a) for g, a in pairs]).sum()


def layer_inverse(terms: Sequence[FisherOperator], damping: float) -> MatMat | None:
    """Product with an approximate inverse of Σ_t F_t + λI over one layer; None if a term is near no Kronecker product.

    Cost: for a layer with O outputs and J inputs (bias included) O³ + O·J³/3 operations, O·J² numbers, the roles of O
        and J exchanged where that is what fits; beyond `MOST_NUMBERS` O³ + J³ operations.
    """
    found = _factors(terms)
    if found is None:
        return None
    inverse = _inverse_on_grid(found, damping)

    def product(columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        return found.layout.to_flat(inverse(found.layout.to_grid(columns.double()))).to(columns.dtype)

    return product


class _Diagonalised:
    """P with Pᵀ(Σ_t weights_t M_t + floor · mean eigenvalue · I)P = I in which the M_t are nearly diagonal."""

    def __init__(self, matrices: Sequence[Float[Tensor, "n n"]], weights: Sequence[Tensor], floor: Tensor) -> None:
        weighted = [c * m for c, m in zip(weights, matrices, strict=True)]
        total = torch.stack(weighted).sum(0)
        values, vectors = torch.linalg.eigh(total)
        whitening = vectors / (values.clamp_min(0) + floor * _mean_eigenvalue(total)).sqrt()
        # Two whitened terms add up to (nearly) I and share eigenvectors: those of any other combination of them. For
        # more terms one combination in which all weigh differently has to do.
        spread = torch.linspace(0, 1, len(weighted)) ** 1.3 * 2 - 1
        contrast = whitening.mT @ torch.stack([s * m for s, m in zip(spread, weighted, strict=True)]).sum(0) @ whitening
        self.basis = whitening @ torch.linalg.eigh((contrast + contrast.mT) / 2)[1]
        self.diagonals = torch.stack([(self.basis * (m @ self.basis)).sum(0) for m in matrices])
        self.lengths = self.basis.square().sum(0)


def _inverse_on_grid(terms: _Terms, damping: float) -> MatMat:
    """The approximate inverse as a map of grids [K, O, J]."""
    mean = terms.mean_eigenvalue
    floor = (damping / mean).pow(FLOOR_POWER).clamp_min(LEAST_FLOOR)
    shift = (ROUNDING * mean).clamp_min(damping)
    outputs, width = len(terms.gradients[0]), len(terms.activations[0])
    on_outputs = _Diagonalised(terms.gradients, [_mean_eigenvalue(a) for a in terms.activations], floor)
    if outputs * width**2 <= MOST_NUMBERS:
        return _by_rows(on_outputs, terms.activations, shift)
    on_inputs = _Diagonalised(terms.activations, [_mean_eigenvalue(g) for g in terms.gradients], floor)
    if width * outputs**2 <= MOST_NUMBERS:
        inverse = _by_rows(on_inputs, terms.gradients, shift)
        return lambda grid: inverse(grid.mT).mT
    scales = torch.einsum("to,tj->oj", on_outputs.diagonals, on_inputs.diagonals)
    scales += shift * torch.outer(on_outputs.lengths, on_inputs.lengths)
    p, q = on_outputs.basis, on_inputs.basis
    return lambda grid: p @ ((p.mT @ grid @ q) / scales) @ q.mT


def _by_rows(side: _Diagonalised, matrices: Sequence[Float[Tensor, "m m"]], shift: Tensor) -> MatMat:
    """(P ⊗ I) blockdiag(Σ_t d_t[p] M_t + shift·e[p]·I)⁻¹ (P ⊗ I)ᵀ on grids [K, n, m]."""
    blocks = torch.einsum("tp,tij->pij", side.diagonals, torch.stack(list(matrices)))
    blocks.diagonal(dim1=1, dim2=2).add_((shift * side.lengths).unsqueeze(-1))
    factors = _factor_in_place(blocks)

    def product(grid: Float[Tensor, "K n m"]) -> Float[Tensor, "K n m"]:
        rows = (side.basis.mT @ grid).permute(1, 2, 0)
        return side.basis @ torch.cholesky_solve(rows, factors).permute(2, 0, 1)

    return product


def _factor_in_place(blocks: Float[Tensor, "n m m"]) -> Float[Tensor, "n m m"]:
    """Lower Cholesky factors of all, a few at a time, so that there is no second copy of them all."""
    for part in blocks.split(max(1, AT_ONCE // blocks.shape[1] ** 2)):
        factors, failed = torch.linalg.cholesky_ex(part)
        # What rounding leaves below 0 is far below the shift, unless there is no damping.
        for power in (1e2, 1e4, 1e6):
            if not bool(failed.any()):
                break
            diagonal = part.diagonal(dim1=1, dim2=2)
            diagonal.add_(power * ROUNDING * diagonal.mean(-1, keepdim=True))
            factors, failed = torch.linalg.cholesky_ex(part)
        part.copy_(factors)
    return blocks


def _factors(terms: Sequence[FisherOperator]) -> _Terms | None:
    """Every term as a Kronecker product, approximated where it is none; None if one cannot be."""
    layouts = {term.layout for term in terms if term.layout is not None}
    if len(layouts) != 1:
        return None
    layout = layouts.pop()
    found = [term._nearest_kronecker(layout) for term in terms]
    pairs = [pair for pair in found if pair is not None]
    if len(pairs) < len(found):
        return None
    # A term that is 0 has no part in a basis, and its marginals would be 0 / 0.
    pairs = [(a, g) for a, g in pairs if bool(a.trace() > 0) and bool(g.trace() > 0)]
    return _Terms(layout, [(g + g.mT) / 2 for _, g in pairs], [(a + a.mT) / 2 for a, _ in pairs]) if pairs else None


def _mean_eigenvalue(matrix: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    return matrix.trace() / len(matrix)
