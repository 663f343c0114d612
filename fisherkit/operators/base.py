"""The contract of every Fisher operator: a symmetric positive semi-definite D × D matrix that is never written out.

Public methods are final: they check their input once and call a private hook that sees only columns ``[D, K]`` of the
operator's dtype on its device. A new structure supplies the abstract hooks, and inherits everything else, the checks
and the conformance suite included. The list of operations is closed. This module knows neither models nor data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, final, overload

import torch
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from fisherkit import io
from fisherkit.coverage import Coverage
from fisherkit.errors import (
    FileFormatError,
    InvalidArgumentError,
    InvalidTypeError,
    NoClosedFormError,
    SingularMatrixError,
)
from fisherkit.operators.damping import Damping, RelativeDamping, check_damping
from fisherkit.operators.factorization import Factorization
from fisherkit.solvers import SolveInfo
from fisherkit.space import ParameterSpace, Vector


class FisherOperator(ABC):
    """A symmetric positive semi-definite matrix over a parameter space.

    Args:
        space: the parameters it acts on.
        dtype: of its vectors.
        device: of its vectors.
    """

    kind: ClassVar[str] = ""  # the structure's name in files; empty for what is never saved under a name of its own

    def __init__(self, space: ParameterSpace, *, dtype: torch.dtype, device: torch.device) -> None:
        self.space = space
        self.dtype = dtype
        self.device = torch.device(device)
        self.metadata: dict[str, str] = {}

    # -- hooks ---------------------------------------------------------------------------------------------------------

    @abstractmethod
    def _matmat(self, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        """F V."""

    @abstractmethod
    def _diagonal(self) -> Float[Tensor, "D"]:
        """diag F."""

    @abstractmethod
    def _factorize(self, damping: float, tolerance: float, max_steps: int | None) -> Factorization:
        """A reusable inverse of F + damping·I, by closed form or by an iterative solver that reports itself."""

    @abstractmethod
    def _draw(self, generator: torch.Generator | None) -> Float[Tensor, "D 1"]:
        """A draw from the normal distribution N(0, F)."""

    @abstractmethod
    def _scaled(self, scale: float) -> FisherOperator:
        """scale · F as an operator of the same structure."""

    @abstractmethod
    def _state(self) -> io.State:
        """What a file must hold."""

    @classmethod
    def _from_state(cls, space: ParameterSpace, state: io.State) -> FisherOperator:
        """The operator that `_state` described; every structure with a `kind` supplies it."""
        raise FileFormatError(
            call="load",
            got=f"an operator of kind {state.kind!r}",
            expected="a kind that can be loaded",
            why=f"{cls.__name__} does not define _from_state",
        )

    def _plus(self, other: FisherOperator) -> FisherOperator | None:
        """F + other folded into one operator where that is exact, else None."""
        return None

    def _gram(self) -> Float[Tensor, "R R"]:
        raise self._no_closed_form("gram", "only the full structure has rows of its own", 'structure="full"')

    def _trace(self) -> Float[Tensor, ""]:
        return self._diagonal().double().sum()

    def _eigenvalues(self, k: int) -> Float[Tensor, "k"]:
        raise self._no_closed_form(
            "eigenvalues", "its parts do not share eigenvectors", "fk.estimators.lanczos_eigenvalues"
        )

    def _to_dense(self) -> Float[Tensor, "D D"]:
        return self._matmat(torch.eye(self.size, dtype=self.dtype, device=self.device))

    def _unwrap(self) -> FisherOperator:
        """The operator that does the algebra; a wrapper returns what it holds."""
        return self

    # -- the public, closed list of operations -------------------------------------------------------------------------

    @property
    @final
    def size(self) -> int:
        """D, the number of parameters."""
        return self.space.size

    @property
    @final
    def shape(self) -> tuple[int, int]:
        """(D, D)."""
        return self.size, self.size

    @final
    def matvec(self, v: Vector) -> Vector:
        """F v.

        Args:
            v: ``[D]``, ``[D, K]`` (columns last) or a dict name -> tensor.

        Returns:
            The product in v's form, dtype and device.

        Raises:
            InvalidTypeError, InvalidArgumentError, NonFiniteError: v is not a finite vector of this space.
        """
        columns, restore = self._columns(v, "matvec")
        return restore(self._matmat(columns))

    @final
    def __matmul__(self, v: Vector) -> Vector:
        """``fisher @ v``; the same as `matvec`."""
        return self.matvec(v)

    @final
    def quadratic_form(self, v: Tensor | Mapping[str, Tensor]) -> Float[Tensor, "..."]:
        """vᵀ F v, a scalar for one vector, ``[K]`` for columns; float64."""
        flat = self.space.flatten(v) if isinstance(v, Mapping) else v
        columns = self._columns(flat, "quadratic_form")[0]
        values = (columns.double() * self._matmat(columns).double()).sum(0)
        return values[0] if flat.ndim == 1 else values

    @final
    def diagonal(self) -> Float[Tensor, "D"]:
        """diag F, in flat order."""
        return self._diagonal()

    @final
    def trace(self) -> Float[Tensor, ""]:
        """The sum of the eigenvalues, float64."""
        return self._trace()

    @final
    def gram(self) -> Float[Tensor, "R R"]:
        """The Gram matrix of the rows, scaled so that its non-zero eigenvalues are F's; float64.

        Raises:
            NoClosedFormError: the structure has no rows.
        """
        return self._gram()

    @final
    def eigenvalues(self, k: int | None = None) -> Float[Tensor, "k"]:
        """The k largest eigenvalues in descending order, float64.

        Args:
            k: how many; None for all D.

        Raises:
            InvalidArgumentError: k is not between 1 and D.
            NoClosedFormError: sums whose parts do not share eigenvectors.
        """
        count = self.size if k is None else k
        if not isinstance(count, int) or not 1 <= count <= self.size:
            raise InvalidArgumentError(
                call=f"{self._name}.eigenvalues(k={k})",
                got=f"k = {k}",
                expected=f"an integer from 1 to D = {self.size:,}",
            )
        return self._eigenvalues(count)

    @final
    def to_dense(self) -> Float[Tensor, "D D"]:
        """The matrix itself; O(D²) memory."""
        return self._to_dense()

    @final
    def factorize(
        self, damping: Damping = 1e-3, *, tolerance: float | None = None, max_steps: int | None = None
    ) -> Factorization:
        """A reusable inverse of F + λI with ``.matvec(v)``, ``.logdet()`` and ``.sample(generator)``.

        Args:
            damping: λ, or `RelativeDamping`.
            tolerance: relative residual at which an iterative solver stops, 1e-10 in float64 and 1e-5 below by default;
                direct factorizations ignore it.
            max_steps: of an iterative solver.

        Raises:
            InvalidTypeError, InvalidArgumentError: damping is not a number that is 0 or more.
            SingularMatrixError: F + λI is singular.
        """
        return self._inverse(damping, "factorize", tolerance, max_steps)

    @overload
    def solve(
        self,
        v: Vector,
        damping: Damping = ...,
        *,
        return_info: Literal[False] = ...,
        tolerance: float | None = ...,
        max_steps: int | None = ...,
    ) -> Vector: ...
    @overload
    def solve(
        self,
        v: Vector,
        damping: Damping = ...,
        *,
        return_info: Literal[True],
        tolerance: float | None = ...,
        max_steps: int | None = ...,
    ) -> tuple[Vector, SolveInfo]: ...
    @final
    def solve(
        self,
        v: Vector,
        damping: Damping = 1e-3,
        *,
        return_info: bool = False,
        tolerance: float | None = None,
        max_steps: int | None = None,
    ) -> Vector | tuple[Vector, SolveInfo]:
        """(F + λI)⁻¹ v, with the null space's v/λ included.

        Args:
            v: ``[D]``, ``[D, K]`` or a dict.
            damping: λ in parameter space, or `RelativeDamping`.
            return_info: also return how it went: method, steps, relative residual per column, converged.
            tolerance: as in `factorize`.
            max_steps: as in `factorize`.

        Returns:
            The solution in v's form; with ``return_info`` a pair (solution, `SolveInfo`).
        """
        columns, restore = self._columns(v, "solve")
        inverse = self._inverse(damping, "solve", tolerance, max_steps)
        if not return_info:
            return restore(inverse._solve(columns))
        solution, info = inverse._solve_with_info(columns)
        return restore(solution), info

    @final
    def logdet(self, damping: Damping = 1e-3) -> Float[Tensor, ""]:
        """log det(F + λI), float64; -inf is an error, not a value.

        Raises:
            NoClosedFormError: the structure is only solved iteratively.
            SingularMatrixError: F + λI is singular.
        """
        return self._inverse(damping, "logdet", None, None)._logdet()

    @final
    def to_scipy(self) -> LinearOperator:
        """A ``scipy.sparse.linalg.LinearOperator`` that takes and gives NumPy arrays on the CPU."""

        def product(array: Any) -> Any:
            columns = torch.as_tensor(array, dtype=self.dtype, device=self.device).reshape(self.size, -1)
            return self._matmat(columns).cpu().numpy().reshape(array.shape)

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(self.shape, matvec=product, matmat=product, rmatvec=product, rmatmat=product, dtype=dtype)

    @final
    def save(self, path: str | Path) -> None:
        """Write the operator to a safetensors file that `fisherkit.load` reads without the model.

        Raises:
            InvalidArgumentError: the folder does not exist.
            NoClosedFormError: the rows are streamed from the data and lie nowhere.
        """
        io.write(path, self._state(), self.space, self.metadata)

    @final
    def __mul__(self, scale: float) -> FisherOperator:
        """scale · F; the scale must not be negative."""
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise InvalidTypeError(call=f"{self._name} * scale", got=f"a {type(scale).__name__}", expected="a number")
        if not 0 <= scale < float("inf"):
            raise InvalidArgumentError(
                call=f"{self._name} * {scale}",
                got=f"scale {scale}",
                expected="a finite number, 0 or more",
                why="operators form a cone: a negative multiple is not positive semi-definite",
            )
        result = self._unwrap()._scaled(float(scale))
        result.metadata = {**self.metadata, "terms": f"{scale} * ({self._title})"}
        return result

    __rmul__ = __mul__

    @final
    def __truediv__(self, divisor: float) -> FisherOperator:
        """F / divisor."""
        if divisor == 0:
            raise InvalidArgumentError(call=f"{self._name} / 0", got="divisor 0", expected="a positive number")
        return self * (1 / divisor)

    @final
    def __radd__(self, other: int) -> FisherOperator:
        """0 + F, so that ``sum(fishers)`` works."""
        if other != 0 or isinstance(other, bool) or not isinstance(other, int):
            raise InvalidTypeError(call=f"other + {self._name}", got=repr(other), expected="a FisherOperator")
        return self

    @final
    def __add__(self, other: FisherOperator) -> FisherOperator:
        """F + other, folded into one operator where that is exact, else kept as a sum."""
        from fisherkit.operators.algebra import (
            add,
        )  # the sum is itself an operator, so this import cannot be at the top

        if not isinstance(other, FisherOperator):
            raise InvalidTypeError(
                call=f"{self._name} + other", got=f"a {type(other).__name__}", expected="a FisherOperator"
            )
        result = add(self._unwrap(), other._unwrap())
        shared = {key: value for key, value in self.metadata.items() if other.metadata.get(key) == value}
        result.metadata = {**shared, "terms": f"{self._title} + {other._title}"}
        return result

    @final
    def coverage(self) -> Coverage:
        """Which parameters are handled by which rule, how they are kept, and the memory that takes.

        Raises:
            NoClosedFormError: the operator was not built from a model, or is a sum of such.
        """
        if "coverage" not in self.metadata:
            raise self._no_closed_form(
                "coverage", "it was not built from a model", "the coverage of each term of a sum"
            )
        return Coverage.from_json(self.metadata["coverage"])

    def __repr__(self) -> str:
        return f"<{self._name}: {self._title}, D = {self.size:,}, {self.dtype}, {self.device}>"

    # -- shared by the above -------------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def _title(self) -> str:
        known = [self.metadata[key] for key in ("kind", "structure") if key in self.metadata]
        return self.metadata.get("terms") or " ".join(known) or self._name

    def _inverse(
        self, damping: Damping, operation: str, tolerance: float | None, max_steps: int | None
    ) -> Factorization:
        if tolerance is None:
            tolerance = 1e-10 if self.dtype == torch.float64 else 1e-5
        resolved = self._resolve(damping, operation)
        try:
            return self._factorize(resolved, tolerance, max_steps)
        except SingularMatrixError as error:
            # The part that found out is not what the caller called.
            raise error.at(f"{self._name}.{operation}(damping={resolved:g})") from error

    def _columns(self, v: Vector, operation: str) -> tuple[Tensor, Callable[[Tensor], Vector]]:
        return self.space.to_columns(v, f"{self._name}.{operation}", dtype=self.dtype, device=self.device)

    def _resolve(self, damping: Damping, operation: str) -> float:
        if isinstance(damping, RelativeDamping):
            return damping.scale * float(self._trace()) / self.size
        return check_damping(damping, f"{self._name}.{operation}")

    def _no_closed_form(self, operation: str, why: str, try_: str) -> NoClosedFormError:
        return NoClosedFormError(
            call=f"{self._name}.{operation}",
            got=f"a {self._name} over D = {self.size:,} parameters",
            expected="a structure with a closed form",
            why=why,
            try_=try_,
        )
