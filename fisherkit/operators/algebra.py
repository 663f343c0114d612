"""Sums of Fisher operators, folded into one operator where that is exact, kept as a sum where it is not.

A sum of Kronecker products that share no factor is not one: its products are exact, its inverse is by conjugate
gradients, whose approximate inverse is here; `kronecker_sum` owns that of one layer's Kronecker products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit import io
from fisherkit.arithmetic import MatMat
from fisherkit.errors import InvalidArgumentError, InvalidTypeError
from fisherkit.operators.base import FisherOperator, Makers, fold
from fisherkit.operators.block_diagonal import BlockDiagonalOperator, CompositeOperator, in_order, join
from fisherkit.operators.factorization import diagonal_inverse
from fisherkit.operators.kronecker_sum import layer_inverse
from fisherkit.operators.persistence import blocks_of_node, restore
from fisherkit.space import ParameterSpace, finest_partition

LEAST_SHIFT = 1e-12
"""Of the mean eigenvalue: what is added to a cheap part that is singular where there is no damping."""


def add(a: FisherOperator, b: FisherOperator) -> FisherOperator:
    """A + B as one operator where the terms fold into one, else a `SumOperator`.

    Args:
        a: one term, or a sum of them.
        b: another, over the same space, of the same dtype and on the same device.

    Raises:
        InvalidArgumentError: the spaces or devices differ; the message lists the names.
        InvalidTypeError: the dtypes differ.
    """
    terms = _flatten([a, b])
    _check_terms(terms, f"{a._name} + {b._name}")
    folded: list[FisherOperator] = []
    for term in terms:
        folded = _absorb(folded, term)
    return folded[0] if len(folded) == 1 else SumOperator(folded)


class SumOperator(CompositeOperator):
    """F = F₁ + F₂ + ... of terms that do not fold into one structure.

    Products, diagonal, trace, draws and `to_dense` are the terms'; solves are by conjugate gradients; eigenvalues,
    eigenvectors, log determinant, effective dimension and Gram have no closed form.

    Args:
        terms: operators over one space, of one dtype and on one device, at least one; sums among them are flattened.
    """

    tag: ClassVar[str] = "sum"

    def __init__(self, terms: Sequence[FisherOperator]) -> None:
        self.parts = self.terms = tuple(_flatten(terms))
        _check_terms(self.terms, "SumOperator(terms)")
        first = self.terms[0]
        super().__init__(first.space, dtype=first.dtype, device=first.device)

    def _of(self, parts: Sequence[FisherOperator]) -> SumOperator:
        return SumOperator(parts)

    def _matmat(self, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        return _total(term._matmat(columns) for term in self.terms)

    def _diagonal(self) -> Float[Tensor, "D"]:
        return _total(term._diagonal() for term in self.terms)

    def _approximate_inverse(self, damping: float) -> MatMat | None:
        """Of the terms that are inverted cheaply, block by block; of the diagonal where there is nothing but those.

        Kronecker products of one layer have an inverse of their own. Rows and dense matrices beside block-diagonal
        terms are left to conjugate gradients, which need a step for each of their large eigenvalues.
        """
        found = layer_inverse(self.terms, damping)
        if found is not None:
            return found
        cheap = [term for term in self.terms if term.inversion == "cheap"]
        if not cheap:
            return diagonal_inverse(self, damping)
        part = SumOperator(cheap)
        blocks = part._blocks()
        if len(blocks) == 1 and len(cheap) == len(self.terms):
            return diagonal_inverse(self, damping)
        shift = max(damping, LEAST_SHIFT * float(part._trace()) / part.size)
        inverses = [block._approximate_inverse(shift) for block in blocks]
        whole = BlockDiagonalOperator(self.space, blocks)

        def product(columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
            pairs = zip(inverses, whole._gather(columns), strict=True)
            return whole._scatter([part if inverse is None else inverse(part) for inverse, part in pairs])

        return product

    def _draw(self, generator: torch.Generator | None, count: int) -> Float[Tensor, "D n"]:
        # Independent draws: their covariances add.
        return _total(term._draw(generator, count) for term in self.terms)

    def _to_dense(self) -> Float[Tensor, "D D"]:
        return _total(term._to_dense() for term in self.terms)

    def _terms(self) -> tuple[FisherOperator, ...]:
        return self.terms

    def _blocks(self) -> tuple[FisherOperator, ...]:
        terms: list[Makers] = [
            {block.space.names: lambda block=block: block for block in term._blocks()}  # type: ignore[misc]
            for term in self.terms
        ]
        return tuple(make() for make in _joined(self.space, terms).values())

    @classmethod
    def _blocks_of_node(cls, node: io.Node, space: ParameterSpace, reader: io.Reader) -> Makers | None:
        terms = [blocks_of_node(child, space, reader) for child in node.children]
        return _joined(space, terms) if terms else None

    def _made_of(self) -> str:
        return f"{len(self.terms):,} terms"

    @classmethod
    def _from_state(cls, space: ParameterSpace, state: io.State) -> SumOperator:
        return cls([restore(space, child) for child in state.children])


def _total(tensors: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)


def _flatten(operators: Iterable[FisherOperator]) -> list[FisherOperator]:
    return [term for operator in operators for term in operator._terms()]


def _joined(space: ParameterSpace, terms: Sequence[Makers]) -> Makers:
    """The blocks of a sum from those of its terms: joined where they overlap, each the sum of the terms' parts."""
    found: Makers = {}
    for group in finest_partition(names for blocks in terms for names in blocks):
        part = space.restrict(group)
        makers = [[make for names, make in blocks.items() if names[0] in group] for blocks in terms]
        found[part.names] = functools.partial(_sum, part, makers)
    return in_order(space, [found])


