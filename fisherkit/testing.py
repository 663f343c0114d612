"""Check any `FisherOperator`, the package's or your own, against the matrix that it should be.

Build the operator, write its matrix out by other means, and pass both to `check_fisher`:

    from fisherkit.testing import check_fisher

    def test_my_operator():
        report = check_fisher(MyOperator(space, ...), dense)
        print(report)                      # the relative error of each operation

It needs no test framework. First what a comparison is, then one function for each group of operations. A new operation
of `FisherOperator` gets its lines here.
"""

from __future__ import annotations

import functools
import math
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.arguments import check_number, check_type
from fisherkit.arithmetic import all_finite
from fisherkit.errors import (
    FileFormatError,
    FisherkitError,
    InvalidArgumentError,
    MemoryBudgetError,
    NoClosedFormError,
    NotConvergedWarning,
)
from fisherkit.operators import Damping, DenseOperator, FisherOperator, RelativeDamping, load, split, usual_damping
from fisherkit.operators.base import convert
from fisherkit.operators.outputs_average import average_over_outputs

__all__ = ["MAY_BE_REFUSED", "TOLERANCES", "ConformanceError", "ConformanceReport", "check_fisher"]

TOLERANCES: dict[torch.dtype, float] = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Largest relative error that `check_fisher` accepts by default; 5e-2 for narrower dtypes."""

MAY_BE_REFUSED = frozenset(
    {"gram", "eigenvalues", "eigenvectors", "effective_dimension", "logdet", "save", "norm", "usual_damping"}
)
"""Operations that a structure may answer with `NoClosedFormError`; every other one must have an answer."""

NEEDS_A_SQUARE_MATRIX = frozenset({"gram", "eigenvalues", "to_dense", "logdet", "norm", "average"})
"""Operations that a structure may answer with `MemoryBudgetError`."""

NARROW = 1e-4
"""Relative error of a product in float32."""

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
        lines = [f"{operation:<20}{error:.1e}" for operation, error in self.errors.items()]
        return "\n".join([*lines, *(f"{operation:<20}no closed form" for operation in self.refused)])


class _Check:
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
        drawn = torch.randn(*shape, generator=self.generator, device=self.generator.device, dtype=torch.float64)
        return drawn.to(self.operator.device, self.operator.dtype)

    def seed(self) -> int:
        return int(torch.randint(1 << 31, (1,), generator=self.generator, device=self.generator.device))

    def shifted(self, damping: float) -> Tensor:
        return self.matrix + damping * torch.eye(len(self.matrix), dtype=torch.float64, device=self.matrix.device)

    def columns_of(self, vector: Any) -> Tensor:
        """A vector of any form as columns."""
        flat: Tensor = vector if isinstance(vector, Tensor) else self.operator.space.flatten(vector)
        return flat.reshape(len(flat), -1)

    def name(self, operation: str) -> str:
        return f"{type(self.operator).__name__}.{operation}"

    def compare(
        self, operation: str, got: Any, expected: Tensor, *, detail: str = "", dtype: torch.dtype | None = None,
        scale: float | None = None,
    ) -> None:  # fmt: skip
        """Hold a result's form and values against the matrix's; ``scale`` is what the error is relative to."""
        name, wanted = f"{operation}{detail}", self.operator.dtype if dtype is None else dtype
        self.require(name, isinstance(got, Tensor), f"a {type(got).__name__}", "a tensor")
        form = f"shape {list(got.shape)}, {got.dtype}, on {got.device}"
        promised = f"shape {list(expected.shape)}, {wanted}, on {self.operator.device}"
        self.require(name, form == promised, form, promised)
        self.require(name, not got.requires_grad, "a tensor with an autograd graph behind it", "a detached one")
        error, bound = _relative_error(got, expected, scale), f"at most {self.tolerance:.0e}, the tolerance"
        self.require(name, error <= self.tolerance, f"a relative error of {error:.2e}", bound)
        self.errors[operation] = max(error, self.errors.get(operation, 0.0))

    def require(self, operation: str, holds: bool, got: str, expected: str) -> None:
        """Raise a ConformanceError unless a promise about the form of a result holds."""
        if not holds:
            raise ConformanceError(self.name(operation), got, expected)

    def attempt(self, operation: str, function: Callable[[], _T]) -> _T | None:
        """The result, or None where the structure may and does refuse, with a way out."""
        try:
            return function()
        except (NoClosedFormError, MemoryBudgetError) as error:
            allowed = MAY_BE_REFUSED if isinstance(error, NoClosedFormError) else NEEDS_A_SQUARE_MATRIX
            got = f"{type(error).__name__}: {error}"
            self.require(operation, operation in allowed, got, "an answer")
            self.require(operation, bool(error.try_), got, "a message that says what to use instead")
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


def _checked_matrix(operator: FisherOperator, dense: Tensor, tolerance: float) -> Float[Tensor, "D D"]:
    """The reference matrix in float64, exactly symmetric, or an InvalidArgumentError."""
    call, size = "check_fisher(dense)", operator.size
    if tuple(dense.shape) != (size, size):
        raise InvalidArgumentError(call, f"shape {list(dense.shape)}", f"[{size}, {size}]")
    matrix = dense.detach().to(operator.device, torch.float64)
    if not all_finite(matrix):
        raise InvalidArgumentError(call, "NaN or infinite entries", "finite numbers")
    if _relative_error(matrix.mT, matrix) > tolerance:
        raise InvalidArgumentError(call, "a matrix that is not symmetric", "a symmetric one")
    return (matrix + matrix.mT) / 2


def _relative_error(got: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """‖got − expected‖ / ‖expected‖; 0 where they are equal, infinite where only ``expected`` is 0."""
    difference = float((got.double() - expected.double()).norm())
    norm = float(expected.double().norm()) if scale is None else scale
    if difference == 0:
        return 0.0
    return difference / norm if norm > 0 else math.inf


def check_fisher(
    operator: FisherOperator, dense: Float[Tensor, "D D"], *, tolerance: float | None = None,
    generator: torch.Generator | None = None,
) -> ConformanceReport:  # fmt: skip
    """Check every operation of an operator against its matrix.

    Products of all forms of vector, quadratic form, diagonal, trace, Gram, damped solves, factorizations, log
    determinants and effective dimensions at two dampings, samples, eigenvalues and eigenvectors, `to_dense`,
    `to_scipy`, scales and sums, symmetry, what applications ask of the structure (terms, blocks, rows, factors, norm,
    average over outputs, another dtype, usual damping), and a round trip through a file; dtype, device and form of each
    result; and that changing a result in place does not change the operator. Dampings are a tenth and a hundredth of
    the largest eigenvalue, so that what rounding does to a solve stays near what it does to a product.

    Args:
        operator: the operator.
        dense: the matrix that it should be, in flat order; best in float64 and by means that share no code with it.
        tolerance: largest accepted relative error ‖got − expected‖₂ / ‖expected‖₂ with a result's entries joined (a
            log determinant's is relative to Σ|log(eigenvalue + damping)|); None for `TOLERANCES` of the operator's
            dtype.
        generator: draws the vectors; None for one with seed 0.

    Returns:
        The relative error of each operation, and the operations that the structure refuses.

    Raises:
        InvalidTypeError: ``operator`` is not a FisherOperator.
        InvalidArgumentError: ``dense`` is not a finite symmetric matrix of the operator's size, or ``tolerance`` is not
            positive.
        ConformanceError: naming the operation, its relative error and the tolerance, or what is wrong with its form.

    Cost: an eigen-decomposition and a few solves with the dense matrix; meant for D up to a thousand or so.
    """
    call = "check_fisher"
    check_type(call, "operator", operator, FisherOperator, "a FisherOperator")
    check_number(call, "tolerance", tolerance, above=True, optional=True)
    limit = TOLERANCES.get(operator.dtype, 5e-2) if tolerance is None else tolerance
    matrix = _checked_matrix(operator, dense, limit)
    seeds = torch.Generator().manual_seed(0) if generator is None else generator
    check = _Check(operator, matrix, limit, seeds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        for part in (_products, _numbers, _spectra, _inverses, _samples, _algebra, _files, _answers, _independence):
            part(check)
    return ConformanceReport(check.errors, tuple(sorted(check.refused)), limit)


def _products(check: _Check) -> None:
    """Products in every form, and that they are symmetric."""
    operator, columns = check.operator, check.columns
    shape = (len(check.matrix), len(check.matrix))
    check.require("shape", operator.shape == shape, f"{operator.shape}", f"{shape}")
    expected = check.matrix @ columns.double()
    check.in_every_form("matvec", operator.matvec, expected)
    check.in_every_form("@", operator.__matmul__, expected)
    other = check.normal(operator.size, 2)
    left = check.columns_of(operator @ columns).double().mT @ other.double()
    right = columns.double().mT @ check.columns_of(operator @ other).double()
    size = float(expected.norm() * other.double().norm())
    check.compare("symmetry", left, right, dtype=torch.float64, scale=size)
    scipy_operator = operator.to_scipy()
    arrays = columns.cpu().numpy()
    for got, result, detail in (
        (scipy_operator @ arrays, expected, " @ [D, K]"),
        (scipy_operator.H @ arrays, expected, ".H @ [D, K]"),
        (scipy_operator @ arrays[:, 0], expected[:, 0], " @ [D]"),
    ):
        check.compare("to_scipy", torch.from_numpy(got).to(operator.device), result, detail=f"(){detail}")


def _numbers(check: _Check) -> None:
    """Quadratic forms, diagonal, trace and the matrix itself."""
    operator, columns, matrix = check.operator, check.columns, check.matrix
    expected = (columns.double() * (matrix @ columns.double())).sum(0)
    unflatten = operator.space.unflatten
    for v, result in (
        (columns, expected),
        (columns[:, 0], expected[0]),
        (unflatten(columns), expected),
        (unflatten(columns[:, 0]), expected[0]),
    ):
        check.compare("quadratic_form", operator.quadratic_form(v), result, dtype=torch.float64)
    check.compare("diagonal", operator.diagonal(), matrix.diagonal())
    check.compare("trace", operator.trace(), matrix.trace(), dtype=torch.float64)
    dense = check.attempt("to_dense", operator.to_dense)
    if dense is not None:
        check.compare("to_dense", dense, matrix)
        check.compare("symmetry", dense, dense.mT.double(), detail=" of to_dense()")


def _spectra(check: _Check) -> None:
    """Eigenvalues and eigenvectors, the effective dimension and the Gram matrix."""
    operator, values = check.operator, check.values
    for k in (None, 1, (operator.size + 1) // 2):
        found = check.attempt("eigenvalues", lambda k=k: operator.eigenvalues(k))  # type: ignore[misc]
        if found is not None:
            check.compare("eigenvalues", found, values[:k], detail=f"(k={k})", dtype=torch.float64)
    _eigenvectors(check)
    for damping, number in check.dampings:
        found = check.attempt("effective_dimension", functools.partial(operator.effective_dimension, damping))
        if found is not None:
            expected, detail = (values / (values + number)).sum(), f"(damping={damping})"
            check.compare("effective_dimension", found, expected, detail=detail, dtype=torch.float64)
    gram = check.attempt("gram", operator.gram)
    if gram is not None:
        check.require(
            "gram", gram.ndim == 2 and gram.shape[0] == gram.shape[1], f"{list(gram.shape)}", "a square matrix"
        )
        check.compare("gram", gram, gram.mT, detail="()", dtype=torch.float64)
        mine = torch.linalg.eigvalsh(gram).flip(0)
        count = max(len(mine), len(values))
        pad = torch.nn.functional.pad
        padded = pad(values, (0, count - len(values)))
        check.compare("gram", pad(mine, (0, count - len(mine))), padded, detail="() eigenvalues", dtype=torch.float64)


def _eigenvectors(check: _Check) -> None:
    """Orthonormal columns that the matrix multiplies by its largest eigenvalues, in the eigenvalues' order."""
    operator, values = check.operator, check.values
    size = float(values.norm())
    for k in (1, (operator.size + 1) // 2, operator.size):
        found = check.attempt("eigenvectors", functools.partial(operator.eigenvectors, k))
        if found is None:
            return
        detail, shape = f"(k={k})", (operator.size, k)
        check.require(f"eigenvectors{detail}", tuple(found.shape) == shape, f"{list(found.shape)}", f"{list(shape)}")
        check.compare("eigenvectors", found, found.double(), detail=detail)  # dtype and device
        columns = found.double()
        identity = torch.eye(k, dtype=torch.float64, device=operator.device)
        check.compare("eigenvectors", columns.mT @ columns, identity, detail=f"{detail}, their inner products",
                      dtype=torch.float64)  # fmt: skip
        # Where eigenvalues repeat or nearly do, the columns themselves are any basis: F V = V diag(w) tells all.
        check.compare("eigenvectors", check.matrix @ columns, columns * values[:k], detail=f"{detail}, F times them",
                      dtype=torch.float64, scale=size)  # fmt: skip


def _inverses(check: _Check) -> None:
    """Damped solves and log determinants, by every way to ask for them."""
    operator, columns, space = check.operator, check.columns, check.operator.space
    for damping, number in check.dampings:
        shifted, detail = check.shifted(number), f", damping={damping}"
        expected = torch.linalg.solve(shifted, columns.double())
        solution, info = operator.solve(columns, damping, return_info=True, tolerance=check.residual)
        check.compare("solve", solution, expected, detail=f"([D, K]{detail})")
        left = shifted @ check.columns_of(solution).double() - columns.double()
        left = left.norm(dim=0) / columns.double().norm(dim=0)
        honest = info.residual.shape == left.shape and float((info.residual - left).abs().max()) <= check.tolerance
        check.require("solve", honest, f"a reported residual of {info.residual}", f"{left}")
        near = math.isclose(info.damping, number, rel_tol=check.tolerance)
        check.require("solve", near, f"a reported damping of {info.damping}", f"{number}")
        named = operator.solve(space.unflatten(columns[:, 0]), damping, tolerance=check.residual)
        check.compare("solve", check.columns_of(named)[:, 0], expected[:, 0], detail=f"({{[...]}}{detail})")
        inverse = operator.factorize(damping, tolerance=check.residual)
        check.in_every_form("factorize", inverse.matvec, expected)
        check.compare("factorize", inverse @ columns, expected, detail=f"({detail[2:]}) @ [D, K]")
        logs = (check.values + number).log()
        for ask in (functools.partial(operator.logdet, damping), inverse.logdet):
            found = check.attempt("logdet", ask)
            if found is not None:
                size = float(logs.abs().sum())
                check.compare("logdet", found, logs.sum(), detail=f"({detail[2:]})", dtype=torch.float64, scale=size)


def _samples(check: _Check) -> None:
    """Draws from N(0, (F + λI)⁻¹) repeat with their seed, and xᵀ(F + λI)x is χ² with D degrees of freedom."""
    damping, number = check.dampings[0]
    inverse = check.operator.factorize(damping, tolerance=check.residual)
    first, second = check.seed(), check.seed()

    def one_by_one(seed: int, count: int) -> Tensor:
        generator = torch.Generator(check.operator.device).manual_seed(seed)
        return torch.stack([inverse.sample(generator) for _ in range(count)], 1)

    def at_once(seed: int, count: int) -> Tensor:
        return inverse.sample(torch.Generator(check.operator.device).manual_seed(seed), count)

    count = 2 + 500 // check.operator.size
    draws, joint = one_by_one(first, count), at_once(first, count)
    for again, before in ((one_by_one(first, 2), draws[:, :2]), (at_once(first, count), joint)):
        check.compare("sample", again, before.double(), detail="() of the same seed")
    check.require(
        "sample", not torch.equal(one_by_one(second, 1), draws[:, :1]), "the same draw", "another with another seed"
    )
    # The sum of independent draws over √n has the covariance of one of them.
    for some in (draws, joint, joint.sum(1, keepdim=True) / math.sqrt(count)):
        # Six standard deviations: enough to see a missing term or factor, and no false alarm.
        slack = 6 * math.sqrt(2 / some.numel())
        ratio = float((some.double() * (check.shifted(number) @ some.double())).sum()) / some.numel()
        check.require("sample", abs(ratio - 1) < slack, f"draws of {ratio:.2f} times the expected size",
                      f"between {1 - slack:.2f} and {1 + slack:.2f}")  # fmt: skip


def _algebra(check: _Check) -> None:
    """Multiples and sums."""
    operator, columns = check.operator, check.columns
    product = check.matrix @ columns.double()
    for name, result, factor in (
        ("scale", 0.5 * operator, 0.5),
        ("scale", operator * 2, 2.0),
        ("scale", 0.0 * operator, 0.0),
        ("sum", 0.5 * operator + 0.25 * operator, 0.75),
        ("sum", operator + operator, 2.0),
    ):
        check.require(name, isinstance(result, FisherOperator), f"a {type(result).__name__}", "a FisherOperator")
        check.compare(name, result @ columns, factor * product, detail=".matvec")
        check.compare(name, result.diagonal(), factor * check.matrix.diagonal(), detail=".diagonal()")
        check.compare(name, result.trace(), factor * check.matrix.trace(), detail=".trace()", dtype=torch.float64)
    number = check.dampings[0][1]
    solution = (0.5 * operator + 0.25 * operator).solve(columns, 0.75 * number, tolerance=check.residual)
    expected = torch.linalg.solve(check.shifted(number), columns.double()) / 0.75
    check.compare("sum", solution, expected, detail=".solve")


def _answers(check: _Check) -> None:
    """What applications and other operators ask: how the matrix comes apart, and what it is known to be."""
    operator, matrix, space = check.operator, check.matrix, check.operator.space
    parts = [term.to_dense() for term in operator._terms()]
    check.compare("terms", functools.reduce(torch.add, parts), matrix)
    whole, places = torch.zeros_like(matrix), torch.arange(operator.size, device=matrix.device)
    for block in split(operator):
        place = space.take(places, block.space.names)
        whole[place.unsqueeze(1), place] = block.to_dense().double()
    check.compare("blocks", whole.to(operator.dtype), matrix)
    norm = check.attempt("norm", operator._frobenius)
    if norm is not None:
        check.compare("norm", norm, matrix.norm(), dtype=torch.float64)
    average = check.attempt("average", functools.partial(average_over_outputs, operator))
    if average is not None:
        check.compare("average", average.trace(), matrix.trace(), detail="over outputs, trace", dtype=torch.float64)
        layouts = [term.layout for block in split(operator) for term in block._terms()]
        if not any(layout is not None and layout.transposed for layout in layouts):
            expected = average_over_outputs(DenseOperator(space, matrix)).to_dense()
            check.compare("average", average.to_dense(), expected, detail=" over outputs")
    other = torch.float32 if operator.dtype == torch.float64 else torch.float64
    converted = check.attempt("save", functools.partial(convert, operator, other, operator.device))
    if converted is not None:
        columns = check.columns.to(other)
        product, expected = (converted @ columns).double(), matrix @ columns.double()
        near = float((product - expected).norm()) <= max(check.tolerance, NARROW) * float(expected.norm())
        check.require("convert", near and converted.dtype == other, "another matrix or dtype", f"the same in {other}")
    if operator.is_diagonal:
        check.compare("diagonal", operator.diagonal().diag(), matrix, detail=" of what is_diagonal")
    if operator.stored_rows is not None:
        rows, scale = operator.stored_rows
        dense = rows.dense().double()
        check.compare("rows", (scale * dense.mT @ dense).to(operator.dtype), matrix, detail=" of stored_rows")
    if operator.factors is not None and operator.layout is not None:
        a, g = operator.factors
        grid = operator.layout.to_grid(check.columns)
        check.compare("factors", operator.layout.to_flat(g @ grid @ a), matrix @ check.columns.double())
    if operator.eigenbases is not None and operator.layout is not None:
        a, g, values = (tensor.double() for tensor in operator.eigenbases)
        grid, back = g.mT @ operator.layout.to_grid(check.columns.double()) @ a, operator.layout.to_flat
        check.compare("eigenbases", back(g @ (values * grid) @ a.mT).to(check.columns), matrix @ back(g @ grid @ a.mT))
    damping = check.attempt("usual_damping", functools.partial(usual_damping, operator))
    check.require("usual_damping", damping is None or damping.scale > 0, f"{damping}", "a positive multiple")
    for name, holds in (
        ("inversion", operator.inversion in {"cheap", "direct", "iterative"}),
        ("decomposed_side", 0 <= operator.decomposed_side <= operator.size),
    ):
        check.require(name, holds, f"{getattr(operator, name)!r}", "one of its values")
    inverse = operator._approximate_inverse(check.dampings[0][1])
    if inverse is not None:
        curvature = (check.columns * inverse(check.columns)).sum(0)
        check.require("_approximate_inverse", bool((curvature > 0).all()), f"vᵀPv = {curvature}", "positive numbers")


def _files(check: _Check) -> None:
    """What `fisherkit.load` reads is the same operator."""
    operator = check.operator
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "operator.safetensors"
        check.attempt("save", functools.partial(operator.save, path))
        if "save" in check.refused:
            return
        try:
            restored = load(path, device=operator.device)
        except FileFormatError as error:
            got = f"a file that load refuses: {error}"
            raise ConformanceError(check.name("save"), got, "one that load reads") from error
    check.require("save", restored.space == operator.space, f"{restored.space}", f"{operator.space}")
    check.require("save", restored.metadata == operator.metadata, f"{restored.metadata}", f"{operator.metadata}")
    for name in ("matvec", "diagonal", "trace"):
        arguments = (check.columns,) if name == "matvec" else ()
        before, after = getattr(operator, name)(*arguments), getattr(restored, name)(*arguments)
        check.compare("save", after, before.double(), detail=f" and load, {name}", dtype=before.dtype)
    solution = restored.solve(check.columns, check.dampings[0][0], tolerance=check.residual)
    expected = torch.linalg.solve(check.shifted(check.dampings[0][1]), check.columns.double())
    check.compare("save", solution, expected, detail=" and load, solve")


def _independence(check: _Check) -> None:
    """What an operation returns is the caller's to change."""
    operator, columns = check.operator, check.columns
    before = check.columns_of(operator @ columns).clone()
    asked = (operator.diagonal, operator.trace, operator.to_dense, operator.eigenvalues, operator.gram)
    results: list[Any] = [check.attempt(ask.__name__, ask) for ask in asked]
    results.append(check.attempt("eigenvectors", lambda: operator.eigenvectors(1)))
    for result in (*results, operator @ columns, operator.solve(columns, check.dampings[0][0])):
        if isinstance(result, Tensor):
            result.zero_()
    after = check.columns_of(operator @ columns)
    check.require("matvec", torch.equal(before, after), "another product after a result was changed in place",
                  "results that share no memory with the operator")  # fmt: skip
