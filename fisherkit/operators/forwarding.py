"""Operators that hold another one and answer as it does: every hook is forwarded, in one loop.

A packed one has its numbers in a coarser dtype than it computes in: half of the memory, or a quarter. What is rounded
is a form in which rounding leaves a Fisher matrix a Fisher matrix: entries of a diagonal, and of Kronecker factors
their eigenvectors, made orthonormal again where they are used, so that eigenvalues, traces and determinants stay what
they were and only directions turn. The wide form is there while it is the one that was used last.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch

from fisherkit import io
from fisherkit.errors import FisherkitError
from fisherkit.operators.base import HOOKS, FisherOperator
from fisherkit.operators.composite import BlockDiagonalOperator
from fisherkit.operators.linalg import nearest_orthonormal
from fisherkit.operators.persistence import restore
from fisherkit.space import ParameterSpace


def _forwarded(name: str) -> Any:
    """A hook that asks the held operator, whose refusals are then the holder's."""
    original = vars(FisherOperator)[name]

    def ask(self: ForwardingOperator, *arguments: Any, **options: Any) -> Any:
        try:
            found = getattr(self.held, name)
            return found if isinstance(original, property) else found(*arguments, **options)
        except FisherkitError as error:
            call = error.call.removeprefix(f"{self.held._name}.")
            if call == error.call:
                raise
            raise error.at(f"{self._name}.{call}") from error

    if isinstance(original, property):
        return property(ask, doc=original.__doc__)
    return functools.wraps(original, updated=())(ask)


class ForwardingOperator(FisherOperator):
    """An operator that another one answers for; metadata, and the name in errors, are its own."""

    held: FisherOperator
    """The other one."""

    _matmat = _forwarded("_matmat")
    _diagonal = _forwarded("_diagonal")
    _draw = _forwarded("_draw")
    _scaled = _forwarded("_scaled")
    _state = _forwarded("_state")

    def _made_of(self) -> str:
        return ""  # its own metadata say it


for _name in HOOKS:
    original = vars(FisherOperator)[_name]
    if _name not in vars(ForwardingOperator) and not isinstance(original, classmethod):  # a class holds nothing
        setattr(ForwardingOperator, _name, _forwarded(_name))


def unwrap(operator: FisherOperator) -> FisherOperator:
    """The operator that does the algebra: of a Fisher of a model the structure that was built, else itself; shared."""
    return operator.held if isinstance(operator, ForwardingOperator) else operator


# -- numbers in a coarser dtype ----------------------------------------------------------------------------------------


_LATEST: WeakKeyDictionary[PackedOperator, FisherOperator] = WeakKeyDictionary()
"""The operator that was used last, in its wide form: an operation asks several things of it."""


class PackedOperator(ForwardingOperator):
    """scale times the operator of a state, some of whose tensors are in a coarser dtype than its vectors.

    Args:
        space: the parameters it acts on.
        state: as an operator's ``_packed`` gave it.
        dtype: of its vectors, and of its arithmetic.
        scale: a factor, so that a multiple is not rounded again.
    """

    tag: ClassVar[str] = "packed"

    def __init__(self, space: ParameterSpace, state: io.State, dtype: torch.dtype, scale: float = 1.0) -> None:
        super().__init__(space, dtype=dtype, device=state.all_tensors()[0].device)
        self.packed, self.scale = state, scale

    @property
    def held(self) -> FisherOperator:  # type: ignore[override]
        """The operator of all tensors in the vectors' dtype."""
        found = _LATEST.get(self)
        if found is None:
            _LATEST.clear()
            wide = dict(self.packed.tensors)
            for name, tensor in wide.items():
                if name.endswith("_basis"):
                    wide[name] = nearest_orthonormal(tensor.to(self.dtype))
                elif tensor.is_floating_point():  # eigenvalues may be in float64
                    wide[name] = tensor.to(torch.promote_types(tensor.dtype, self.dtype))
            whole = restore(self.space, io.State(self.packed.tag, self.space.names, wide, self.packed.options))
            found = _LATEST[self] = whole if self.scale == 1 else whole._scaled(self.scale)
        return found

    def _packed(self, dtype: torch.dtype) -> io.State | None:
        return None

    def _scaled(self, scale: float) -> PackedOperator:
        return PackedOperator(self.space, self.packed, self.dtype, scale * self.scale)

    def _terms(self) -> tuple[FisherOperator, ...]:
        return (self,)

    def _blocks(self) -> tuple[FisherOperator, ...]:
        return (self,)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def _state(self) -> io.State:
        options = {"dtype": str(self.dtype).removeprefix("torch."), "scale": self.scale}
        return io.State(self.tag, self.space.names, options=options, children=(self.packed,))

    @classmethod
    def _from_state(cls, space: ParameterSpace, state: io.State) -> PackedOperator:
        (child,), options = state.children, state.options
        found = cls(space, child, getattr(torch, options["dtype"]), float(options["scale"]))
        _ = found.held  # whose checks are the file's
        return found


def packed(operator: FisherOperator, dtype: torch.dtype | None) -> FisherOperator:
    """The operator with its numbers in a dtype, where it knows how and they are in a wider one; None for none."""
    if dtype is None or torch.finfo(dtype).bits >= torch.finfo(operator.dtype).bits:
        return operator
    if len(blocks := operator._blocks()) > 1:  # each by itself, so that they are the blocks of the result
        return BlockDiagonalOperator(operator.space, [packed(block, dtype) for block in blocks])
    state = operator._packed(dtype)
    return operator if state is None else PackedOperator(operator.space, state, operator.dtype)
