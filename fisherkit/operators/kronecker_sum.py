"""Solving with Σ_t G_t ⊗ A_t + λI over one layer: an approximate inverse of any sum, cheap products for two terms.

A sum of Kronecker products has no closed-form inverse once it has three terms, the damping being one of them. What is
inverted here instead: in a basis P of one side in which all terms are nearly diagonal, the sum falls into one small
matrix Σ_t g_t[p] A_t + λe[p]I for each basis vector p, and those are factored exactly. Where they would be too many
numbers, the other side is made diagonal as well. Terms that are no Kronecker products are first approximated by one.

Of two terms a step of conjugate gradients is two matrix products in such a basis, not eight. With PᵀSP = I for
S = a₁G₁ + a₂G₂ + floor · I, and PᵀCP = Δ diagonal for C = a₂G₂ − a₁G₁, both PᵀG_tP are a diagonal minus a multiple of
K = PᵀP. The same on the inputs' side, with L = QᵀQ. Of X = P Y Qᵀ the whole sum is then

    W ∘ Y − d ∘ (Y L) + K (s Y L − Y ∘ e)

whose diagonal is the preconditioner. This change of variables is exact; the residual is recomputed with the matrix
itself, which is never approximated.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.arithmetic import MatMat
from fisherkit.errors import NotConvergedWarning
from fisherkit.operators.base import FisherOperator
from fisherkit.operators.damped_gram import damped_cholesky
from fisherkit.operators.layer_layout import LayerLayout
from fisherkit.solvers import SolveInfo, conjugate_gradient, relative_residual

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
diagonalise what lies between. Where no direction of the outputs is that small, as after `mix_with_average`, they leave
all of λ to the inputs, whose power is then 1: with the outputs a multiple of I, both bases would diagonalise the sum.
Measured on sums of two, three and five layers' Fishers, relative dampings 3e-2 to 1e-8.
"""

LEAST_FLOOR, LIFTS = 1e-12, 10
ROUNDING = 1e-14


@dataclass(frozen=True)
class _Terms:
    """Σ_t G_t ⊗ A_t in float64, zero terms left out."""

    layout: LayerLayout
    gradients: list[Float[Tensor, "O O"]]
    activations: list[Float[Tensor, "J J"]]

    @property
    def mean_eigenvalue(self) -> Float[Tensor, ""]:
        """The mean eigenvalue of the sum."""
        pairs = zip(self.gradients, self.activations, strict=True)
        return torch.stack([_mean_eigenvalue(g) * _mean_eigenvalue(a) for g, a in pairs]).sum()

    def sides(self, damping: float) -> Iterator[_Side]:
        """The outputs', then the inputs', each made when it is asked for."""
        relative = damping / self.mean_eigenvalue
        outputs = _Side(self.gradients, self.activations, relative.pow(FLOOR_POWER).clamp_min(LEAST_FLOOR))
        yield outputs
        share = outputs.shift * outputs.lengths.max()  # of λ in the outputs' least direction, 1 if they lack one
        power = 1 - (1 - FLOOR_POWER) * share
        yield _Side(self.activations, self.gradients, relative.pow(power).clamp_min(LEAST_FLOOR))


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


class _Side:
    """P with PᵀSP = I, S = Σ_t c_t M_t + shift · I and c_t the ``others``' mean eigenvalues: PᵀM_tP is nearly diagonal.

    Of two terms what is not diagonal in it is a multiple of PᵀP, and ``contrasts`` are the eigenvalues that tell them
    apart.
    """

    def __init__(self, matrices: Sequence[Float[Tensor, "n n"]], others: Sequence[Tensor], floor: Tensor) -> None:
        self._matrices, self.weights = matrices, torch.stack([_mean_eigenvalue(other) for other in others])
        weighted = self.weights[:, None, None] * torch.stack(list(matrices))
        total = weighted.sum(0)
        # Two terms add up to S, but for the shift, and are diagonal where another combination of them is. For more
        # terms one combination in which all weigh differently has to do.
        spread = torch.linspace(0, 1, len(weighted), dtype=total.dtype, device=total.device) ** 1.3 * 2 - 1
        contrast = (spread[:, None, None] * weighted).sum(0)
        self.shift = floor * _mean_eigenvalue(total)
        for _ in range(LIFTS):
            lower, failed = damped_cholesky(total.clone(), self.shift)
            if not bool(failed):
                break
            self.shift = 100 * self.shift  # what rounding has left below 0 is more
        half = torch.linalg.solve_triangular(lower, contrast, upper=False)
        contrast = torch.linalg.solve_triangular(lower, half.mT, upper=False)
        self.contrasts, vectors = torch.linalg.eigh((contrast + contrast.mT) / 2)
        self.basis = torch.linalg.solve_triangular(lower.mT, vectors, upper=True)
        self.lengths = self.basis.square().sum(0)

    @cached_property
    def diagonals(self) -> Float[Tensor, "T n"]:
        """Those of the PᵀM_tP."""
        return torch.stack([(self.basis * (m @ self.basis)).sum(0) for m in self._matrices])


