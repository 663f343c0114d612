"""What each Fisher kind means for one example, in output space, by brute force.

Everything is derived from the loss alone: gradients and Hessians by autograd in float64, no closed form. The module
must not know about parameters, layers or batches. ``z`` is one example's outputs, ``[C]`` or ``[T, C]`` (``[]`` for a
scalar output), ``y`` its target: labels with :data:`IGNORE_INDEX` for "categorical", a tensor of ``z``'s shape
otherwise.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

Likelihood = Literal["categorical", "gaussian", "bernoulli"]
Example = Literal["sequence", "token"]
KindName = Literal["ef", "ief", "sampled", "exact", "truncated"]

IGNORE_INDEX = -100

# Rounding leaves about 1e-16 of the Hessian where its true value is zero; true directions this faint do not matter.
RELATIVE_ZERO = 1e-13


@dataclass(frozen=True)
class Kind:
    """A Fisher kind with its options.

    Attributes:
        name: Which kind.
        power: iEF only, the exponent of the gradient's norm.
        rank: Truncated only, the number of vectors (exclusive with ``tolerance``).
        tolerance: Truncated only, the fraction of the Hessian's trace that may be dropped.
    """

    name: KindName
    power: float = 1.0
    rank: int | None = None
    tolerance: float | None = None

    def __str__(self) -> str:
        """A short name for test ids."""
        options = {"ief": self.power, "truncated": self.rank if self.tolerance is None else f"tol{self.tolerance:g}"}
        return f"{self.name}{options.get(self.name, '')}"


EF = Kind("ef")
IEF = Kind("ief")
SAMPLED = Kind("sampled")
EXACT = Kind("exact")


def truncated_kind(rank: int | None = None, tolerance: float | None = None) -> Kind:
    """The truncated kind at a rank or at a tolerance."""
    return Kind("truncated", rank=rank, tolerance=tolerance)


def loss(z: Float[Tensor, "*Z"], y: Shaped[Tensor, "*Y"], likelihood: Likelihood) -> Float[Tensor, ""]:
    """Negative log-likelihood of one example, summed over unmasked positions and outputs, without constants."""
    if likelihood == "gaussian":
        return 0.5 * (z - y).square().sum()
    if likelihood == "bernoulli":
        # Not softplus: torch's is linear beyond 20, which makes the second derivative zero there.
        log_p, log_not_p = torch.nn.functional.logsigmoid(z), torch.nn.functional.logsigmoid(-z)
        return -(y * log_p + (1 - y) * log_not_p).sum()
    log_p = torch.log_softmax(z, dim=-1).reshape(-1, z.shape[-1])
    total = 0.0 * z.sum()
    for position, label in enumerate(y.reshape(-1).tolist()):
        if label != IGNORE_INDEX:
            total = total - log_p[position, label]
    return total


def gradient(z: Float[Tensor, "*Z"], y: Shaped[Tensor, "*Y"], likelihood: Likelihood) -> Float[Tensor, "*Z"]:
    """The loss gradient u in the outputs, of ``z``'s shape, float64."""
    leaf, target = _double(z), _double(y)
    leaf.requires_grad_(True)
    return torch.autograd.grad(loss(leaf, target, likelihood), leaf)[0]


def hessian(z: Float[Tensor, "*Z"], y: Shaped[Tensor, "*Y"], likelihood: Likelihood) -> Float[Tensor, "P P"]:
    """The loss Hessian H over all P positions and outputs joined (row-major), float64."""
    target = _double(y)

    def flat_loss(flat: Tensor) -> Tensor:
        return loss(flat.reshape(z.shape), target, likelihood)

    return torch.autograd.functional.hessian(flat_loss, _double(z).reshape(-1))  # type: ignore[no-untyped-call]


def square_root(matrix: Float[Tensor, "P P"]) -> Float[Tensor, "R P"]:
    """Rows s with sum of s sᵀ = ``matrix``, a symmetric PSD matrix, by eigen-decomposition."""
    values, vectors = torch.linalg.eigh(matrix)
    keep = values > RELATIVE_ZERO * values.abs().max()
    return (vectors[:, keep] * values[keep].sqrt()).T


def improved(u: Float[Tensor, "*Z"], power: float = 1.0) -> Float[Tensor, "*Z"]:
    """u / ‖u‖₂^power over all positions and outputs joined; an exactly zero gradient stays zero."""
    norm = u.square().sum().sqrt()
    return torch.zeros_like(u) if norm == 0 else u / norm.pow(power)


