"""Damping in parameter space, absolute or relative to the operator's own scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from fisherkit.arguments import LARGEST, is_number, shown
from fisherkit.errors import InvalidArgumentError, InvalidTypeError


@dataclass(frozen=True)
class RelativeDamping:
    """Damping as a multiple of the operator's mean eigenvalue: λ = scale · trace(F) / D.

    Args:
        scale: the multiple, not negative. The same value means the same strength for kinds on different scales.
    """

    scale: float

    def __post_init__(self) -> None:
        check_damping(self.scale, "RelativeDamping")


Damping = float | RelativeDamping


class _Required:
    """Stands where a damping was not passed."""

    def __repr__(self) -> str:
        return "<required>"


REQUIRED: Final[Any] = _Required()
"""Default of a damping that must be passed. Python's own error for a missing argument cannot say which one to take."""


def check_damping(damping: float, call: str) -> float:
    """The damping as a float; refuses `REQUIRED`, what is no number, and what is negative, NaN or infinite."""
    if damping is REQUIRED:
        raise InvalidTypeError(
            call, "no damping", "λ of F + λI, a float or fk.RelativeDamping",
            why="F's scale differs by orders of magnitude between models, data and kinds, and no one number suits all",
            try_="damping=fk.RelativeDamping(1e-3), a thousandth of F's mean eigenvalue; damping=0.0 for F itself",
        )  # fmt: skip
    if not is_number(damping):
        raise InvalidTypeError(
            call, f"damping of type {type(damping).__name__}", "a float or fk.RelativeDamping", try_="float(damping)"
        )
    if not 0 <= damping <= LARGEST:
        raise InvalidArgumentError(
            f"{call}(damping={shown(damping)})", f"damping {shown(damping)}", "a finite number, 0 or more",
            why="F + damping·I must stay positive semi-definite",
        )  # fmt: skip
    return float(damping)
