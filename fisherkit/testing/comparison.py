"""One conformance check in progress: two sides, tolerances, and how results are compared and refusals judged.

Owns `ConformanceError` and `ConformanceReport`; knows an operator's dtype, device and space, and no operation of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.errors import FisherkitError, InvalidArgumentError, MemoryBudgetError, NoClosedFormError
from fisherkit.operators import Damping, FisherOperator, RelativeDamping

TOLERANCES: dict[torch.dtype, float] = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Largest relative error that `check_fisher` accepts by default; 5e-2 for narrower dtypes."""

MAY_BE_REFUSED = frozenset({"gram", "eigenvalues", "eigenvectors", "effective_dimension", "logdet", "save"})
"""Operations that a structure may answer with `NoClosedFormError`; every other one must have an answer."""

NEEDS_A_SQUARE_MATRIX = frozenset({"gram", "eigenvalues", "to_dense", "logdet"})
"""Operations that a structure may answer with `MemoryBudgetError`."""

_T = TypeVar("_T")


class ConformanceError(FisherkitError, AssertionError):
    """An operator's answer is not its matrix's, or does not have the form that the contract promises."""


@dataclass(frozen=True)
class ConformanceReport:
    """What `check_fisher` measured.

    Args:
        errors: operation to its largest relative error.
        refused: operations without a closed form, or without the memory for one.
        tolerance: what the errors were held against.
    """

    errors: dict[str, float]
    refused: tuple[str, ...]
    tolerance: float

    @property
    def worst(self) -> tuple[str, float]:
        """The operation with the largest error, and that error."""
        operation = max(self.errors, key=self.errors.__getitem__)
        return operation, self.errors[operation]

    def __str__(self) -> str:
        """A line for each operation."""
        lines = [f"{operation:<20}{error:.1e}" for operation, error in self.errors.items()]
        return "\n".join([*lines, *(f"{operation:<20}no closed form" for operation in self.refused)])


