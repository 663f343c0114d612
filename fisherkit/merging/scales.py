"""What each Fisher is multiplied by before they are added: its weight and its normalization.

Fishers of different kinds, tasks and fits differ in scale by orders of magnitude. Owns the normalizations and the
conversion of a relative damping; reads every block once to measure it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherkit.merging.fishers import FisherSource, Names
from fisherkit.operators import Damping, FisherOperator, RelativeDamping
from fisherkit.operators.damping import check_damping
from fisherkit.operators.normalization import check_normalize, factor_of_size, frobenius_norm
from fisherkit.progress import bar

BY_BLOCK = ("block", "output")
"""Beside those of whole Fishers. "block": the mean eigenvalue of every block becomes 1; "output": that of the gradient
factor of a Kronecker product, of the block itself where it is no such product."""

DENSE_SIZE = 3000
"""A matrix without a direct inverse is written out and factored up to this d: d³/3 operations and 24 d² bytes, at most
a second and 216 MB; above it, conjugate gradients are cheaper."""


@dataclass(frozen=True)
class Scales:
    """Factors of every block of every Fisher.

    Args:
        factors: c_t of each block, as many as there are Fishers.
        damping: λ.
        work: about how many operations each block will cost, where they were looked at.
    """

    factors: dict[Names, tuple[float, ...]]
    damping: float
    work: dict[Names, float]


def measure(
    sources: Sequence[FisherSource],
    blocks: Sequence[Names],
    weights: Sequence[float],
    normalize: str | None,
    damping: Damping,
    call: str,
    *,
    progress: bool = False,
) -> Scales:
    """Factors of all blocks and the absolute damping.

    Args:
        sources: the Fishers.
        blocks: the joined partition.
        weights: w_t.
        normalize: of `BY_BLOCK`, or as in `fisherkit.operators.normalize`.
        damping: λ, or a multiple of the mean eigenvalue of Σ c_t F_t over all blocks.
        call: the public call, for errors.
        progress: show a progress bar.

    Raises:
        InvalidArgumentError: an unknown normalization, or a Fisher that is 0 and cannot be normalized.
        NonFiniteError: a Fisher with an infinite or NaN trace or norm.
        InvalidTypeError: damping is no number.

    Cost: reads every block of every Fisher once, unless nothing is normalized and the damping is absolute.
    """
    check_normalize(normalize, call, BY_BLOCK)
    if not isinstance(damping, RelativeDamping):
        damping = check_damping(damping, call)
        if normalize is None:
            return Scales(dict.fromkeys(blocks, tuple(weights)), damping, {})
    with bar(len(sources) * len(blocks), "reading Fishers", "blocks", shown=progress) as shown:
        measured = [_measured((source.read(names) for names in blocks), normalize, shown) for source in sources]
    rows = [
        [weight * factor for factor in _factors(own, normalize, call, f"Fisher {number}")]
        for number, (own, weight) in enumerate(zip(measured, weights, strict=True), 1)
    ]
    factors = dict(zip(blocks, zip(*rows, strict=True), strict=True))
    if isinstance(damping, RelativeDamping):
        traces = [
            c * block.trace for row, own in zip(rows, measured, strict=True) for c, block in zip(row, own, strict=True)
        ]
        damping = damping.scale * sum(traces) / sum(block.size for block in measured[0])
    work = {names: sum(own[i].work for own in measured) for i, names in enumerate(blocks)}
    return Scales(factors, damping, work)


@dataclass(frozen=True)
class _Measured:
    """One block of one Fisher: d, what merging it costs, its trace and what it is normalized by."""

    size: int
    work: float
    trace: float
    scale: float


def _measured(blocks: Iterable[FisherOperator], normalize: str | None, shown: Any) -> list[_Measured]:
    known, found = [], []
    for block in blocks:
        trace = block.trace()
        known.append((block.size, _work(block)))
        found.append(torch.stack([trace, _scale(block, trace, normalize)]))
        shown.update(1)
    # One transfer from the device for all of them.
    return [_Measured(*own, *pair) for own, pair in zip(known, torch.stack(found).tolist(), strict=True)]


def _work(block: FisherOperator) -> float:
    """Operations of one Fisher's part in solving a block, roughly, for a progress bar."""
    if block.is_diagonal:
        return 20.0 * block.size  # a few passes over memory, each slower than an operation
    # Above, conjugate gradients on a square layer: thirty steps and the factors' eigenvectors.
    return block.size**3 / 3 if block.size <= DENSE_SIZE else 160.0 * block.size**1.5


def _scale(block: FisherOperator, trace: Tensor, normalize: str | None) -> Tensor:
    if normalize == "norm":
        return frobenius_norm(block).square()
    if normalize == "output" and block.factors is not None:
        return block.factors[1].diagonal().double().mean()
    return trace / block.size


def _factors(blocks: Sequence[_Measured], normalize: str | None, call: str, label: str) -> list[float]:
    """What one Fisher's blocks are multiplied by."""
    if normalize is None:
        return [1.0] * len(blocks)
    how = "norm" if normalize == "norm" else "trace"
    whole = math.sqrt(sum(b.scale for b in blocks)) if how == "norm" else sum(b.trace for b in blocks)
    factor = factor_of_size(whole, sum(block.size for block in blocks), how, call, label)
    if normalize in BY_BLOCK:
        # A block that is 0, alone among others, says nothing at any scale.
        return [1 / block.scale if block.scale > 0 else 1.0 for block in blocks]
    return [factor] * len(blocks)
