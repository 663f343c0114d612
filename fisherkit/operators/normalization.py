"""One scale for Fishers of different kinds, examples and stages of training: what `normalize=` means everywhere.

Beside it the damping, relative to that scale, that suits a structure.
"""

from __future__ import annotations

import math

from fisherkit.arguments import check_choice, check_type
from fisherkit.arithmetic import without_autocast
from fisherkit.errors import InvalidArgumentError, NonFiniteError
from fisherkit.operators.base import FisherOperator
from fisherkit.operators.damping import RelativeDamping

NORMALIZATIONS = ("trace", "norm", None)


def check_normalize(how: object, call: str, also: tuple[str, ...] = ()) -> None:
    """Refuse what is not "trace", "norm", None or one of ``also``."""
    check_choice(call, "normalize", how, (*also, *NORMALIZATIONS))


@without_autocast()
def normalize(operator: FisherOperator, how: str | None = "trace") -> FisherOperator:
    """F times the one number that gives it a standard size.

    Args:
        operator: F.
        how: "trace" for F · D / trace F, whose mean eigenvalue is 1; "norm" for F · √D / ‖F‖_F, whose root mean square
            eigenvalue is 1; None for F itself.

    Raises:
        InvalidTypeError: not a FisherOperator.
        InvalidArgumentError: another ``how``, or F = 0.
        NonFiniteError: the trace or norm is infinite or NaN.
        NoClosedFormError: "norm" of rows whose Gram matrix does not fit the memory budget.

    Cost: "trace" that of the trace; "norm" that of a Gram matrix for rows, of D products for a sum that does not fold
        and for an operator of your own that does not tell its norm.
    """
    call = f"normalize({how!r})"
    check_normalize(how, call)
    factor = normalization_factor(operator, how, call)
    return operator if how is None else factor * operator


def normalization_factor(operator: FisherOperator, how: str | None, call: str) -> float:
    """The number that `normalize` multiplies by."""
    check_type(call, "", operator, FisherOperator, "a FisherOperator")
    if how is None:
        return 1.0
    size = float(operator.trace() if how == "trace" else operator._frobenius())
    return factor_of_size(size, operator.size, how, call)


def factor_of_size(size: float, dimension: int, how: str, call: str, name: str = "a Fisher") -> float:
    """The number that gives a Fisher of known size its standard one; refuses sizes that are 0 or not finite."""
    if not math.isfinite(size):
        raise NonFiniteError(call, f"{name} with {how} {size}", "finite numbers")
    if size <= 0:
        raise InvalidArgumentError(
            call, f"{name} that is 0 ({how} {size:g})", f"one with a positive {how}",
            why="no multiple of it has mean eigenvalue 1; empirical Fishers are 0 where the loss is exactly 0",
            try_="normalize=None, or another kind",
        )  # fmt: skip
    return (dimension if how == "trace" else math.sqrt(dimension)) / size


def usual_damping(operator: FisherOperator) -> RelativeDamping:
    """A damping that suits the structure where (F + λI)⁻¹ ranks training examples, as influence scores do.

    1 × the mean eigenvalue for rows and dense matrices (the structures full and block), 0.1 × where Kronecker products
    are among an operator's blocks or terms (kfac, ekfac), 0.01 × for diagonals. The less a matrix has of F's
    correlations, the less damping it takes. Measured on digits with linear datamodeling scores, by
    ``python -m examples.influence``; the page "Influence scores, measured" has the figures.

    Args:
        operator: any; sums and blocks are looked into.

    Raises:
        NoClosedFormError: an operator of your own, or one of its blocks or terms, that does not tell its damping.
    """
    return RelativeDamping(operator._usual_damping())
