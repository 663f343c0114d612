"""The contract of every Fisher operator: a symmetric positive semi-definite D × D matrix that is never written out.

Public methods are final: they check their input once and call a private hook, outside of a caller's autocast. A new
structure supplies the hooks of `operators.hooks`, and inherits everything else, the checks and the conformance suite
included. The list of operations is closed. This module knows neither models nor data.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final, overload

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit import io
from fisherkit.arguments import is_integer
from fisherkit.arithmetic import without_autocast
from fisherkit.coverage import Coverage
from fisherkit.errors import InvalidArgumentError, InvalidTypeError
from fisherkit.operators.damping import REQUIRED, Damping
from fisherkit.operators.factorization import Factorization
from fisherkit.operators.hooks import OperatorHooks
from fisherkit.solvers import SolveInfo
from fisherkit.space import Vector

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


class FisherOperator(OperatorHooks):
    """A symmetric positive semi-definite matrix over a parameter space.

    Args:
        space: the parameters it acts on.
        dtype: of its vectors.
        device: of its vectors.
    """

    def _unwrap(self) -> FisherOperator:
        return self

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
    @without_autocast()
    def matvec(self, v: Vector) -> Vector:
        """F v.

        Args:
            v: ``[D]``, ``[D, K]`` (columns last) or a dict name -> tensor, in the operator's dtype; of an operator in
                float32 also in half precision.

        Returns:
            The product in v's form, in the operator's dtype and on its device.

        Raises:
            InvalidTypeError, InvalidArgumentError, NonFiniteError: v is not a finite vector of this space.
        """
        columns, restore = self._columns(v, "matvec")
        return restore(self._matmat(columns) if columns.shape[1] else columns.clone())

    @final
    def __matmul__(self, v: Vector) -> Vector:
        """``fisher @ v``; the same as `matvec`."""
        return self.matvec(v)

    @final
    @without_autocast()
    def quadratic_form(self, v: Tensor | Mapping[str, Tensor]) -> Float[Tensor, "..."]:
        """vᵀ F v, a scalar for one vector, ``[K]`` for columns; float64."""
        flat = self.space.flatten(v) if isinstance(v, Mapping) else v
        columns = self._columns(flat, "quadratic_form")[0]
        values = (columns.double() * self._matmat(columns).double()).sum(0)
        return values[0] if flat.ndim == 1 else values

    @final
    @without_autocast()
    def diagonal(self) -> Float[Tensor, "D"]:
        """diag F, in flat order."""
        return self._diagonal()

    @final
    @without_autocast()
    def trace(self) -> Float[Tensor, ""]:
        """The sum of the eigenvalues, float64."""
        return self._trace()

    @final
    @without_autocast()
    def gram(self) -> Float[Tensor, "R R"]:
        """The Gram matrix of the rows, scaled so that its non-zero eigenvalues are F's; float64.

        Raises:
            NoClosedFormError: the structure has no rows.
        """
        return self._gram()

    @final
    @without_autocast()
    def eigenvalues(self, k: int | None = None) -> Float[Tensor, "k"]:
        """The k largest eigenvalues in descending order, float64.

        Args:
            k: how many; None for all D.

        Raises:
            InvalidArgumentError: k is not between 1 and D.
            NoClosedFormError: sums whose parts do not share eigenvectors.
        """
        return self._eigenvalues(self._checked_count(self.size if k is None else k, "eigenvalues"))

    @final
    @without_autocast()
    def eigenvectors(self, k: int) -> Float[Tensor, "D k"]:
        """Orthonormal eigenvectors of the k largest eigenvalues in columns, in the operator's dtype.

        Column i belongs to ``eigenvalues(k)[i]``. Signs are arbitrary, as is the basis where eigenvalues repeat; the
        same call gives the same columns.

        Args:
            k: how many, 1 to D.

        Raises:
            InvalidArgumentError: k is not between 1 and D.
            NoClosedFormError: as `eigenvalues`.
        """
        return self._eigenvectors(self._checked_count(k, "eigenvectors"))

    @final
    @without_autocast()
    def effective_dimension(self, damping: Damping = REQUIRED) -> Float[Tensor, ""]:
        """tr(F (F + λI)⁻¹) = Σ w / (w + λ) over the eigenvalues w, float64: how many parameters the data determine.

        Between 0 and D. MacKay, "Bayesian interpolation", 1992, where it is the effective number of parameters.

        Args:
            damping: λ, or `RelativeDamping`; required. At 0 it is D, or an error where F is singular.

        Raises:
            NoClosedFormError: the structure has no eigenvalues in closed form.
            SingularMatrixError: λ = 0 and F is singular.
        """
        resolved = self._resolve(damping, "effective_dimension")
        value = self._effective_dimension(resolved)
        if resolved > 0:
            return value
        self._inverse(resolved, "effective_dimension", None, None)  # raises where F is singular
        return torch.full_like(value, self.size)

    def _checked_count(self, k: int, operation: str) -> int:
        if not is_integer(k) or not 1 <= k <= self.size:
            raise InvalidArgumentError(
                call=f"{self._name}.{operation}(k={k})",
                got=f"k = {k}",
                expected=f"an integer from 1 to D = {self.size:,}",
            )
        return k

    @final
    @without_autocast()
    def to_dense(self) -> Float[Tensor, "D D"]:
        """The matrix itself; O(D²) memory."""
        return self._to_dense()

    @final
    @without_autocast()
    def factorize(
        self, damping: Damping = REQUIRED, *, tolerance: float | None = None, max_steps: int | None = None
    ) -> Factorization:
        """A reusable inverse of F + λI with ``.matvec(v)``, ``.logdet()`` and ``.sample(generator, n)``.

        Args:
            damping: λ, or `RelativeDamping`; required.
            tolerance: relative residual at which an iterative solver stops, 1e-10 in float64 and 1e-5 below by default;
                direct factorizations ignore it.
            max_steps: of an iterative solver.

        Raises:
            InvalidTypeError: no damping, or not a number.
            InvalidArgumentError: damping is negative, NaN or infinite.
            SingularMatrixError: F + λI is singular.
        """
        return self._inverse(damping, "factorize", tolerance, max_steps)

    @overload
    def solve(
        self,
        v: Vector,
        damping: Damping,
        *,
        return_info: Literal[False] = ...,
        tolerance: float | None = ...,
        max_steps: int | None = ...,
        checkpoint: str | Path | None = ...,
        progress: bool = ...,
    ) -> Vector: ...
    @overload
    def solve(
        self,
        v: Vector,
        damping: Damping,
        *,
        return_info: Literal[True],
        tolerance: float | None = ...,
        max_steps: int | None = ...,
        checkpoint: str | Path | None = ...,
        progress: bool = ...,
    ) -> tuple[Vector, SolveInfo]: ...
    @final
    @without_autocast()
    def solve(
        self,
        v: Vector,
        damping: Damping = REQUIRED,
        *,
        return_info: bool = False,
        tolerance: float | None = None,
        max_steps: int | None = None,
        checkpoint: str | Path | None = None,
        progress: bool = False,
    ) -> Vector | tuple[Vector, SolveInfo]:
        """(F + λI)⁻¹ v, with the null space's v/λ included.

        Args:
            v: as in `matvec`.
            damping: λ in parameter space, or `RelativeDamping`; required, as no number suits every F's scale. A
                thousandth of the mean eigenvalue, ``fk.RelativeDamping(1e-3)``, is a common choice; 0.0 for F itself.
            return_info: also return how it went: method, steps, relative residual per column, converged.
            tolerance: as in `factorize`.
            max_steps: as in `factorize`.
            checkpoint: a file in which an iterative solver keeps where it stands. After an interruption (Ctrl-C, an
                exception, a killed process) the same call goes on from there; once done, it returns the solution in
                the file. Direct solves, which are done in one go, neither read nor write it.
            progress: show an iterative solver's steps and residual.

        Returns:
            The solution in v's form and the operator's dtype; with ``return_info`` a pair (solution, `SolveInfo`).

        Raises:
            InvalidTypeError: no damping, or not a number.
            SingularMatrixError: F + λI is singular.
            InvalidArgumentError: the checkpoint is the file of another solve (another v, damping or Fisher); it is left
                as it is.
            FileFormatError: the checkpoint is damaged, or a file of another kind.
        """
        columns, restore = self._columns(v, "solve")
        inverse = self._inverse(damping, "solve", tolerance, max_steps)
        if not return_info and not columns.shape[1]:
            return restore(columns.clone())
        if not return_info and checkpoint is None and not progress:
            return restore(inverse._solve(columns))
        path = None if checkpoint is None else io.as_path(checkpoint, f"{self._name}.solve(checkpoint)")
        solution, info = inverse._solve_with_info(columns, path, progress=progress)
        return (restore(solution), info) if return_info else restore(solution)

    @final
    @without_autocast()
    def logdet(self, damping: Damping = REQUIRED) -> Float[Tensor, ""]:
        """log det(F + λI), float64; -inf is an error, not a value.

        Args:
            damping: λ, or `RelativeDamping`; required. 0.0 for log det F, where F is not singular.

        Raises:
            InvalidTypeError: no damping, or not a number.
            NoClosedFormError: the structure is only solved iteratively.
            SingularMatrixError: F + λI is singular.
        """
        return self._inverse(damping, "logdet", None, None)._logdet()

    @final
    def to_scipy(self) -> LinearOperator:
        """A ``scipy.sparse.linalg.LinearOperator`` that takes and gives NumPy arrays on the CPU."""
        from scipy.sparse.linalg import LinearOperator  # takes longer to import than everything else here together

        @without_autocast()
        def product(array: Any) -> Any:
            columns = torch.as_tensor(array, dtype=self.dtype, device=self.device).reshape(self.size, -1)
            return self._matmat(columns).cpu().numpy().reshape(array.shape)

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(self.shape, matvec=product, matmat=product, rmatvec=product, rmatmat=product, dtype=dtype)

    @final
    def save(self, path: str | Path, max_shard_size: int | None = None) -> None:
        """Write the operator to a safetensors file that `fisherkit.load` reads without the model.

        What is at the path is replaced without a question, as ``torch.save`` does: scripts save to one path again and
        again. Only a model's weights, a safetensors file that is no Fisher file, are not. The old file or the new one
        is whole at every moment, also if saving is interrupted.

        Args:
            path: where; an older Fisher file is replaced, shards included.
            max_shard_size: bytes. Tensors that take more in all are written as ``name-00001-of-00003.safetensors`` and
                so on, beside an index ``name.safetensors.index.json``; larger tensors are cut. None for one file.

        Raises:
            InvalidArgumentError: the folder does not exist, the size is not positive, a model's weights are at the
                path, or shards would have to replace something that is not a Fisher file.
            InvalidTypeError: not a path, or a size that is not an integer.
            NoClosedFormError: the rows are streamed from the data and lie nowhere.
        """
        io.write(path, self._state(), self.space, self.metadata, max_shard_size=max_shard_size)

    @final
    @without_autocast()
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
        if other != 0 or not is_integer(other):
            raise InvalidTypeError(call=f"other + {self._name}", got=repr(other), expected="a FisherOperator")
        return self

    @final
    @without_autocast()
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
        """What it is, its sizes, and at which parameters it was measured, on one line."""
        known = self.metadata
        parts = [] if self._title == self._name else [self._title]
        parts.append(f"D = {self.size:,}")
        parts += [
            f"{sign} = {_grouped(known[key])}" for sign, key in (("N", "examples"), ("R", "rows")) if key in known
        ]
        parts += [text for text in (self._made_of(), known.get("normalization", "")) if text]
        if "parameters_hash" in known:
            parts.append(f"measured at {known.get('model', 'parameters')} {known['parameters_hash'][:8]}")
        return f"<{self._name}: {', '.join([*parts, str(self.dtype), str(self.device)])}>"


def _grouped(count: str) -> str:
    """A number of the metadata, which may be anything in a file that others wrote."""
    return f"{int(count):,}" if str(count).isdecimal() else str(count)
