"""How strongly an operator of a structure is usually damped.

Owns one table, by what an operator is made of; the structures' inverses know nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator

from fisherkit.operators.algebra import SumOperator
from fisherkit.operators.base import FisherOperator
from fisherkit.operators.block_diagonal import BlockDiagonalOperator
from fisherkit.operators.damping import RelativeDamping
from fisherkit.operators.diagonal import DiagonalOperator
from fisherkit.operators.kronecker import EigenKroneckerOperator, KroneckerOperator

ROWS, KRONECKER, DIAGONAL = RelativeDamping(1.0), RelativeDamping(0.1), RelativeDamping(0.01)


def usual_damping(operator: FisherOperator) -> RelativeDamping:
    """A damping that suits the structure where (F + λI)⁻¹ ranks training examples, as influence scores do.

    1 × the mean eigenvalue for rows and dense matrices (the structures full and block), 0.1 × where Kronecker products
    are among an operator's blocks or terms (kfac, ekfac), 0.01 × for diagonals. The less a matrix has of F's
    correlations, the less damping it takes. Measured on digits with linear datamodeling scores, by
    ``python -m examples.influence``; the page "Influence scores, measured" has the figures.

    Args:
        operator: any, of any structure; sums and blocks are looked into.
    """
    parts = list(_parts(operator))
    if any(isinstance(part, (KroneckerOperator, EigenKroneckerOperator)) for part in parts):
        return KRONECKER
    return DIAGONAL if all(isinstance(part, DiagonalOperator) for part in parts) else ROWS


def _parts(operator: FisherOperator) -> Iterator[FisherOperator]:
    plain = operator._unwrap()
    if isinstance(plain, (SumOperator, BlockDiagonalOperator)):
        for part in plain.terms if isinstance(plain, SumOperator) else plain.blocks:
            yield from _parts(part)
    else:
        yield plain
