"""Attempts at exact-quality scores for little more than the empirical Fisher's price, robust to damping.

Rows are what `fisherkit` makes; what is tried here is which of them to keep, a damping for each layer, layers by
themselves, and a share of EKFAC below them. Knows no retraining.

With rows J of F = JᵀJ / N and any positive definite B in the place of λI, Woodbury's identity gives
qᵀ(F + B)⁻¹n = qᵀB⁻¹n − qᵀB⁻¹Jᵀ (N·I + J B⁻¹ Jᵀ)⁻¹ J B⁻¹n.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fisherkit as fk
from examples.influence.scorer import Method, Scorer, needed
from examples.influence.settings import Pair
from fisherkit.rows.base import UnitRows
from fisherkit.rows.collection import Rows, UnitSlot
from fisherkit.rows.factored import FactoredRows

Grams = list[Tensor]
"""Inner products of rows, a matrix for each layer."""


@dataclass(frozen=True)
class Candidate:
    """What is tried.

    Args:
        kind: of Fisher.
        options: of it.
        keep: how many of its rows, those of the largest norm, in multiples of N; None for all.
        by_layer: λ in multiples of each layer's own mean eigenvalue; else of the whole matrix's.
        blocks: layers by themselves.
        floor: the share ε of (1 − ε) F + ε EKFAC, of the same kind.
        kronecker: the share ε of F + (√ε A + πs I) ⊗ (√ε G + s/π I), s² = λ: KFAC of the same kind with the factored
            damping of Martens and Grosse (arXiv 1503.05671, section 6.3) in the place of λI. Its inverse is a Kronecker
            product, so that rows keep their factors and inner products their price.
    """

    kind: type[fk.FisherApproximation]
    options: Mapping[str, Any] = field(default_factory=dict)
    keep: float | None = None
    by_layer: bool = False
    blocks: bool = False
    floor: float = 0.0
    kronecker: float = 0.0


def rows_of(kind: type[fk.FisherApproximation], model: nn.Module, data: Pair, **options: Any) -> Rows:
    """The rows of a full Fisher."""
    operator = fk.operators.unwrap(kind(model, data, structure="full", **options))
    found = operator.row_source if isinstance(operator, fk.operators.LowRankOperator) else None
    if not isinstance(found, Rows):
        raise TypeError("the rows should fit in memory")
    return found


def woodbury(qn: Tensor, jq: Tensor, jn: Tensor, jj: Tensor, examples: int) -> Tensor:
    """qᵀ(F + B)⁻¹n / N of inner products under B⁻¹, float64."""
    inner = jj.clone()
    inner.diagonal().add_(examples)
    return (qn - torch.cholesky_solve(jq, torch.linalg.cholesky(inner)).mT @ jn) / examples


def fit(candidate: Candidate, model: nn.Module, train: Pair) -> Scorer:
    """A scorer.

    Args:
        candidate: what is tried.
        model: a trained one.
        train: its data.
    """
    examples = len(train[1])
    most = None if candidate.keep is None else int(candidate.keep * examples)
    rows = rows_of(candidate.kind, model, train, max_rows=most, **candidate.options)
    own = rows_of(fk.EmpiricalFisher, model, train)
    if candidate.kronecker:
        whole = rows_of(candidate.kind, model, train, **candidate.options)
        factors = [_factors(slot.rows, mine.rows) for slot, mine in zip(whole.slots, own.slots, strict=True)]
        return partial(_whitened, candidate.kronecker, model, rows, own, factors)
    if candidate.floor:
        return partial(_floored, candidate, model, train, rows, own)
    jj, jn = _grams(rows, rows), _grams(rows, own)
    return partial(_layered, candidate, model, examples, rows, own, jj, jn)


def _layered(
    candidate: Candidate,
    model: nn.Module,
    examples: int,
    rows: Rows,
    own: Rows,
    own_grams: Grams,
    train_grams: Grams,
    queries: Pair,
    damping: float | None,
) -> Tensor:
    """B = λ_l I in every layer."""
    asked = rows_of(fk.EmpiricalFisher, model, queries)
    sizes = [rows.part(slot.names).space.size for slot in rows.slots]
    means = [gram.diagonal().sum() / examples / size for gram, size in zip(own_grams, sizes, strict=True)]
    if not candidate.by_layer:
        means = [torch.stack([m * s for m, s in zip(means, sizes, strict=True)]).sum() / sum(sizes)] * len(sizes)
    weights = [1 / (needed(damping) * mean) for mean in means]
    scaled = [
        [weight * gram for weight, gram in zip(weights, grams, strict=True)]
        for grams in (_grams(asked, own), _grams(rows, asked), train_grams, own_grams)
    ]
    if candidate.blocks:
        parts = [woodbury(qn, jq, jn, jj, examples) for qn, jq, jn, jj in zip(*scaled, strict=True)]
        return torch.stack(parts).sum(0)
    qn, jq, jn, jj = (torch.stack(grams).sum(0) for grams in scaled)
    return woodbury(qn, jq, jn, jj, examples)


def _floored(
    candidate: Candidate, model: nn.Module, train: Pair, rows: Rows, own: Rows, queries: Pair, damping: float | None
) -> Tensor:
    """B = ε EKFAC + λI."""
    examples, share = len(train[1]), candidate.floor
    below = candidate.kind(model, train, structure="ekfac", **candidate.options)
    inverse = (share * below).factorize(needed(damping) * float(below.trace()) / below.size)
    asked = rows_of(fk.EmpiricalFisher, model, queries)
    j, q = rows.dense().double() * (1 - share) ** 0.5, asked.dense().double()
    n = own.dense()
    solved_n, solved_j = ((inverse @ side.to(rows.dtype).mT).double() for side in (n, j))
    return woodbury(q @ solved_n, (q @ solved_j).mT, j @ solved_n, j @ solved_j, examples)


def _factors(rows: UnitRows, own: UnitRows) -> tuple[Tensor, Tensor]:
    """KFAC's A and G of a layer without shared positions, float64."""
    if not isinstance(rows, FactoredRows) or not isinstance(own, FactoredRows) or rows.positions > 1:
        raise TypeError("a linear layer without shared positions is needed")
    inputs = torch.cat([a[:, 0] for _, a in own.chunks(constant=own.bias)]).double()
    outputs = rows.gradients[:, 0].double()
    return inputs.mT @ inputs / len(inputs), outputs.mT @ outputs / len(inputs)


