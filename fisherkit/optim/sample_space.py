"""Damped directions from the rows of one step: the paper's update by their Gram matrix, and (F + λI)⁻¹g."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.operators import Factorization
from fisherkit.operators.damped_gram import damped_grams
from fisherkit.rows.collection import Rows
from fisherkit.rows.shared import SharedRows
from fisherkit.space import ParameterSpace


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
    rows: Rows | SharedRows, blocks: Sequence[Sequence[str]], targets: Float[Tensor, "R"], damping: float, examples: int
) -> Direction:
    """Δ = Jᵀ(JJᵀ + λI)⁻¹ t with J the per-example gradients, block by block (arXiv 2406.06420, eq. 5 and 8).

    ``targets`` t are what each example is asked for: 1 for EF, ‖∂ℓ/∂z‖² for iEF.
    """
    parts = [rows] if len(blocks) == 1 else [rows.part(names) for names in blocks]
    call, try_ = f"a step with gram_damping={damping}", "a larger gram_damping"
    solved = [gram.solve(targets.unsqueeze(1)) for gram in damped_grams(parts, damping, call=call, try_=try_)]
    found = [part.rmatmul(w.to(rows.dtype)).squeeze(1) for part, w in zip(parts, solved, strict=True)]
    names = (part.space.names for part in parts)
    update = found[0] if len(parts) == 1 else rows.space.join(list(zip(names, found, strict=True)))

    def curvature() -> Float[Tensor, ""]:
        # J Δ = t − λ w, and F = (1/N) Jᵀ diag(1/t) J for every kind that this is an update of.
        change = targets - damping * torch.cat(solved, 1).mT
        return (change.square() / targets).masked_fill_(targets <= 0, 0.0).sum() / examples

    return Direction(update, curvature)


def damped(space: ParameterSpace, inverses: Sequence[Factorization], gradient: Float[Tensor, "D"]) -> Direction:
    """Δ = (F + λI)⁻¹ g, and ΔᵀFΔ = Δᵀg − λ‖Δ‖² of it, where need be block by block."""
    names = [inverse.operator.space.names for inverse in inverses]
    parts = [gradient] if len(inverses) == 1 else [space.take(gradient, own) for own in names]
    # The step has looked at every gradient.
    solved = [inverse._solve(g.unsqueeze(1)).squeeze(1) for inverse, g in zip(inverses, parts, strict=True)]
    update = solved[0] if len(inverses) == 1 else space.join(list(zip(names, solved, strict=True)))

    def curvature() -> Float[Tensor, ""]:
        own = [
            delta.double() @ g.double() - inverse.damping * delta.double().square().sum()
            for inverse, g, delta in zip(inverses, parts, solved, strict=True)
        ]
        return sum(own, torch.zeros_like(own[0])).clamp_min(0)

    return Direction(update, curvature)


def with_layer_rms(updates: Mapping[str, Tensor], gradients: Mapping[str, Tensor], rms: float) -> dict[str, Tensor]:
    """Updates by parameter, scaled by one number a module so that its entries' root mean square is this.

    Of a module whose gradient is 0 it is 0, whatever momentum is left.
    """
    layers: dict[str, list[str]] = {}
    for name in updates:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    found: dict[str, Tensor] = {}
    for own in layers.values():
        parts = [updates[name].double() for name in own]
        norm = torch.stack(torch._foreach_norm(parts)).norm()
        moved = [gradients[name].any() for name in own if name in gradients]  # those that are missing are zero
        still = (norm == 0) | ~torch.stack(moved).any() if moved else torch.ones_like(norm, dtype=torch.bool)
        scale = (rms * sum(part.numel() for part in parts) ** 0.5 / norm).masked_fill(still, 0.0)
        found |= {name: (part * scale).to(updates[name].dtype) for name, part in zip(own, parts, strict=True)}
    return found
