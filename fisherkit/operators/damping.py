"""Damping in parameter space, absolute or relative to the operator's own scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fisherkit.errors import InvalidArgumentError, InvalidTypeError


@dataclass(frozen=True)
class RelativeDamping:
    """Damping as a multiple of the operator's mean eigenvalue: λ = scale · trace(F) / D.

    Args:
        scale: the multiple, not negative. The same value means the same strength for kinds on different scales.
    """

    scale: float

    def __post_init__(self) -> None:
        """Check the scale."""
        check_damping(self.scale, "RelativeDamping")


Damping = float | RelativeDamping


def check_damping(damping: float, call: str) -> float:
    """The damping as a float.

    Raises:
        InvalidTypeError: not a number.
        InvalidArgumentError: negative, NaN or infinite.
    """
    if isinstance(damping, bool) or not isinstance(damping, (int, float)):
        raise InvalidTypeError(
            call=call,
            got=f"damping of type {type(damping).__name__}",
            expected="a float or fk.RelativeDamping",
            try_="float(damping)",
        )
    if not math.isfinite(damping) or damping < 0:
        raise InvalidArgumentError(
            call=f"{call}(damping={damping})",
            got=f"damping {damping}",
            expected="a finite number, 0 or more",
            why="F + damping·I must stay positive semi-definite",
        )
    return float(damping)