def _whitened(
    share: float,
    model: nn.Module,
    rows: Rows,
    own: Rows,
    factors: list[tuple[Tensor, Tensor]],
    queries: Pair,
    damping: float | None,
) -> Tensor:
    """B a Kronecker product in every layer, λ in multiples of the mean eigenvalue of F."""
    asked = rows_of(fk.EmpiricalFisher, model, queries)
    trace = float(torch.stack([a.trace() * g.trace() for a, g in factors]).sum())
    root = (needed(damping) * trace / rows.space.size) ** 0.5
    turned: tuple[list[UnitSlot], ...] = ([], [], [])
    for place, (a, g) in enumerate(factors):
        ratio = float(((a.trace() / len(a)) / (g.trace() / len(g))) ** 0.5)
        on = [_half_inverse(share**0.5 * m, shift) for m, shift in ((a, root * ratio), (g, root / ratio))]
        for slots, side in zip(turned, (rows, asked, own), strict=True):
            slot = side.slots[place]
            if not isinstance(slot.rows, FactoredRows):
                raise TypeError("a linear layer is needed")
            parts = list(slot.rows.double().rotated(*on))
            slots.append(UnitSlot(slot.names, FactoredRows.cat(parts)))
    j, q, n = (Rows(rows.space, slots) for slots in turned)
    found = woodbury(q.cross_gram(n), j.cross_gram(q), j.cross_gram(n), j.gram(), own.count)
    return found.detach()


def _half_inverse(matrix: Tensor, shift: float) -> Tensor:
    """W with W Wᵀ = (matrix + shift · I)⁻¹."""
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(matrix + shift * eye), eye, upper=False).mT


def _grams(left: Rows, right: Rows) -> Grams:
    return [gram for _, gram in left.cross_gram_by_unit(right)]


_TWO: Mapping[str, Any] = {"rank": 2}

CANDIDATES: Mapping[str, Method] = {
    name: partial(fit, candidate)
    for name, candidate in {
        "full, exact, 2N rows": Candidate(fk.ExactFisher, keep=2),
        "full, exact, N rows": Candidate(fk.ExactFisher, keep=1),
        "full, truncated 2, N rows": Candidate(fk.TruncatedFisher, _TWO, keep=1),
        "full, truncated 2, λ by layer": Candidate(fk.TruncatedFisher, _TWO, by_layer=True),
        "block, truncated 2, λ by layer": Candidate(fk.TruncatedFisher, _TWO, by_layer=True, blocks=True),
        "full, truncated 2, N rows, λ by layer": Candidate(fk.TruncatedFisher, _TWO, keep=1, by_layer=True),
        "full, exact, N rows, λ by layer": Candidate(fk.ExactFisher, keep=1, by_layer=True),
        "full, exact, N rows + 0.3 EKFAC": Candidate(fk.ExactFisher, keep=1, floor=0.3),
        "full, exact, N rows + 0.1 KFAC": Candidate(fk.ExactFisher, keep=1, kronecker=0.1),
        "full, exact, N rows + 0.3 KFAC": Candidate(fk.ExactFisher, keep=1, kronecker=0.3),
        "full, exact, N rows + KFAC": Candidate(fk.ExactFisher, keep=1, kronecker=1.0),
        "full, exact, N rows + 3 KFAC": Candidate(fk.ExactFisher, keep=1, kronecker=3.0),
    }.items()
}
"""By name."""
