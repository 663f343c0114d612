"""Sums of Fisher operators, folded into one operator where that is exact, kept as a sum where it is not.

A sum of Kronecker products that share no factor is not one, so that it stays a sum: its products are exact, its inverse
is by conjugate gradients. Knows the structures only through their `_plus`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit import io
from fisherkit.errors import InvalidArgumentError, InvalidTypeError
from fisherkit.operators.base import FisherOperator
from fisherkit.operators.factorization import Factorization, IterativeFactorization
from fisherkit.operators.persistence import restore
from fisherkit.space import ParameterSpace


def add(a: FisherOperator, b: FisherOperator) -> FisherOperator:
    """A + B as the simplest operator that is exactly that.

    Args:
        a: one term, or a sum of them.
        b: another, over the same space, of the same dtype and on the same device.

    Returns:
        One operator where the terms fold into one, else a `SumOperator`.

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


def fold(a: FisherOperator, b: FisherOperator) -> FisherOperator | None:
    """A + B as one operator of one structure if either knows how, else None; both over the same space."""
    folded = a._plus(b)
    return b._plus(a) if folded is None else folded


class SumOperator(FisherOperator):
    """F = F₁ + F₂ + ... of terms that do not fold into one structure.

    Products, diagonal, trace, draws and `to_dense` are the terms'; solves are by conjugate gradients; eigenvalues,
    eigenvectors, log determinant, effective dimension and Gram have no closed form.

    Args:
        terms: operators over one space; sums among them are flattened.

    Raises:
        InvalidArgumentError: no terms, or spaces or devices that differ.
        InvalidTypeError: dtypes that differ.
    """

    kind: ClassVar[str] = "sum"

    def __init__(self, terms: Sequence[FisherOperator]) -> None:
        self.terms = tuple(_flatten(terms))
        _check_terms(self.terms, "SumOperator(terms)")
        first = self.terms[0]
        super().__init__(first.space, dtype=first.dtype, device=first.device)

    def _matmat(self, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        return _total(term._matmat(columns) for term in self.terms)

    def _diagonal(self) -> Float[Tensor, "D"]:
        return _total(term._diagonal() for term in self.terms)

    def _trace(self) -> Float[Tensor, ""]:
        return _total(term._trace() for term in self.terms)

    def _factorize(self, damping: float, tolerance: float, max_steps: int | None) -> Factorization:
        # Which part can be inverted is told by structures, and those of blocks are themselves made of sums.
        from fisherkit.operators.sum_preconditioner import preconditioner_of_sum

        make = functools.partial(preconditioner_of_sum, self)
        return IterativeFactorization(self, damping, tolerance, max_steps, make)

    def _draw(self, generator: torch.Generator | None) -> Float[Tensor, "D 1"]:
        return self._draws(generator, 1)

    def _draws(self, generator: torch.Generator | None, count: int) -> Float[Tensor, "D n"]:
        # Independent draws: their covariances add.
        return _total(term._draws(generator, count) for term in self.terms)

    def _scaled(self, scale: float) -> SumOperator:
        return SumOperator([term._scaled(scale) for term in self.terms])

    def _to_dense(self) -> Float[Tensor, "D D"]:
        return _total(term._to_dense() for term in self.terms)

    def _made_of(self) -> str:
        return f"{len(self.terms):,} terms"

    def _state(self) -> io.State:
        return io.State(self.kind, self.space.names, children=tuple(term._state() for term in self.terms))

    @classmethod
    def _from_state(cls, space: ParameterSpace, state: io.State) -> SumOperator:
        return cls([restore(space, child) for child in state.children])


def _total(tensors: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)


def _flatten(operators: Iterable[FisherOperator]) -> list[FisherOperator]:
    terms: list[FisherOperator] = []
    for operator in operators:
        plain = operator._unwrap()
        terms.extend(plain.terms if isinstance(plain, SumOperator) else [plain])
    return terms


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
                call=call,
                got=f"operators over different parameters: {_difference(first.space, term.space)}",
                expected="the same names, shapes and order",
                try_="build both with the same params=",
            )
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
