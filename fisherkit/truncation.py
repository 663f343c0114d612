"""Truncated square roots of an output Fisher H: the loss gradient first, then pivoted Cholesky of what is left.

v₁ = u / √(uᵀH⁺u) is the largest multiple of the loss gradient whose square stays below H in the Loewner order; each
next vector is R e_c / √R_cc for the largest remaining diagonal entry c of R = H − Σ v vᵀ. So F₁ ≼ F₂ ≼ … ≼ F_exact,
and tr R bounds what is missing, example by example. For one softmax the vectors have a closed form: with q the
distribution of the classes that have not been pivots, v = √(p_c q̄) (e_c − q). Rank 1 is Fast Gauss-Newton (Korbit and
Zanon, arXiv 2605.06081); all ranks are the exact Cholesky factor of the multinomial covariance (Tanabe and Sagae,
1992), label first and then pivoted. Everything is in float64: R's entries are differences.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.likelihoods import Categorical
from fisherkit.outputs import Outputs, OutputVectors

Trace = Callable[[], Float[Tensor, "n"]]
Steps = Iterator[tuple[Float[Tensor, "n P C"], Trace]]
"""Each next vector, and what computes the trace that is left then."""


def truncated_vectors(outputs: Outputs, rank: int | None, tolerance: float | None) -> OutputVectors:
    """The vectors of `fisherkit.TruncatedFisher`.

    Args:
        outputs: with targets.
        rank: vectors an example; None to go by tolerance.
        tolerance: largest share of tr H that an example may lack.
    """
    known = outputs.likelihood
    labels = outputs.target is None or not outputs.target.is_floating_point()
    one_softmax = (
        outputs.z.shape[1] == 1 and isinstance(known, Categorical) and known.built_in and known.hard and labels
    )
    total, steps = (_softmax if one_softmax else _pivoted)(outputs)
    allowed = None if rank is not None else total() * (tolerance or 0.0)
    vectors: list[Tensor] = []
    left: list[Trace] = []
    for vector, trace in itertools.islice(steps, rank):
        vectors.append(vector)
        left.append(functools.cache(trace))
        if allowed is not None and not bool((left[-1]() > allowed).any()):
            break
    v = torch.stack(vectors, 1)
    keep = v.flatten(2).ne(0).any(-1)
    if allowed is not None:
        # An example keeps the shortest prefix whose remainder is within its own tolerance; never less than one vector.
        needed = torch.stack([total(), *(trace() for trace in left[:-1])], 1) > allowed.unsqueeze(1)
        needed[:, 0] = True
        keep = keep & needed

    def dropped() -> Float[Tensor, "n"]:
        kept = keep.long().cumsum(1).argmax(1)
        return torch.stack([trace() for trace in left], 1).gather(1, kept.unsqueeze(1)).squeeze(1)

    return OutputVectors(v.to(outputs.z.dtype), keep, dropped)


def _softmax(outputs: Outputs) -> tuple[Trace, Steps]:
    """Tr H and the vectors of labels under one softmax each, in closed form."""
    z = outputs.z[:, 0].double()
    target = torch.zeros_like(z[:, 0], dtype=torch.long) if outputs.target is None else outputs.target[:, 0]
    label = torch.where(outputs.mask[:, 0], target, torch.zeros_like(target))
    log_p = torch.log_softmax(z, -1)
    root = outputs.hessian_root()
    # A weight of the label multiplies H as a whole: pivots and their order are the same.
    root = None if root is None else root.double()[:, 0]
    weight = None if root is None else root.square().squeeze(1)

    def steps() -> Steps:
        pivot, remaining, log_mass = label, log_p, torch.zeros_like(log_p[:, 0])
        for _ in range(z.shape[1] - 1):
            chosen = remaining.gather(1, pivot.unsqueeze(1))
            remaining = remaining.scatter(1, pivot.unsqueeze(1), float("-inf"))
            log_rest = torch.logsumexp(remaining, -1)
            scale = (0.5 * (chosen.squeeze(1) + log_rest - log_mass)).exp().unsqueeze(1)
            scale = scale if root is None else root * scale
            rest = (remaining - log_rest.unsqueeze(1)).exp()
            log_mass = log_rest
            yield (
                (scale * (-rest).scatter(1, pivot.unsqueeze(1), 1.0)).unsqueeze(1),
                functools.partial(_trace, weight, remaining, log_mass),
            )
            pivot = remaining.argmax(1)  # the most likely class left has the largest q(1 − q)

    return functools.partial(_trace, weight, log_p, torch.zeros_like(log_p[:, 0])), steps()


def _trace(
    weight: Float[Tensor, "n"] | None, log_p: Float[Tensor, "n C"], log_mass: Float[Tensor, "n"]
) -> Float[Tensor, "n"]:
    """Trace of weight · mass · (diag q − q qᵀ) with q = p / mass, without cancellation."""
    log_q = log_p - log_mass.unsqueeze(1)
    found = log_mass.exp() * (log_q.exp() * -torch.expm1(log_q)).sum(-1)
    return found if weight is None else weight * found


def _pivoted(outputs: Outputs) -> tuple[Trace, Steps]:
    """Tr H and the vectors for any likelihood and for positions joined in one example, by products with H alone."""
    z, target = outputs.z.double(), outputs.observed
    target = target.double() if target.is_floating_point() else target
    wide = Outputs(z, target, outputs.mask, outputs.start, outputs.likelihood)
    form = torch.where(outputs.mask, wide.hessian_inverse_form().double(), 0.0).sum(1)
    first = torch.where(form > 0, form.rsqrt(), torch.zeros_like(form))[:, None, None]
    whole = wide.masked(wide.hessian_diagonal())
    full = z.shape[1] * z.shape[2]
    # What is below rounding of where an entry started is nothing; pivoting on it would make vectors of noise.
    noise = whole * (full * torch.finfo(torch.float64).eps * 16)

    def steps() -> Steps:
        vectors: list[Tensor] = []
        diagonal = whole
        # Where the gradient is zero, or leaves H's range, no multiple of it counts: the first vector is a pivot.
        v = torch.where(first > 0, first * wide.gradient(), _next(wide, vectors, diagonal))
        for _ in range(full):
            vectors.append(v)
            diagonal = diagonal - v.square()
            diagonal = torch.where(diagonal > noise, diagonal, torch.zeros_like(diagonal))
            yield v, functools.partial(_total, diagonal)
            v = _next(wide, vectors, diagonal)

    return functools.partial(_total, whole), steps()


def _total(diagonal: Float[Tensor, "n P C"]) -> Float[Tensor, "n"]:
    return diagonal.flatten(1).sum(1)


def _next(outputs: Outputs, vectors: list[Tensor], diagonal: Float[Tensor, "n P C"]) -> Float[Tensor, "n P C"]:
    """R e_c / √R_cc at the largest remaining diagonal entry; zero where nothing is left."""
    largest, place = diagonal.flatten(1).max(1)
    unit = torch.zeros_like(diagonal).flatten(1).scatter(1, place.unsqueeze(1), 1.0).view_as(diagonal)
    column = outputs.masked(outputs.hessian_matmul(unit))
    for known in vectors:
        column = column - known * known.flatten(1).gather(1, place.unsqueeze(1)).unsqueeze(-1)
    scale = torch.where(largest > 0, largest.rsqrt(), torch.zeros_like(largest))
    # An entry whose diagonal is used up has nothing left in its row either; what stands there is rounding.
    column = torch.where(diagonal > 0, column, torch.zeros_like(column))
    return column * scale[:, None, None]
