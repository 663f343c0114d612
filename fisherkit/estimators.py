"""Stochastic estimates for operators known only by their products: trace, diagonal, spectrum, log det and its kin.

Owns Hutchinson's estimators, the Lanczos methods and what they report. Knows nothing of Fishers: an operator is
anything with the four names of `SupportsMatvec`. Random vectors come from the generator that is passed, or from a fresh
one seeded with `DEFAULT_SEED`, never from the global state: a call repeats exactly and leaves no trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.arguments import check_count, check_number, check_type
from fisherkit.arithmetic import all_finite, checked_product, without_autocast
from fisherkit.errors import InvalidArgumentError, NonFiniteError, NotConvergedWarning, warn

DEFAULT_SEED = 2406
"""Seed of the generator that is made where none is passed."""

_WORKSPACE_ENTRIES = 2**25  # probes go in batches of at most so many numbers (256 MiB in float64), or one by one


@runtime_checkable
class SupportsMatvec(Protocol):
    """A symmetric linear operator on flat vectors: its size D, their dtype and device, and the product."""

    @property
    def size(self) -> int: ...  # noqa: D102
    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102
    @property
    def device(self) -> torch.device: ...  # noqa: D102
    def matvec(self, v: Tensor, /) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True, eq=False)  # a generated == would ask a tensor for its truth value
class Estimate:
    """A Monte Carlo estimate and its error bar, in the operator's dtype and on its device.

    Args:
        value: the estimate.
        standard_error: its standard error, of the same shape; NaN where one sample leaves it unknown.
    """

    value: Tensor
    standard_error: Tensor


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A spectral density made of point masses, in the operator's dtype and on its device.

    Args:
        nodes: positions on the eigenvalue axis, ascending [P].
        weights: the share of the D eigenvalues that each node stands for [P]; positive, with sum 1.
    """

    nodes: Float[Tensor, " P"]
    weights: Float[Tensor, " P"]


@without_autocast()
def hutchinson_trace(
    operator: SupportsMatvec, *, samples: int = 100, generator: torch.Generator | None = None
) -> Estimate:
    """Estimate tr F by the mean of vᵀFv over random sign vectors v: unbiased, and exact for a diagonal F.

    Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1989.

    Args:
        operator: symmetric F.
        samples: number of sign vectors; the standard error falls as 1/√samples.
        generator: source of the sign vectors.

    Returns:
        Scalars. Cost: ``samples`` products with F, in batches of columns.
    """
    signs = _signs("hutchinson_trace", operator, samples, generator, vectors_each=3)
    return _mean((v * _product(operator, v)).sum(dim=0) for v in signs)


@without_autocast()
def hutchinson_diagonal(
    operator: SupportsMatvec, *, samples: int = 100, generator: torch.Generator | None = None
) -> Estimate:
    """Estimate diag F by the mean of v ∘ Fv over random sign vectors v: unbiased, and exact for a diagonal F.

    Bekas, Kokiopoulou and Saad, "An estimator for the diagonal of a matrix", 2007.

    Args:
        operator: symmetric F.
        samples: number of sign vectors. An entry's variance is Σ_{j≠i} F_ij² / samples, so that it may come out
            negative although F is positive semi-definite.
        generator: source of the sign vectors.

    Returns:
        Tensors [D]. Cost: ``samples`` products with F, in batches of columns.
    """
    signs = _signs("hutchinson_diagonal", operator, samples, generator, vectors_each=3)
    return _mean(v * _product(operator, v) for v in signs)


@without_autocast()
def lanczos_logdet(
    operator: SupportsMatvec, *, damping: float, samples: int = 10, steps: int = 50,
    generator: torch.Generator | None = None,
) -> Estimate:  # fmt: skip
    """Estimate log det(F + λI) by stochastic Lanczos quadrature.

    For a random sign vector v, vᵀ log(F + λI) v lies between its Gauss-Radau (node at 0) and its Gauss quadrature. The
    value is the mean of their midpoints. Half their distance is added to the standard error, which so covers too few
    steps as well as too few samples. Ubaru, Chen and Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos
    quadrature", 2017; Golub and Meurant, "Matrices, Moments and Quadrature", 2010, for the bounds.

    Args:
        operator: symmetric positive semi-definite F.
        damping: λ > 0. Below machine epsilon times the largest eigenvalue, it is lost in rounding.
        samples: number of sign vectors.
        steps: Lanczos steps for each.
        generator: source of the sign vectors.

    Returns:
        Scalars. Cost: samples · steps products with F, in batches of columns; ``steps`` vectors [D] for each column.

    Raises:
        InvalidTypeError, InvalidArgumentError: an argument that does not fit, or a clearly negative eigenvalue.
    """
    why = "products alone do not tell whether F is singular, and then log det F = -inf"

    def log_damped(x: Tensor) -> Tensor:
        # Sign vectors have vᵀv = D: the constant log λ is integrated exactly, and only F/λ is left to chance.
        return math.log(damping) + torch.log1p(x)

    return _damped_sum("lanczos_logdet", log_damped, operator, damping, samples, steps, generator, why)


