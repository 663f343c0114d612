"""What each Fisher is multiplied by before they are added: its weight and its normalization.

Fishers of different kinds, tasks and fits differ in scale by orders of magnitude. Owns the normalizations and the
conversion of a relative damping; reads every block once to measure it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherkit.errors import InvalidArgumentError, InvalidTypeError
from fisherkit.operators import FisherOperator, KroneckerOperator, RelativeDamping
from fisherkit.operators.damping import Damping, check_damping
from fisherkit.merging.sources import FisherSource, Names

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
    relative = isinstance(damping, RelativeDamping)
    if not relative:
        damping = check_damping(damping, "merge")
    if normalize is None and not relative:
        return Scales(dict.fromkeys(blocks, tuple(weights)), float(damping))  # type: ignore[arg-type]
    measured = [[_measured(source.read(names), normalize) for names in blocks] for source in sources]
    factors = [
        [weight * factor for factor in _factors(own, normalize, number)]
        for number, (own, weight) in enumerate(zip(measured, weights, strict=True), 1)
    ]
    size = sum(found.size for found in measured[0])
    trace = sum(c * found.trace for row, own in zip(factors, measured, strict=True) for c, found in zip(row, own, strict=True))
    absolute = damping.scale * trace / size if isinstance(damping, RelativeDamping) else float(damping)
    return Scales({names: tuple(row[i] for row in factors) for i, names in enumerate(blocks)}, absolute)
