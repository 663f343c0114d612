"""What the demo compares: the kinds, their names in tables and pictures, and the damping."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from fisherkit.fisher import FisherApproximation
from fisherkit.kinds import EmpiricalFisher, ExactFisher, ImprovedEmpiricalFisher, SampledFisher, TruncatedFisher
from fisherkit.operators import RelativeDamping

Batch = tuple[Tensor, Tensor]

KINDS: dict[str, Callable[..., FisherApproximation]] = {
    "EF": EmpiricalFisher,
    "SF, 1 draw": SampledFisher,
    "iEF": ImprovedEmpiricalFisher,
    "truncated, rank 1": partial(TruncatedFisher, rank=1),
    "truncated, rank 2": partial(TruncatedFisher, rank=2),
    "truncated, rank 3": partial(TruncatedFisher, rank=3),
    "truncated, 1e-2": partial(TruncatedFisher, tolerance=1e-2),
    "exact": ExactFisher,
}
"""The kinds that are compared, by the names that tables and pictures give them."""

DAMPING = RelativeDamping(1e-4)
"""Near zero, as in the paper's evaluation: the update is the kind's own, and the linear solve still well posed."""
