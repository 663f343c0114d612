"""What each Fisher is multiplied by before they are added: its weight and its normalization.

Fishers of different kinds, tasks and fits differ in scale by orders of magnitude. Owns the normalizations and the
conversion of a relative damping; reads every block once to measure it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fisherkit.merging.sources import FisherSource, Names
from fisherkit.merging.systems import DENSE_SIZE
from fisherkit.operators import Damping, FisherOperator, RelativeDamping
from fisherkit.operators.damping import check_damping
from fisherkit.operators.normalization import check_normalize, factor_of_size, frobenius_norm
from fisherkit.progress import bar

USUAL_STEPS = 30
"""Of conjugate gradients on a layer, for `_work`."""

BY_BLOCK = ("block", "output")
"""Beside those of whole Fishers. "block": the mean eigenvalue of every block becomes 1; "output": that of the gradient
factor of a Kronecker product, of the block itself where it is no such product."""


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
    work: dict[Names, float] = field(default_factory=dict)


def measure(
    sources: Sequence[FisherSource],
    blocks: Sequence[Names],
    weights: Sequence[float],
    normalize: str | None,
    damping: Damping,
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
        progress: show a progress bar.

    Raises:
        InvalidArgumentError: an unknown normalization, or a Fisher that is 0 and cannot be normalized.
        NonFiniteError: a Fisher with an infinite or NaN trace or norm.
        InvalidTypeError: damping is no number.

    Cost: reads every block of every Fisher once, unless nothing is normalized and the damping is absolute.
    """
    check_normalize(normalize, "merge", BY_BLOCK)
    if not isinstance(damping, RelativeDamping):
        damping = check_damping(damping, "merge")
        if normalize is None:
            return Scales(dict.fromkeys(blocks, tuple(weights)), damping)
    with bar(len(sources) * len(blocks), "reading Fishers", "blocks", shown=progress) as shown:
        measured = [_measured((source.read(names) for names in blocks), normalize, shown.update) for source in sources]
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
    return Scales(
        {names: tuple(row[i] for row in factors) for i, names in enumerate(blocks)}, damping,
        {names: sum(own[i].work for own in measured) for i, names in enumerate(blocks)},
    )  # fmt: skip


@dataclass(frozen=True)
class _Measured:
    """One block of one Fisher: d, its trace, what it is normalized by, and what it costs to merge."""

    size: int
    trace: float
    scale: float
    work: float


def _measured(
    blocks: Iterable[FisherOperator], normalize: str | None, tell: Callable[[int], object]
) -> list[_Measured]:
    sizes, works, found = [], [], []
    for block in blocks:
        sizes.append(block.size)
        works.append(_work(block))
        trace = block.trace()
        found.append(torch.stack([trace, _scale(block, trace, normalize)]))
        tell(1)
    # One transfer from the device for all of them.
    pairs = torch.stack(found).tolist()
    return [_Measured(size, trace, scale, work) for size, work, (trace, scale) in zip(sizes, works, pairs, strict=True)]


def _work(block: FisherOperator) -> float:
    """Operations of one Fisher's part in solving a block, roughly: what weighs in a bar, and decides nothing."""
    size = block.size
    if block.is_diagonal:
        return 20.0 * size  # a few passes over memory, each slower than an operation
    if size > DENSE_SIZE and block.layout is not None:
        outputs, width = block.layout.outputs, block.layout.width
        return 2.0 * USUAL_STEPS * (outputs + width) * size + 20.0 * (outputs**3 + width**3)
    if size > DENSE_SIZE and block.stored_rows is not None:
        return 2.0 * block.stored_rows[0].count ** 2 * size
    return size**3 / 3


def _scale(block: FisherOperator, trace: Tensor, normalize: str | None) -> Tensor:
    if normalize == "norm":
        return frobenius_norm(block).square()
    if normalize == "output" and block.factors is not None:
        return block.factors[1].diagonal().double().mean()
    return trace / block.size


def _factors(blocks: Sequence[_Measured], normalize: str | None, number: int) -> list[float]:
    """What one Fisher's blocks are multiplied by."""
    if normalize is None:
        return [1.0] * len(blocks)
    if normalize == "norm":
        whole, how = math.sqrt(sum(block.scale for block in blocks)), "norm"
    else:
        whole, how = sum(block.trace for block in blocks), "trace"
    factor = factor_of_size(whole, sum(block.size for block in blocks), how, "merge", f"Fisher {number}")
    if normalize in BY_BLOCK:
        # A block that is 0, alone among others, says nothing at any scale.
        return [1 / block.scale if block.scale > 0 else 1.0 for block in blocks]
    return [factor] * len(blocks)