@without_autocast()
def lanczos_effective_dimension(
    operator: SupportsMatvec, *, damping: float, samples: int = 10, steps: int = 50,
    generator: torch.Generator | None = None,
) -> Estimate:  # fmt: skip
    """Estimate tr(F (F + λI)⁻¹) by stochastic Lanczos quadrature, with bounds as in `lanczos_logdet`.

    Args:
        operator: symmetric positive semi-definite F.
        damping: λ > 0.
        samples: number of sign vectors.
        steps: Lanczos steps for each.
        generator: source of the sign vectors.

    Returns:
        Scalars. Cost: that of `lanczos_logdet`.

    Raises:
        InvalidTypeError, InvalidArgumentError: an argument that does not fit, or a clearly negative eigenvalue.
    """
    why = "at λ = 0 it is the rank of F, which products alone do not tell"
    return _damped_sum(
        "lanczos_effective_dimension", lambda x: x / (1 + x), operator, damping, samples, steps, generator, why
    )


@without_autocast()
def lanczos_spectrum(
    operator: SupportsMatvec, *, samples: int = 10, steps: int = 50, generator: torch.Generator | None = None
) -> Spectrum:
    """Estimate the spectral density by stochastic Lanczos quadrature; its moments below 2·steps are unbiased.

    Lin, Saad and Yang, "Approximating spectral densities of large matrices", 2016.

    Args:
        operator: symmetric F.
        samples: number of random sign vectors.
        steps: Lanczos steps, and so nodes, for each.
        generator: source of the sign vectors.

    Returns:
        At most samples · steps nodes. Cost: that of `lanczos_logdet`.
    """
    rules = [_quadrature(*rule) for rule in _tridiagonal("lanczos_spectrum", operator, samples, steps, generator)]
    nodes, order = torch.cat([nodes.flatten() for nodes, _ in rules]).sort()
    weights = torch.cat([weights.flatten() for _, weights in rules])[order]
    # Steps after a breakdown leave empty rows in the tridiagonal matrix: nodes without weight.
    nodes, weights = nodes[weights > 0], weights[weights > 0]
    return Spectrum(*(t.to(operator.device, operator.dtype) for t in (nodes, weights / weights.sum())))


@without_autocast()
def lanczos_eigenvalues(
    operator: SupportsMatvec, k: int, *, steps: int | None = None, generator: torch.Generator | None = None
) -> Float[Tensor, " k"]:
    """Compute the k largest eigenvalues by block Lanczos with full reorthogonalisation, until they have converged.

    The block has k columns because a Krylov space holds no more copies of a repeated eigenvalue than its block is wide.
    Golub and Underwood, "The block Lanczos method for computing eigenvalues", 1977.

    Args:
        operator: symmetric F.
        k: how many eigenvalues, at most D.
        steps: most products with a block; 100 by default. All eigenvalues are exact after ⌈D / k⌉.
        generator: source of the normal starting block.

    Returns:
        Eigenvalues [k], descending, in the operator's dtype and on its device. They bound the true ones from below; a
        `NotConvergedWarning` is issued if an error bound exceeds √ε of its eigenvalue (then the error itself is
        about ε, the machine epsilon) and rounding.

    Cost: one product with k columns a step, and that many vectors [D] kept.
    """
    source = _source("lanczos_eigenvalues", operator, generator)
    check_count("lanczos_eigenvalues", "k", k, most=operator.size)
    check_count("lanczos_eigenvalues", "steps", steps, optional=True)
    steps = 100 if steps is None else steps
    start = [torch.randn(operator.size, generator=source, device=source.device) for _ in range(k)]
    block = torch.linalg.qr(torch.stack(start, dim=1).to(operator.device, operator.dtype)).Q
    basis: list[Tensor] = []
    projected = torch.zeros(0, 0, dtype=torch.float64)
    eps = torch.finfo(operator.dtype).eps
    for _ in range(steps):
        basis.append(block)
        rest, border = _orthogonalize(basis, _product(operator, block))
        # All inner products are kept, not a band of them: rounding in the basis then costs no accuracy.
        old = projected.shape[0]
        projected = torch.cat([torch.cat([projected, border[:old].T]), border], dim=1)
        spectrum, vectors = torch.linalg.eigh(projected)
        scale = float(spectrum.abs().max())
        values: Tensor = spectrum[-k:]
        Q, R = torch.linalg.qr(rest)
        residual = (R.double().cpu() @ vectors[old:, -k:]).norm(dim=0)
        missed = residual > math.sqrt(eps) * values.abs() + 10 * eps * scale
        left, sizes, _ = torch.linalg.svd(R)
        # Directions that are rounding only: the Krylov space is invariant, or fills the whole space.
        new = (sizes > 10 * eps * scale)[: operator.size - projected.shape[0]]
        if not bool(missed.any()) or not bool(new.any()):
            break
        block = torch.linalg.qr(_orthogonalize(basis, Q @ left[:, : int(new.sum())])[0]).Q
    else:
        warn(
            f"lanczos_eigenvalues(k={k}): {int(missed.sum())} of {k} eigenvalues not converged after steps={steps}; "
            f"the largest error bound is {float(residual.max()):.3g}, at a largest eigenvalue of {scale:.3g}. "
            "Try: more steps.",
            NotConvergedWarning,
        )
    return values.flip(0).to(operator.device, operator.dtype)


