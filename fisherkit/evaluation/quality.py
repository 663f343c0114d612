"""γ, the quality of an update as an approximation of the natural gradient, and the least value it can take.

After Wu, Yu, Zhang and Woodland, "An Improved Empirical Fisher Approximation for Natural Gradient Descent" (NeurIPS
2024, arXiv 2406.06420, eq. 15). Knows operators only by their products and solves.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.arithmetic import without_autocast
from fisherkit.errors import InvalidArgumentError, InvalidTypeError
from fisherkit.operators import Damping, FisherOperator

Direction = Tensor | Mapping[str, Tensor]
"""A vector over the parameters, in either form; update and gradient need not have the same."""


@without_autocast()
def approximation_quality(
    update: Direction, exact_fisher: FisherOperator, gradient: Direction
) -> Float[Tensor, ""] | Float[Tensor, " K"]:
    """γ(Δ) = √(ΔᵀFΔ) / abs(Δᵀ∇L): lower is better, and the natural gradient F⁻¹∇L has the least (eq. 15).

    Along Δ the quadratic model of the loss can fall by 1/(2γ²) at most, so γ ranks directions and ignores their length
    and sign. F and ∇L must belong to the same loss: the same data, likelihood, example and normalization. γ under
    ``normalization="mean"`` is √N times γ under ``"sum"``; a ratio such as γ/γ_SGD, with γ_SGD that of
    ``update=gradient``, depends on neither N nor the scale of the loss.

    Args:
        update: Δ, flat ``[D]``, a dict of named tensors, or K updates as columns ``[D, K]``.
        exact_fisher: F, usually a `fisherkit.ExactFisher` in the full structure; any operator will do.
        gradient: ∇L, flat ``[D]`` or a dict; `loss_gradient` computes it.

    Returns:
        γ as a float64 scalar on the operator's device, or ``[K]`` for columns.

    Raises:
        InvalidTypeError: the operator is not a `FisherOperator`, or a vector's dtype is not the operator's.
        InvalidArgumentError: a wrong shape; a zero update or gradient; an update orthogonal to the gradient.

    Cost: one product with F.
    """
    call = "approximation_quality"
    g = _gradient(gradient, exact_fisher, call)
    flat = _flat(update, exact_fisher, call)
    if not bool(flat.any(0).all()):
        raise InvalidArgumentError(call=call, got="a zero update", expected="a direction", why="γ would be 0/0")
    terms = flat.double() * (g.double() if flat.ndim == 1 else g.double().unsqueeze(1))
    inner = terms.sum(0).abs()
    # Below this a sum of D products is rounding alone, and so would γ be.
    if bool((inner <= torch.finfo(torch.float64).eps * terms.abs().sum(0)).any()):
        raise InvalidArgumentError(
            call=call, got="an update orthogonal to the gradient", expected="Δᵀ∇L ≠ 0",
            why="to first order the update does not change the loss, so γ is infinite",
            try_="an update made from this gradient, such as fisher.solve(gradient, damping)",
        )  # fmt: skip
    return exact_fisher.quadratic_form(flat).clamp_min(0).sqrt() / inner


@without_autocast()
def quality_floor(exact_fisher: FisherOperator, gradient: Direction, damping: Damping = 1e-3) -> Float[Tensor, ""]:
    """1/√(∇Lᵀ(F + λI)⁻¹∇L), the least γ that any update has where F + λI takes F's place.

    It falls as λ does, and at λ = 0 it is the least `approximation_quality` of all updates. For λ > 0 it is thus an
    upper bound of that least value, and an update's own γ, which knows no damping, may lie below it.

    Args:
        exact_fisher: F.
        gradient: ∇L, flat ``[D]`` or a dict.
        damping: λ, or `fisherkit.RelativeDamping`.

    Returns:
        A float64 scalar on the operator's device.

    Raises:
        InvalidTypeError: the operator is not a `FisherOperator`, or the gradient's dtype is not the operator's.
        InvalidArgumentError: a wrong shape; a zero gradient.
        SingularMatrixError: F + λI is singular.

    Cost: one solve with F.
    """
    g = _gradient(gradient, exact_fisher, "quality_floor")
    solution = exact_fisher.factorize(damping).matvec(g)
    return (g.double() @ solution.double()).rsqrt()


def _gradient(gradient: Direction, fisher: FisherOperator, call: str) -> Float[Tensor, " D"]:
    """The gradient as one flat vector that is not zero."""
    if not isinstance(fisher, FisherOperator):
        raise InvalidTypeError(
            call=call, got=f"a {type(fisher).__name__} as exact_fisher", expected="a FisherOperator",
            try_="fk.ExactFisher(model, data)",
        )  # fmt: skip
    flat = _flat(gradient, fisher, f"{call}, gradient")
    if flat.ndim != 1:
        raise InvalidArgumentError(call=call, got=f"{flat.shape[1]} gradients", expected="one, flat [D] or a dict")
    if not bool(flat.any()):
        raise InvalidArgumentError(
            call=call, got="a zero gradient", expected="∇L ≠ 0", why="at a stationary point γ is infinite"
        )
    return flat


def _flat(vector: Direction, fisher: FisherOperator, call: str) -> Float[Tensor, " D"] | Float[Tensor, "D K"]:
    """The vector as one tensor, once it is known to fit the operator."""
    flat = fisher.space.flatten(vector) if isinstance(vector, Mapping) else vector
    columns, _ = fisher.space.to_columns(flat, call, dtype=fisher.dtype, device=fisher.device)
    return columns.reshape(flat.shape)
