"""An approximate inverse of a sum for conjugate gradients: of the part of it that can be inverted block by block.

Owns which terms count as that part; `kronecker_sum` owns the inverse of a layer's Kronecker products. What is solved
for is never approximated.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.conjugate import MatMat
from fisherkit.operators.algebra import SumOperator
from fisherkit.operators.base import FisherOperator
from fisherkit.operators.block_diagonal import BlockDiagonalOperator
from fisherkit.operators.diagonal import DiagonalOperator
from fisherkit.operators.factorization import diagonal_inverse
from fisherkit.operators.kronecker import EigenKroneckerOperator, KroneckerOperator
from fisherkit.operators.kronecker_sum import layer_inverse
from fisherkit.operators.partition import split

LEAST_SHIFT = 1e-12
"""Of the mean eigenvalue: what is added where a part is singular and there is no damping."""


def preconditioner_of_sum(operator: SumOperator, damping: float) -> MatMat:
    """Product with an approximate inverse of Σ_t F_t + λI.

    Kronecker products of one layer have one of their own. Rows and dense matrices beside block-diagonal terms are left
    to conjugate gradients, which need a step for each of their large eigenvalues; the block-diagonal terms are inverted
    block by block. Where there is nothing but rows and dense matrices, it is the diagonal that is inverted.

    Args:
        operator: the sum.
        damping: λ.
    """
    found = layer_inverse(operator.terms, damping)
    if found is not None:
        return found
    easy = [term for term in operator.terms if _is_easy(term)]
    if not easy:
        return diagonal_inverse(_diagonal_of(operator), damping)
    part = easy[0] if len(easy) == 1 else SumOperator(easy)
    shift = max(damping, LEAST_SHIFT * float(part._trace()) / part.size)
    blocks = split(part)
    if len(blocks) == 1 and len(easy) == len(operator.terms):
        return diagonal_inverse(_diagonal_of(operator), damping)
    inverses = [_block_inverse(block, shift) for block in blocks]
    whole = BlockDiagonalOperator(operator.space, blocks)

    def product(columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        parts = whole._gather(columns)
        return whole._scatter([inverse(part) for inverse, part in zip(inverses, parts, strict=True)])

    return product


def _is_easy(term: FisherOperator) -> bool:
    if isinstance(term, BlockDiagonalOperator):
        return all(_is_easy(block) for block in term.blocks)
    return isinstance(term, (DiagonalOperator, KroneckerOperator, EigenKroneckerOperator))


def _block_inverse(block: FisherOperator, shift: float) -> MatMat:
    if isinstance(block, SumOperator):
        return preconditioner_of_sum(block, shift)
    return block._factorize(shift, LEAST_SHIFT, None)._solve


def _diagonal_of(operator: SumOperator) -> DiagonalOperator:
    return DiagonalOperator(operator.space, torch.stack([term._diagonal() for term in operator.terms]).sum(0))