class Check:
    """One check in progress: the operator, the matrix that it should be, the vectors, and what was found so far."""

    def __init__(self, operator: FisherOperator, matrix: Tensor, tolerance: float, generator: torch.Generator) -> None:
        self.operator, self.matrix, self.tolerance, self.generator = operator, matrix, tolerance, generator
        self.errors: dict[str, float] = {}
        self.refused: set[str] = set()
        self.columns = self.normal(operator.size, 3)
        # A residual grows into an error by at most the condition number, about 100 here. In float32 this may be below
        # rounding, and an iterative solver warns; the error against the matrix decides.
        self.residual = max(1e-3 * tolerance, 10 * torch.finfo(operator.dtype).eps)
        self.values = torch.linalg.eigvalsh(matrix).clamp_min(0).flip(0)
        largest = float(self.values[0])
        self.dampings: tuple[tuple[Damping, float], ...] = ((1.0, 1.0), (0.1, 0.1))
        if largest > 0:
            relative = 0.01 * largest * operator.size / float(matrix.trace())
            self.dampings = (0.1 * largest, 0.1 * largest), (RelativeDamping(relative), 0.01 * largest)

    def normal(self, *shape: int) -> Tensor:
        """Normal numbers in the operator's dtype and on its device."""
        drawn = torch.randn(*shape, generator=self.generator, device=self.generator.device, dtype=torch.float64)
        return drawn.to(self.operator.device, self.operator.dtype)

    def seed(self) -> int:
        """A seed."""
        return int(torch.randint(1 << 31, (1,), generator=self.generator, device=self.generator.device))

    def shifted(self, damping: float) -> Tensor:
        """The matrix plus damping·I."""
        return self.matrix + damping * torch.eye(len(self.matrix), dtype=torch.float64, device=self.matrix.device)

    def columns_of(self, vector: Any) -> Tensor:
        """A vector of any form as columns."""
        flat: Tensor = vector if isinstance(vector, Tensor) else self.operator.space.flatten(vector)
        return flat.reshape(len(flat), -1)

    def name(self, operation: str) -> str:
        """The call, for messages."""
        return f"{type(self.operator).__name__}.{operation}"

    def compare(
        self, operation: str, got: Any, expected: Tensor, *, detail: str = "", dtype: torch.dtype | None = None,
        scale: float | None = None,
    ) -> None:  # fmt: skip
        """Hold a result's form and values against the matrix's; ``scale`` is what the error is relative to."""
        call, wanted = self.name(f"{operation}{detail}"), self.operator.dtype if dtype is None else dtype
        if not isinstance(got, Tensor):
            raise ConformanceError(call=call, got=f"a {type(got).__name__}", expected="a tensor")
        form = f"shape {list(got.shape)}, {got.dtype}, on {got.device}"
        promised = f"shape {list(expected.shape)}, {wanted}, on {self.operator.device}"
        if form != promised:
            raise ConformanceError(call=call, got=form, expected=promised)
        if got.requires_grad:
            got_graph = "a tensor with an autograd graph behind it"
            raise ConformanceError(call=call, got=got_graph, expected="a detached one")
        error = _relative_error(got, expected, scale)
        if not error <= self.tolerance:
            bound = f"at most {self.tolerance:.0e}, the tolerance"
            raise ConformanceError(call=call, got=f"a relative error of {error:.2e}", expected=bound)
        self.errors[operation] = max(error, self.errors.get(operation, 0.0))

    def require(self, operation: str, holds: bool, got: str, expected: str) -> None:
        """Raise a ConformanceError unless a promise about the form of a result holds."""
        if not holds:
            raise ConformanceError(call=self.name(operation), got=got, expected=expected)

    def attempt(self, operation: str, function: Callable[[], _T]) -> _T | None:
        """The result, or None where the structure may and does refuse, with a way out."""
        try:
            return function()
        except (NoClosedFormError, MemoryBudgetError) as error:
            allowed = MAY_BE_REFUSED if isinstance(error, NoClosedFormError) else NEEDS_A_SQUARE_MATRIX
            got = f"{type(error).__name__}: {error}"
            if operation not in allowed:
                raise ConformanceError(call=self.name(operation), got=got, expected="an answer") from error
            if not error.try_:
                expected = "a message that says what to use instead"
                raise ConformanceError(call=self.name(operation), got=got, expected=expected) from error
            self.refused.add(operation)
            return None

    def in_every_form(self, operation: str, function: Callable[[Any], Any], expected: Tensor) -> None:
        """Check a linear map on ``[D, K]``, ``[D]`` and dicts; ``expected`` is its result on `columns`."""
        space, before = self.operator.space, self.columns.clone()
        product = function(self.columns)
        unchanged = torch.equal(before, self.columns)
        self.require(operation, unchanged, "an argument that was changed in place", "an argument that is only read")
        self.compare(operation, product, expected, detail="([D, K])")
        self.compare(operation, function(self.columns[:, 0]), expected[:, 0], detail="([D])")
        for v, result, form in (
            (self.columns, expected, "({[..., K]})"),
            (self.columns[:, 1], expected[:, 1], "({[...]})"),
        ):
            named = function(space.unflatten(v))
            got = {n: list(t.shape) for n, t in named.items()} if isinstance(named, dict) else type(named).__name__
            promised = {n: [*shape, *v.shape[1:]] for n, shape in zip(space.names, space.shapes, strict=True)}
            self.require(f"{operation}{form}", got == promised, f"{got}", f"a dict of shapes {promised}")
            self.compare(operation, space.flatten(named), result, detail=form)


def checked_matrix(operator: FisherOperator, dense: Tensor, tolerance: float) -> Float[Tensor, "D D"]:
    """The reference matrix in float64, exactly symmetric, or an InvalidArgumentError."""
    call, size = "check_fisher(dense)", operator.size
    if tuple(dense.shape) != (size, size):
        raise InvalidArgumentError(call=call, got=f"shape {list(dense.shape)}", expected=f"[{size}, {size}]")
    matrix = dense.detach().to(operator.device, torch.float64)
    if not bool(torch.isfinite(matrix).all()):
        raise InvalidArgumentError(call=call, got="NaN or infinite entries", expected="finite numbers")
    if _relative_error(matrix.mT, matrix) > tolerance:
        raise InvalidArgumentError(call=call, got="a matrix that is not symmetric", expected="a symmetric one")
    return (matrix + matrix.mT) / 2


def _relative_error(got: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """‖got − expected‖ / ‖expected‖; 0 where they are equal, infinite where only ``expected`` is 0."""
    difference = float((got.double() - expected.double()).norm())
    norm = float(expected.double().norm()) if scale is None else scale
    if difference == 0:
        return 0.0
    return difference / norm if norm > 0 else math.inf