def _damped_sum(
    name: str, function: Callable[[Tensor], Tensor], operator: SupportsMatvec, damping: float, samples: int, steps: int,
    generator: torch.Generator | None, why: str,
) -> Estimate:  # fmt: skip
    """Σ f(F/λ) over its D eigenvalues; f's derivatives are positive and negative in turn."""
    call = f"{name}(damping={damping})"
    check_number(name, "damping", damping, above=True, why=why)
    bounds = []
    for diagonal, coupling in _tridiagonal(name, operator, samples, steps, generator):
        for nodes, weights in (_quadrature(diagonal, coupling), _quadrature(_radau(diagonal, coupling), coupling)):
            if bool(nodes.min() < -math.sqrt(torch.finfo(operator.dtype).eps) * nodes.abs().max()):
                got = f"an operator with an eigenvalue of {float(nodes.min()):.3g} or less"
                raise InvalidArgumentError(call, got, "a positive semi-definite one")
            bounds.append((weights * function(nodes.clamp(min=0) / damping)).sum(dim=1))
    high, low = torch.cat(bounds[::2]), torch.cat(bounds[1::2])
    middle = _mean([0.5 * (high + low)])
    error = middle.standard_error + 0.5 * (high - low).mean().abs()
    return Estimate(*((operator.size * t).to(operator.device, operator.dtype) for t in (middle.value, error)))


def _tridiagonal(
    call: str, operator: SupportsMatvec, samples: int, steps: int, generator: torch.Generator | None
) -> Iterator[tuple[Float[Tensor, "K m"], Float[Tensor, "K m"]]]:
    """Yield batches of F's projections on Krylov spaces of sign vectors: diagonals, and couplings to the next step."""
    check_count(call, "steps", steps)
    source = _source(call, operator, generator)
    steps = min(steps, operator.size)
    eps = torch.finfo(operator.dtype).eps
    for signs in _signs(call, operator, samples, source, vectors_each=steps):
        q = signs / math.sqrt(operator.size)
        basis = torch.zeros(steps, *q.shape, dtype=q.dtype, device=q.device)
        diagonal, coupling = torch.zeros(2, steps, q.shape[1], dtype=q.dtype, device=q.device)
        for step in range(steps):
            basis[step], span = q, basis[: step + 1]
            rest = _product(operator, q)
            diagonal[step] = (q * rest).sum(dim=0)
            for _ in range(2):  # twice is enough (Kahan and Parlett)
                rest = rest - torch.einsum("mdk,mk->dk", span, torch.einsum("mdk,dk->mk", span, rest))
            norm = torch.linalg.vector_norm(rest, dim=0)
            # An invariant space: what is left is rounding. From here on the column is 0, in q as in the projection, and
            # since nothing couples the two parts, the quadrature is exact.
            alive = norm > 10 * eps * (diagonal.abs() + coupling).amax(dim=0)
            coupling[step] = torch.where(alive, norm, 0)
            q = torch.where(alive, rest / norm, 0)
            if not bool(alive.any()):
                break
        yield diagonal.T.double().cpu(), coupling.T.double().cpu()


