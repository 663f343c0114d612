"""(G₁ ⊗ A₁ + G₂ ⊗ A₂ + λI) x = b by conjugate gradients in a basis where a step is two matrix products, not eight.

With PᵀSP = I for S = a₁G₁ + a₂G₂ + floor · I, and PᵀCP = Δ diagonal for C = a₂G₂ − a₁G₁, both PᵀG_tP are a diagonal
minus a multiple of K = PᵀP. The same on the inputs' side, with L = QᵀQ. Of X = P Y Qᵀ the whole sum is then

    W ∘ Y − d ∘ (Y L) + K (s Y L − Y ∘ e)

whose diagonal is the preconditioner that `operators.kronecker_sum` has for sums of any length. This change of variables
is exact; the residual is recomputed with the matrix itself.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.errors import NotConvergedWarning
from fisherkit.operators import FisherOperator
from fisherkit.operators.kronecker_sum import FLOOR_POWER, LEAST_FLOOR, MOST_NUMBERS
from fisherkit.solvers import SolveInfo, conjugate_gradient, relative_residual

PASSES = 6
"""Solves for what is left, most often two: the residual is small in the new variables first."""


def solve_two_products(
    total: FisherOperator, right: Float[Tensor, "d"], damping: float, tolerance: float, max_steps: int
) -> tuple[Float[Tensor, "d"], SolveInfo] | None:
    """The solution of (total + λI) x = right in float64, for two Kronecker products over one large layer; else None.

    Cost: O(O³ + J³) for the bases of a layer O × J, then 2 (O + J) O J multiplications a step.
    """
    terms = total._terms()
    factors = [term.factors for term in terms]
    layouts = {term.layout for term in terms}
    if len(terms) != 2 or None in factors or len(layouts) > 1 or damping <= 0:
        return None
    activations, gradients = zip(*(pair for pair in factors if pair is not None), strict=True)
    outputs, width = len(gradients[0]), len(activations[0])
    if min(outputs * width**2, width * outputs**2) <= MOST_NUMBERS:
        return None  # where the small matrices of `kronecker_sum` are exact on one side and save steps
    means = [(_mean(g), _mean(a)) for g, a in zip(gradients, activations, strict=True)]
    mean = sum(g * a for g, a in means)
    if not all(g > 0 and a > 0 for g, a in means):
        return None
    floor = max((damping / mean) ** FLOOR_POWER, LEAST_FLOOR)
    on_outputs = _side(gradients, [a for _, a in means], floor)
    on_inputs = _side(activations, [g for g, _ in means], floor)
    layout = terms[0].layout
    if on_outputs is None or on_inputs is None or layout is None:
        return None
    system = _System(on_outputs, on_inputs, damping)
    b = right.unsqueeze(1)
    solution, left, steps = torch.zeros_like(b), b, 0
    residual = torch.ones(1, dtype=b.dtype, device=b.device)
    for _ in range(PASSES):
        part = on_outputs.basis.mT @ layout.to_grid(left)[0] @ on_inputs.basis
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)  # said once, for all blocks, by the merge
            found, info = conjugate_gradient(
                system.product, part.reshape(-1, 1), preconditioner=system.precondition,
                tolerance=min(tolerance / float(residual), 0.1), max_steps=max_steps - steps,
            )  # fmt: skip
        grid = on_outputs.basis @ found.reshape(part.shape) @ on_inputs.basis.mT
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


@dataclass(frozen=True)
class _Side:
    """P, and PᵀM_tP = diag(diagonals[t]) − multiples[t] · K with K = PᵀP."""

    basis: Float[Tensor, "n n"]
    gram: Float[Tensor, "n n"]
    diagonals: Float[Tensor, "2 n"]
    multiples: Float[Tensor, "2"]


def _side(matrices: tuple[Tensor, ...], weights: list[float], floor: float) -> _Side | None:
    """The basis in which both matrices are nearly diagonal; None where rounding has left a matrix indefinite."""
    first, second = (weight * matrix for weight, matrix in zip(weights, matrices, strict=True))
    shift = floor * _mean(first + second)
    lifted = first + second
    lifted.diagonal().add_(shift)
    lower, failed = torch.linalg.cholesky_ex((lifted + lifted.mT) / 2)
    if bool(failed):
        return None
    contrast = torch.linalg.solve_triangular(lower, second - first, upper=False)
    contrast = torch.linalg.solve_triangular(lower, contrast.mT, upper=False)
    values, vectors = torch.linalg.eigh((contrast + contrast.mT) / 2)
    basis = torch.linalg.solve_triangular(lower.mT, vectors, upper=True)
    halves = 2 * torch.tensor(weights, dtype=basis.dtype, device=basis.device)
    return _Side(basis, basis.mT @ basis, torch.stack([1 - values, 1 + values]) / halves.unsqueeze(1), shift / halves)


class _System:
    """The sum in the bases of both sides, and the inverse of its diagonal, on columns [O · J, 1]."""

    def __init__(self, outputs: _Side, inputs: _Side, damping: float) -> None:
        self._k, self._l = outputs.gram, inputs.gram
        self._weights = torch.einsum("to,tj->oj", outputs.diagonals, inputs.diagonals)
        self._d = (inputs.multiples @ outputs.diagonals).unsqueeze(1)
        self._e = outputs.multiples @ inputs.diagonals
        self._s = float(outputs.multiples @ inputs.multiples) + damping
        k, l_ = self._k.diagonal().unsqueeze(1), self._l.diagonal()
        self._scales = self._weights - self._d * l_ + k * (self._s * l_ - self._e)

    def product(self, columns: Float[Tensor, "n 1"]) -> Float[Tensor, "n 1"]:
        y = columns.reshape(self._weights.shape)
        z = y @ self._l
        return (self._weights * y - self._d * z + self._k @ (self._s * z - y * self._e)).reshape(-1, 1)

    def precondition(self, columns: Float[Tensor, "n 1"]) -> Float[Tensor, "n 1"]:
        return (columns.reshape(self._scales.shape) / self._scales).reshape(-1, 1)


def _mean(matrix: Tensor) -> float:
    return float(matrix.diagonal().mean())