def truncated(
    u: Float[Tensor, " P"], h: Float[Tensor, "P P"], rank: int | None = None, tolerance: float | None = None
) -> Float[Tensor, "R P"]:
    """The gradient's direction first, then greedy pivoted Cholesky of what is left of H.

    v₁ = u / √(uᵀH⁺u); then v = R e_c / √R_cc for the output c with the largest remaining diagonal, R ← R − v vᵀ. A zero
    gradient has no direction, so that its example starts with a pivot.

    Args:
        u: Loss gradient, joined.
        h: Loss Hessian, joined.
        rank: At most this many vectors.
        tolerance: Stop at the smallest rank >= 1 with tr(R) <= tolerance · tr(H); with neither option, at full rank.

    Returns:
        The vectors as rows, fewer than ``rank`` when nothing is left before that.
    """
    residual = h.clone()
    found: list[Tensor] = []
    total = h.trace()
    squared = u @ torch.linalg.pinv(h, rtol=RELATIVE_ZERO, hermitian=True) @ u
    direction = u / squared.sqrt() if squared > 0 else None
    while residual.diagonal().max() > RELATIVE_ZERO * total and (rank is None or len(found) < rank):
        if found and tolerance is not None and residual.trace() <= tolerance * total:
            break
        if direction is None:
            pivot = int(residual.diagonal().argmax())
            direction = residual[:, pivot] / residual[pivot, pivot].sqrt()
        residual = residual - torch.outer(direction, direction)
        found.append(direction)
        direction = None
    return torch.stack(found) if found else u.new_zeros(0, u.numel())


def vectors(
    kind: Kind,
    z: Float[Tensor, "*Z"],
    y: Shaped[Tensor, "*Y"],
    likelihood: Likelihood,
    draws: Shaped[Tensor, "M *Y"] | None = None,
) -> Float[Tensor, "M *Z"]:
    """The vectors v_m of one example, all its positions joined, float64.

    Args:
        kind: Fisher kind.
        z: Outputs.
        y: Target.
        likelihood: Likelihood.
        draws: Sampled kind only, one target per draw; positions that ``y`` ignores are ignored in each draw.

    Raises:
        ValueError: The sampled kind without draws.
    """
    if kind.name == "sampled":
        if draws is None:
            raise ValueError("the sampled kind needs the drawn targets")
        if likelihood == "categorical":
            draws = draws.masked_fill(y == IGNORE_INDEX, IGNORE_INDEX)
        return torch.stack([gradient(z, draw, likelihood) for draw in draws]) / math.sqrt(len(draws))
    u = gradient(z, y, likelihood)
    if kind.name == "ef":
        return u[None]
    if kind.name == "ief":
        return improved(u, kind.power)[None]
    h = hessian(z, y, likelihood)
    if kind.name == "exact":
        return square_root(h).reshape(-1, *z.shape)
    return truncated(u.reshape(-1), h, kind.rank, kind.tolerance).reshape(-1, *z.shape)


def counted_positions(y: Shaped[Tensor, "*Y"], positions: int, likelihood: Likelihood) -> list[int]:
    """The positions (leading dimensions of z, flattened) that carry a label."""
    if likelihood != "categorical":
        return list(range(positions))
    return [t for t, label in enumerate(y.reshape(-1).tolist()) if label != IGNORE_INDEX]


def example_vectors(
    kind: Kind,
    z: Float[Tensor, "*Z"],
    y: Shaped[Tensor, "*Y"],
    likelihood: Likelihood,
    example: Example = "sequence",
    draws: Shaped[Tensor, "M *Y"] | None = None,
) -> list[Float[Tensor, "M *Z"]]:
    """The vectors of every example that one batch element holds.

    Returns:
        One ``[M, *z.shape]`` tensor per counted example: none or one for "sequence", one per unmasked position for
        "token" (zero at every other position).
    """
    outputs = z.shape[-1] if z.ndim else 1
    by_position = z.reshape(-1, outputs)
    counted = counted_positions(y, len(by_position), likelihood)
    if example == "sequence":
        return [vectors(kind, z, y, likelihood, draws)] if counted else []
    width = [] if likelihood == "categorical" else [outputs]
    targets = y.reshape(-1, *width)
    drawn = None if draws is None else draws.reshape(len(draws), -1, *width)
    found = []
    for t in counted:
        at_t = vectors(kind, by_position[t], targets[t], likelihood, None if drawn is None else drawn[:, t])
        joined = at_t.new_zeros(len(at_t), *by_position.shape)
        joined[:, t] = at_t
        found.append(joined.reshape(-1, *z.shape))
    return found


def _double(tensor: Tensor) -> Tensor:
    """A detached copy, in float64 unless it holds labels."""
    copy = tensor.detach().clone()
    return copy.double() if copy.is_floating_point() else copy