def _quadrature(
    diagonal: Float[Tensor, "K m"], coupling: Float[Tensor, "K _"]
) -> tuple[Float[Tensor, "K m"], Float[Tensor, "K m"]]:
    """Nodes and weights of the Gauss rule of a tridiagonal matrix (Golub and Welsch, 1969)."""
    coupling = coupling[:, : diagonal.shape[1] - 1]
    matrix = torch.diag_embed(diagonal) + torch.diag_embed(coupling, 1) + torch.diag_embed(coupling, -1)
    nodes, vectors = torch.linalg.eigh(matrix)
    return nodes, vectors[:, 0].square()


def _radau(diagonal: Float[Tensor, "K m"], coupling: Float[Tensor, "K m"]) -> Float[Tensor, "K m+1"]:
    """Append the diagonal entry that makes 0 an eigenvalue of the tridiagonal matrix with one row more."""
    floor = (torch.finfo(torch.float64).eps * diagonal.amax(dim=1)).clamp(min=torch.finfo(torch.float64).tiny)
    last = torch.zeros_like(floor)
    for entry, link in zip(diagonal.T, coupling.T, strict=True):
        # The pivots of an elimination; those of a singular matrix are 0 up to rounding.
        last = link.square() / torch.maximum(entry - last, floor)
    return torch.cat([diagonal, last[:, None]], dim=1)


def _orthogonalize(
    basis: list[Tensor], columns: Float[Tensor, "D b"]
) -> tuple[Float[Tensor, "D b"], Float[Tensor, "m b"]]:
    """Remove the basis's components from columns, twice; return the rest and, on the CPU in float64, the components."""
    total: list[Tensor] = [torch.zeros((), dtype=columns.dtype, device=columns.device)] * len(basis)
    for _ in range(2):
        for i, block in enumerate(basis):
            part = block.T @ columns
            columns, total[i] = columns - block @ part, total[i] + part
    return columns, torch.cat(total).double().cpu()


def _signs(
    call: str, operator: SupportsMatvec, samples: int, generator: torch.Generator | None, *, vectors_each: int
) -> Iterator[Float[Tensor, "D _"]]:
    """Yield batches of random sign columns. Each is drawn by itself: neither batches nor dtype change the numbers."""
    check_count(call, "samples", samples)
    source = _source(call, operator, generator)
    batch = max(1, _WORKSPACE_ENTRIES // (operator.size * vectors_each))
    for start in range(0, samples, batch):
        draws = [
            torch.randint(0, 2, (operator.size,), generator=source, device=source.device, dtype=torch.int8)
            for _ in range(start, min(start + batch, samples))
        ]
        yield torch.stack(draws, dim=1).to(operator.device, operator.dtype) * 2 - 1


def _source(call: str, operator: object, generator: torch.Generator | None) -> torch.Generator:
    """The generator passed, or a fresh one on the CPU, so that all devices see the same numbers.

    Raises:
        InvalidTypeError: it is none, or the operator is none.
    """
    wanted = "a Fisher, or an object with size, dtype, device and matvec"
    check_type(call, "operator", operator, SupportsMatvec, wanted)
    check_type(call, "generator", generator, torch.Generator | None, "a torch.Generator or None")
    return torch.Generator().manual_seed(DEFAULT_SEED) if generator is None else generator


def _mean(batches: Iterable[Float[Tensor, "*E _"]]) -> Estimate:
    """Mean over the last axis of all batches, merged so that the variance does not cancel (Chan et al., 1979)."""
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        size, center = batch.shape[-1], batch.mean(dim=-1)
        delta, total = center - mean.to(center), count + batch.shape[-1]
        squares = squares.to(center) + (batch - center[..., None]).square().sum(-1) + delta**2 * (count * size / total)
        mean, count = mean.to(center) + delta * (size / total), total
    error = (squares / (count - 1) / count).sqrt() if count > 1 else torch.full_like(mean, math.nan)
    return Estimate(mean, error)


def _product(operator: SupportsMatvec, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
    """The operator's product, refused where it would spoil an estimate silently."""
    call = f"{type(operator).__name__}.matvec"
    result = checked_product(operator.matvec, columns, call)
    if not all_finite(result):
        raise NonFiniteError(call, "NaN or infinity in a product", "finite numbers")
    return result
