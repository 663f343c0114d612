"""What each Fisher is multiplied by before they are added: its weight and its normalization.

Fishers of different kinds, tasks and fits differ in scale by orders of magnitude. Owns the normalizations and the
conversion of a relative damping; reads every block once to measure it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherkit.errors import InvalidArgumentError
from fisherkit.merging.sources import FisherSource, Names
from fisherkit.operators import Damping, FisherOperator, KroneckerOperator, RelativeDamping
from fisherkit.operators.damping import check_damping
from fisherkit.operators.normalization import frobenius_norm

NORMALIZATIONS: tuple[str | None, ...] = ("trace", "norm", "block", "output", None)
"""None: as they are. "trace": the whole Fisher's mean eigenvalue becomes 1; "norm": its root mean square eigenvalue
does; "block": the mean eigenvalue of every block; "output": the mean eigenvalue of the gradient factor of a Kronecker
product, of the block itself where it is no such product."""


@dataclass(frozen=True)
class Scales:
    """Factors of every block of every Fisher.

    Args:
        factors: c_t of each block, as many as there are Fishers.
        damping: λ.
    """

    factors: dict[Names, tuple[float, ...]]
    damping: float


def measure(
    sources: Sequence[FisherSource],
    blocks: Sequence[Names],
    weights: Sequence[float],
    normalize: str | None,
    damping: Damping,
) -> Scales:
    """Factors of all blocks and the absolute damping.

    Args:
        sources: the Fishers.
        blocks: the joined partition.
        weights: w_t.
        normalize: one of `NORMALIZATIONS`.
        damping: λ, or a multiple of the mean eigenvalue of Σ c_t F_t over all blocks.

    Raises:
        InvalidArgumentError: an unknown normalization, or a Fisher that is 0 and cannot be normalized.
        InvalidTypeError: damping is no number.

    Cost: reads every block of every Fisher once, unless nothing is normalized and the damping is absolute.
    """
    if normalize not in NORMALIZATIONS:
        raise InvalidArgumentError(
            call="merge", got=f"normalize={normalize!r}", expected=f"one of {list(NORMALIZATIONS)}"
        )
    if not isinstance(damping, RelativeDamping):
        damping = check_damping(damping, "merge")
        if normalize is None:
            return Scales(dict.fromkeys(blocks, tuple(weights)), damping)
    measured = [_measured((source.read(names) for names in blocks), normalize) for source in sources]
    factors = [
        [weight * factor for factor in _factors(own, normalize, number)]
        for number, (own, weight) in enumerate(zip(measured, weights, strict=True), 1)
    ]
    if isinstance(damping, RelativeDamping):
        traces = (
            c * block.trace
            for row, own in zip(factors, measured, strict=True)
            for c, block in zip(row, own, strict=True)
        )
        damping = damping.scale * sum(traces) / sum(block.size for block in measured[0])
    return Scales({names: tuple(row[i] for row in factors) for i, names in enumerate(blocks)}, damping)


@dataclass(frozen=True)
class _Measured:
    """One block of one Fisher: d, its trace, and what it is normalized by."""

    size: int
    trace: float
    scale: float


def _measured(blocks: Iterable[FisherOperator], normalize: str | None) -> list[_Measured]:
    sizes, found = [], []
    for block in blocks:
        sizes.append(block.size)
        trace = block.trace()
        found.append(torch.stack([trace, _scale(block, trace, normalize)]))
    # One transfer from the device for all of them.
    pairs = torch.stack(found).tolist()
    return [_Measured(size, trace, scale) for size, (trace, scale) in zip(sizes, pairs, strict=True)]


def _scale(block: FisherOperator, trace: Tensor, normalize: str | None) -> Tensor:
    if normalize == "norm":
        return frobenius_norm(block).square()
    if normalize == "output" and isinstance(block, KroneckerOperator):
        return block.gradient.diagonal().double().mean()
    return trace / block.size


def _factors(blocks: Sequence[_Measured], normalize: str | None, number: int) -> list[float]:
    """What one Fisher's blocks are multiplied by."""
    if normalize is None:
        return [1.0] * len(blocks)
    whole = sum(block.scale if normalize == "norm" else block.trace for block in blocks)
    if not 0 < whole < math.inf:
        what = "norm" if normalize == "norm" else "trace"
        raise InvalidArgumentError(
            call="merge",
            got=f"Fisher {number} with {what} {whole:g}",
            expected=f"a positive {what} to normalize by",
            why="no multiple of it has mean eigenvalue 1; empirical Fishers are 0 where the loss is exactly 0",
            try_="normalize=None, or another kind",
        )
    if normalize in ("block", "output"):
        # A block that is 0, alone among others, says nothing at any scale.
        return [1 / block.scale if block.scale > 0 else 1.0 for block in blocks]
    mean = whole / sum(block.size for block in blocks)
    return [1 / (math.sqrt(mean) if normalize == "norm" else mean)] * len(blocks)