def _inverse_on_grid(terms: _Terms, damping: float) -> MatMat:
    """The approximate inverse as a map of grids [K, O, J]."""
    sides, shift = terms.sides(damping), (ROUNDING * terms.mean_eigenvalue).clamp_min(damping)
    outputs, width = len(terms.gradients[0]), len(terms.activations[0])
    on_outputs = next(sides)
    if outputs * width**2 <= MOST_NUMBERS:
        return _by_rows(on_outputs, terms.activations, shift)
    on_inputs = next(sides)
    if width * outputs**2 <= MOST_NUMBERS:
        inverse = _by_rows(on_inputs, terms.gradients, shift)
        return lambda grid: inverse(grid.mT).mT
    scales = torch.einsum("to,tj->oj", on_outputs.diagonals, on_inputs.diagonals)
    scales += shift * torch.outer(on_outputs.lengths, on_inputs.lengths)
    p, q = on_outputs.basis, on_inputs.basis
    return lambda grid: p @ ((p.mT @ grid @ q) / scales) @ q.mT


def _by_rows(side: _Side, matrices: Sequence[Float[Tensor, "m m"]], shift: Tensor) -> MatMat:
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


# -- two terms ---------------------------------------------------------------------------------------------------------


PASSES = 6
"""Solves for what is left, most often two: the residual is small in the new variables first."""


def solve_two_products(
    total: FisherOperator, right: Float[Tensor, "d"], damping: float, tolerance: float, max_steps: int
) -> tuple[Float[Tensor, "d"], SolveInfo] | None:
    """The solution of (total + λI) x = right in float64, for two Kronecker products over one large layer; else None.

    Cost: O(O³ + J³) for the bases of a layer O × J, then 2 (O + J) O J multiplications a step.
    """
    terms = total._terms()
    pair = len(terms) == 2 and all(term.factors is not None for term in terms)
    found = _factors(terms) if pair and damping > 0 else None
    if found is None or len(found.gradients) < 2:
        return None
    outputs, width = len(found.gradients[0]), len(found.activations[0])
    if min(outputs * width**2, width * outputs**2) <= MOST_NUMBERS:
        return None  # where the small matrices of `layer_inverse` are exact on one side and save steps
    on_outputs, on_inputs = found.sides(damping)
    layout = found.layout
    system = _System(on_outputs, on_inputs, damping)
    b = right.unsqueeze(1)
    solution, left, steps = torch.zeros_like(b), b, 0
    residual = torch.ones(1, dtype=b.dtype, device=b.device)
    for _ in range(PASSES):
        part = on_outputs.basis.mT @ layout.to_grid(left)[0] @ on_inputs.basis
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)  # said once, for all blocks, by the merge
            moved, info = conjugate_gradient(
                system.product, part.reshape(-1, 1), preconditioner=system.precondition,
                tolerance=min(tolerance / float(residual), 0.1), max_steps=max_steps - steps,
            )  # fmt: skip
        grid = on_outputs.basis @ moved.reshape(part.shape) @ on_inputs.basis.mT
        better = solution + layout.to_flat(grid.unsqueeze(0))
        steps += info.steps
        new = relative_residual(total._matmat, better, b, damping=damping)
        if not bool(new < residual):
            break
        solution, residual = better, new
        if bool(residual <= tolerance) or steps >= max_steps:
            break
        left = b - total._matmat(solution) - damping * solution
    converged = bool(residual <= tolerance)
    return solution.squeeze(1), SolveInfo("conjugate_gradient", steps, residual, converged, damping)


class _System:
    """The sum of two terms in the bases of both sides, and the inverse of its diagonal, on columns [O · J, 1].

    On each side PᵀM_tP = diag(d_t) − m_t · K with K = PᵀP.
    """

    def __init__(self, outputs: _Side, inputs: _Side, damping: float) -> None:
        self._k, self._l = (side.basis.mT @ side.basis for side in (outputs, inputs))
        (on_o, by_o), (on_i, by_i) = (
            (torch.stack([1 - side.contrasts, 1 + side.contrasts]) / twice.unsqueeze(1), side.shift / twice)
            for side, twice in ((side, 2 * side.weights) for side in (outputs, inputs))
        )
        self._weights = torch.einsum("to,tj->oj", on_o, on_i)
        self._d, self._e = (by_i @ on_o).unsqueeze(1), by_o @ on_i
        self._s = float(by_o @ by_i) + damping
        k, l_ = self._k.diagonal().unsqueeze(1), self._l.diagonal()
        self._scales = self._weights - self._d * l_ + k * (self._s * l_ - self._e)

    def product(self, columns: Float[Tensor, "n 1"]) -> Float[Tensor, "n 1"]:
        """The product with the sum."""
        y = columns.reshape(self._weights.shape)
        z = y @ self._l
        return (self._weights * y - self._d * z + self._k @ (self._s * z - y * self._e)).reshape(-1, 1)

    def precondition(self, columns: Float[Tensor, "n 1"]) -> Float[Tensor, "n 1"]:
        """The product with the inverse of its diagonal."""
        return (columns.reshape(self._scales.shape) / self._scales).reshape(-1, 1)