def _sum(space: ParameterSpace, terms: Sequence[Sequence[Callable[[], FisherOperator]]]) -> FisherOperator:
    return functools.reduce(add, [join(space, [make() for make in makers]) for makers in terms])


def _absorb(terms: list[FisherOperator], new: FisherOperator) -> list[FisherOperator]:
    """The terms and one more, folded into the first that can take it."""
    for index, term in enumerate(terms):
        folded = fold(term, new)
        if folded is not None:
            return [*terms[:index], folded, *terms[index + 1 :]]
    return [*terms, new]


def _check_terms(terms: Sequence[FisherOperator], call: str) -> None:
    """Raise unless all terms are over one space, of one dtype and on one device."""
    if not terms:
        raise InvalidArgumentError(call=call, got="no terms", expected="at least one operator")
    first = terms[0]
    for term in terms[1:]:
        if term.space != first.space:
            raise InvalidArgumentError(
                call=call, got=f"operators over different parameters: {_difference(first.space, term.space)}",
                expected="the same names, shapes and order", try_="build both with the same params=",
            )  # fmt: skip
        if term.dtype != first.dtype:
            raise InvalidTypeError(call=call, got=f"{first.dtype} and {term.dtype}", expected="one dtype")
        if term.device != first.device:
            raise InvalidArgumentError(call=call, got=f"{first.device} and {term.device}", expected="one device")


def _difference(a: ParameterSpace, b: ParameterSpace) -> str:
    """What two spaces do not share, in words."""
    left, right = dict(zip(a.names, a.shapes, strict=True)), dict(zip(b.names, b.shapes, strict=True))
    parts = []
    if only := [name for name in left if name not in right]:
        parts.append(f"only the first has {only}")
    if only := [name for name in right if name not in left]:
        parts.append(f"only the second has {only}")
    if changed := [name for name in left if name in right and left[name] != right[name]]:
        shapes = (f"{name!r}: {list(left[name])} and {list(right[name])}" for name in changed)
        parts.append("shapes differ in " + ", ".join(shapes))
    return "; ".join(parts) or "the names are in another order"
