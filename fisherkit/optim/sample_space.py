"""Damped directions from the rows of one step: the paper's update by their Gram matrix, and (F + λI)⁻¹g."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.errors import SingularMatrixError
from fisherkit.operators import Factorization
from fisherkit.rows.collection import Rows


@dataclass(frozen=True)
class Direction:
    """What a step follows, Δ ``[D]``, downhill along its negative; ``curvature`` makes ΔᵀFΔ in float64.

    F is the kind's own, in the mean normalization.
    """

    update: Float[Tensor, "D"]
    curvature: Callable[[], Float[Tensor, ""]]

    def normalized(self) -> Direction:
        """Δ / ‖Δ‖; zero stays zero."""
        norm = self.update.norm().clamp_min(torch.finfo(self.update.dtype).tiny)
        return Direction(self.update / norm, lambda: self.curvature() / norm.double() / norm.double())

    def within(self, trust_region: float | None, lr: float) -> Float[Tensor, "D"]:
        """Δ, shortened so that (lr · Δ)ᵀF(lr · Δ) is at most the trust region."""
        if trust_region is None:
            return self.update
        shrink = (trust_region / (lr**2 * self.curvature())).sqrt().clamp_max(1)
        return self.update * shrink.to(self.update.dtype)


def gram_direction(
    rows: Rows, blocks: Sequence[Sequence[str]], targets: Float[Tensor, "R"], damping: float, examples: int
) -> Direction:
    """Δ = Jᵀ(JJᵀ + λI)⁻¹ t with J the per-example gradients, block by block (arXiv 2406.06420, eq. 5 and 8).

    ``targets`` t are what each example is asked for: 1 for EF, ‖∂ℓ/∂z‖² for iEF.
    """
    update = torch.empty(rows.space.size, dtype=_dtype(rows), device=targets.device)
    curvature = targets.new_zeros(())
    for names in blocks:
        part = rows if len(names) == len(rows.space.names) else rows.part(names)
        w = _damped(part, damping, targets.unsqueeze(1))
        own = part.rmatmul(w.to(_dtype(part)))
        rows.space.put(update, part.space.names, own.squeeze(1))
        # J Δ = t − λ w, and F = (1/N) Jᵀ diag(1/t) J for every kind that this is an update of.
        change = targets - damping * w.squeeze(1)
        curvature = curvature + torch.where(targets > 0, change.square() / targets, torch.zeros_like(targets)).sum()
    return Direction(update, lambda: curvature / examples)


def damped(inverse: Factorization, gradient: Float[Tensor, "D"]) -> Direction:
    """Δ = (F + λI)⁻¹ g, and ΔᵀFΔ = Δᵀg − λ‖Δ‖² of it."""
    update = inverse._solve(gradient.unsqueeze(1)).squeeze(1)  # the step has looked at every gradient

    def curvature() -> Float[Tensor, ""]:
        precise = update.double()
        return (precise @ gradient.double() - inverse.damping * precise.square().sum()).clamp_min(0)

    return Direction(update, curvature)


def _damped(rows: Rows, damping: float, right: Float[Tensor, "R 1"]) -> Float[Tensor, "R 1"]:
    """(JJᵀ + λI)⁻¹ t in float64; products in the rows' dtype where λ hides their rounding."""
    gram = rows.gram(precise=False)
    if len(gram) == 0:
        return right
    rounding = torch.finfo(_dtype(rows)).eps * gram.abs().sum(1).max()
    if bool(rounding >= 1e-2 * damping):
        gram = rows.gram(precise=True)
    gram.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed) != 0:
        raise SingularMatrixError(
            call=f"a step with gram_damping={damping}", got="a Gram matrix that is singular to working precision",
            expected="a positive definite one",
            why="examples' gradients are linearly dependent, as those of repeated examples are",
            try_="a larger gram_damping",
        )  # fmt: skip
    return torch.cholesky_solve(right, factor)


def _dtype(rows: Rows) -> torch.dtype:
    tensors = rows.slots[0].rows.tensors().values()
    return next(tensor.dtype for tensor in tensors if tensor.is_floating_point())
