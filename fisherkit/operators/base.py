"""The contract of every Fisher operator: a symmetric positive semi-definite D × D matrix that is never written out.

Public methods are final: they check their input once and call a private hook, outside of a caller's autocast. A new
structure supplies hooks, and inherits everything else, the checks and the conformance suite included. The list of
operations is closed. This module knows neither models nor data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, TypeVar, final, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherkit import io
from fisherkit.arguments import check_count, check_number, check_type, is_integer
from fisherkit.arithmetic import MatMat, without_autocast
from fisherkit.coverage import Coverage
from fisherkit.errors import FileFormatError, InvalidTypeError, NoClosedFormError, SingularMatrixError
from fisherkit.operators.damping import REQUIRED, Damping, RelativeDamping, check_damping
from fisherkit.operators.factorization import Factorization, IterativeFactorization, diagonal_inverse
from fisherkit.operators.layer_layout import LayerLayout, marginals
from fisherkit.processes import ALONE, Processes
from fisherkit.rows.collection import Rows
from fisherkit.solvers import SolveInfo
from fisherkit.space import ParameterSpace, Vector

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

T = TypeVar("T")

DEFAULT_TOLERANCE = 1e-10

AT_ONCE = 256
"""Columns of a default that multiplies with all of I."""

OPTIONAL_HOOKS = (
    "_factorize", "_plus", "_gram", "_trace", "_frobenius", "_eigenvalues", "_eigenvectors", "_effective_dimension",
    "_rank_bound", "_to_dense", "_converted", "_write", "_made_of", "_terms", "_blocks", "_blocks_of_node",
    "is_diagonal", "is_dense", "is_sharded", "inversion", "decomposed_side", "nbytes", "together", "stored_rows",
    "layout", "factors", "eigenbases",
    "_nearest_kronecker", "_approximate_inverse", "_usual_damping", "_average", "_moment", "_packed",
)  # fmt: skip
"""What a structure may override, each with a default; beside these are the abstract methods."""


class FisherOperator(ABC):
    """A symmetric positive semi-definite matrix over a parameter space.

    Args:
        space: the parameters it acts on.
        dtype: of its vectors.
        device: of its vectors.
    """

    tag: ClassVar[str] = ""
    """The structure's name in files; empty for what is never saved under a name of its own."""

    other_tags: ClassVar[tuple[str, ...]] = ()
    """Further names under which files hold it."""

    def __init__(self, space: ParameterSpace, *, dtype: torch.dtype, device: torch.device) -> None:
        self.space = space
        self.dtype = dtype
        self.device = torch.device(device)
        self.metadata: dict[str, str] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        inherited = next(vars(base)["_matmat"] for base in cls.__mro__[1:] if "_matmat" in vars(base))
        if "_matmat" in vars(cls) and not getattr(inherited, "__isabstractmethod__", False):
            # Another product is another matrix: what a parent class knows of its own is not known of this one.
            for name in {"tag", "other_tags", *OPTIONAL_HOOKS} - set(vars(cls)):
                setattr(cls, name, vars(FisherOperator)[name])

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
        return self.matvec(v)

    @final
    @without_autocast()
    def quadratic_form(self, v: Tensor | Mapping[str, Tensor]) -> Float[Tensor, "..."]:
        """vᵀ F v, a scalar for one vector, ``[K]`` for columns; float64."""
        columns = self._columns(v, "quadratic_form")[0]  # type: ignore[type-var]
        values = (columns.double() * self._matmat(columns).double()).sum(0)
        flat = self.space.flatten(v) if isinstance(v, Mapping) else v
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
            InvalidTypeError, InvalidArgumentError: k is not an integer between 1 and D.
            NoClosedFormError: sums whose parts do not share eigenvectors.
        """
        call = f"{self._name}.eigenvalues"
        return self._eigenvalues(
            self.together.each(call, lambda: self.size if k is None else check_count(call, "k", k, most=self.size))
        )

    @final
    @without_autocast()
    def eigenvectors(self, k: int) -> Float[Tensor, "D k"]:
        """Orthonormal eigenvectors of the k largest eigenvalues in columns, in the operator's dtype.

        Column i belongs to ``eigenvalues(k)[i]``. Signs are arbitrary, as is the basis where eigenvalues repeat; the
        same call gives the same columns.

        Args:
            k: how many, 1 to D.

        Raises:
            InvalidTypeError, InvalidArgumentError: k is not an integer between 1 and D.
            NoClosedFormError: as `eigenvalues`.
        """
        call = f"{self._name}.eigenvectors"
        return self._eigenvectors(self.together.each(call, lambda: check_count(call, "k", k, most=self.size)))

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
        self, v: Vector, damping: Damping, *, return_info: Literal[False] = ..., tolerance: float | None = ...,
        max_steps: int | None = ..., checkpoint: str | Path | None = ..., progress: bool = ...,
    ) -> Vector: ...  # fmt: skip
    @overload
    def solve(
        self, v: Vector, damping: Damping, *, return_info: Literal[True], tolerance: float | None = ...,
        max_steps: int | None = ..., checkpoint: str | Path | None = ..., progress: bool = ...,
    ) -> tuple[Vector, SolveInfo]: ...  # fmt: skip
    @final
    @without_autocast()
    def solve(
        self, v: Vector, damping: Damping = REQUIRED, *, return_info: bool = False, tolerance: float | None = None,
        max_steps: int | None = None, checkpoint: str | Path | None = None, progress: bool = False,
    ) -> Vector | tuple[Vector, SolveInfo]:  # fmt: skip
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
        inverse = self._inverse(damping, "logdet", None, None)
        try:
            return inverse._logdet()
        except NoClosedFormError as error:
            raise error.at(f"{self._name}.logdet") from error

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
        self._write(path, self.metadata, max_shard_size)

    @final
    @without_autocast()
    def __mul__(self, scale: float) -> FisherOperator:
        """scale · F; the scale must not be negative."""
        call, why = f"{self._name} * scale", "operators form a cone: a negative multiple is not positive semi-definite"
        result = self._scaled(self.together.each(call, lambda: check_number(call, "scale", scale, why=why)))
        kept = {k: v for k, v in self.metadata.items() if (k, v) != ("normalization", "sum")}  # it is none any more
        result.metadata = {**kept, "terms": f"{scale} * ({self._title})"}
        return result

    __rmul__ = __mul__

    @final
    def __truediv__(self, divisor: float) -> FisherOperator:
        call = f"{self._name} / divisor"
        return self * self.together.each(call, lambda: 1 / check_number(call, "divisor", divisor, above=True))

    @final
    def __radd__(self, other: int) -> FisherOperator:
        """0 + F, so that ``sum(fishers)`` works."""
        call = f"other + {self._name}"

        def check() -> None:
            if other != 0 or not is_integer(other):
                raise InvalidTypeError(call, repr(other), "a FisherOperator")

        self.together.each(call, check)
        return self

    @final
    @without_autocast()
    def __add__(self, other: FisherOperator) -> FisherOperator:
        """F + other, folded into one operator where that is exact, else kept as a sum."""
        # The sum is itself an operator, so this import cannot be at the top.
        from fisherkit.operators.composite import add, addends

        call = f"{self._name} + other"

        def check() -> None:
            check_type(call, "", other, FisherOperator, "a FisherOperator")
            addends(self, other)

        self.together.each(call, check)
        result = add(self, other)
        own = ("examples", "rows")  # numbers of each term, and not of the sum where they are equal
        shared = {k: v for k, v in self.metadata.items() if other.metadata.get(k) == v and k not in own}
        result.metadata = {**shared, "terms": f"{self._title} + {other._title}"}
        return result

    @final
    def coverage(self) -> Coverage:
        """Which parameters are handled by which rule, how they are kept, and the memory that takes.

        Raises:
            NoClosedFormError: the operator was not built from a model, or is a sum of such.
        """
        if "coverage" not in self._recorded:
            raise self._no_closed_form(
                "coverage", "it was not built from a model", "the coverage of each term of a sum"
            )
        return Coverage.from_json(self._recorded["coverage"])

    def __repr__(self) -> str:
        known = self._recorded
        parts = [] if self._title == self._name else [self._title]
        parts.append(f"D = {self.size:,}")
        parts += [
            f"{sign} = {_grouped(known[key])}" for sign, key in (("N", "examples"), ("R", "rows")) if known.get(key)
        ]
        parts += [text for text in (self._made_of(), known.get("normalization", "")) if text]
        if "parameters_hash" in known:
            parts.append(f"measured at {known.get('model', 'parameters')} {known['parameters_hash'][:8]}")
        return f"<{self._name}: {', '.join([*parts, str(self.dtype), str(self.device)])}>"

    # -- hooks: what every structure must supply ----------------------------------------------------------------------

    @abstractmethod
    def _matmat(self, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        """F V."""

    @abstractmethod
    def _diagonal(self) -> Float[Tensor, "D"]:
        """diag F."""

    @abstractmethod
    def _draw(self, generator: torch.Generator | None, count: int) -> Float[Tensor, "D n"]:
        """Independent draws from the normal distribution N(0, F), side by side.

        By a root of F that does not depend on the choice of eigenvectors, so that processes agree: the symmetric one,
        or rows.
        """

    @abstractmethod
    def _scaled(self, scale: float) -> FisherOperator:
        """scale · F as an operator of the same structure."""

    @abstractmethod
    def _state(self) -> io.State:
        """What a file must hold."""

    @classmethod
    def _from_state(cls, space: ParameterSpace, state: io.State) -> FisherOperator:
        """The operator that `_state` described; every structure with a `tag` supplies it."""
        raise FileFormatError(
            "load", f"an operator with the tag {state.tag!r}", "one that can be loaded",
            why=f"{cls.__name__} does not define _from_state",
        )  # fmt: skip

    # -- operations, overridden where a structure has something better -------------------------------------------------

    def _factorize(self, damping: float, tolerance: float, max_steps: int | None) -> Factorization:
        """A reusable inverse of F + damping·I; by default conjugate gradients, which need products alone."""
        return IterativeFactorization(self, damping, tolerance, max_steps)

    def _plus(self, other: FisherOperator) -> FisherOperator | None:
        """F + other folded into one operator where that is exact, else None."""
        return None

    def _gram(self) -> Float[Tensor, "R R"]:
        raise self._no_closed_form("gram", "only the full structure has rows of its own", 'structure="full"')

    def _trace(self) -> Float[Tensor, ""]:
        return self._diagonal().double().sum()

    def _frobenius(self) -> Float[Tensor, ""]:
        """‖F‖_F, float64; by default from D products."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for start in range(0, self.space.size, AT_ONCE):
            columns = self._unit_columns(start, min(start + AT_ONCE, self.space.size))
            total += self._matmat(columns).double().square().sum()
        return total.sqrt()

    def _eigenvalues(self, k: int) -> Float[Tensor, "k"]:
        raise self._no_closed_form(
            "eigenvalues", "its parts do not share eigenvectors", "fk.estimators.lanczos_eigenvalues"
        )

    def _eigenvectors(self, k: int) -> Float[Tensor, "D k"]:
        raise self._no_closed_form(
            "eigenvectors", "its parts do not share eigenvectors",
            "scipy.sparse.linalg.eigsh(fisher.to_scipy(), k), which needs products alone",
        )  # fmt: skip

    def _effective_dimension(self, damping: float) -> Float[Tensor, ""]:
        """Σ w / (w + λ) over the eigenvalues w; 0 / 0 counts as 0."""
        try:
            values = self._eigenvalues(self._rank_bound)
        except NoClosedFormError as error:
            why, try_ = error.why, "fk.estimators.lanczos_effective_dimension(fisher, damping=...)"
            raise self._no_closed_form("effective_dimension", why, try_) from error
        return torch.where(values > 0, values / (values + damping), 0).sum()

    @property
    def _rank_bound(self) -> int:
        """So many eigenvalues at most are not 0."""
        return self.space.size

    def _to_dense(self) -> Float[Tensor, "D D"]:
        return self._matmat(self._unit_columns(0, self.space.size))

    def _converted(self, dtype: torch.dtype, device: torch.device) -> FisherOperator:
        """The same matrix in another dtype and on another device; by default through what a file would hold."""
        try:
            state = self._state().map(lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype))
            return type(self)._from_state(self.space, state)
        except (NoClosedFormError, FileFormatError) as error:
            raise error.at(f"{self._name} in {dtype}") from error

    def _write(self, path: str | Path, metadata: dict[str, str], max_shard_size: int | None) -> None:
        """Write a Fisher file; by default of `_state`."""
        state = self._state()
        if not state.tag:
            raise self._no_closed_form("save", "it has no tag that a file could name", f'{self._name}.tag = "..."')
        io.write(path, state, self.space, metadata, max_shard_size=max_shard_size)

    def _packed(self, dtype: torch.dtype) -> io.State | None:
        """What `_state` has, in a form that rounding to a coarser dtype leaves positive semi-definite, and rounded.

        Tensors named ``…_basis`` are made orthonormal again. None for an operator that is kept as it is.
        """
        return None

    def _made_of(self) -> str:
        """What an operator holds, for its repr; empty where the class says it all."""
        return ""

    # -- what applications and other operators ask ---------------------------------------------------------------------

    def _terms(self) -> tuple[FisherOperator, ...]:
        """Operators that add up to F; more than one for what does not fold."""
        return (self,)

    def _blocks(self) -> tuple[FisherOperator, ...]:
        """The finest independent diagonal blocks that are known, in flat order of their first names."""
        return (self,)

    @classmethod
    def _blocks_of_node(cls, node: io.Node, space: ParameterSpace, reader: io.Reader) -> Makers | None:
        """The same of an operator in a file, each made when called; None for one block."""
        return None

    @property
    def is_diagonal(self) -> bool:
        """Whether F is known to be nothing but its diagonal."""
        return False

    @property
    def is_dense(self) -> bool:
        """Whether the D × D matrix itself lies in memory."""
        return False

    @property
    def is_sharded(self) -> bool:
        """Whether other processes have blocks of it that this one lacks."""
        return False

    @property
    def inversion(self) -> Literal["cheap", "direct", "iterative"]:
        """How F + λI is inverted: at the price of a few products, by one decomposition, or by conjugate gradients."""
        return "iterative"

    @property
    def decomposed_side(self) -> int:
        """The side of the largest matrix that `_eigenvalues` decomposes; 0 if they are there, or are refused."""
        return 0

    @property
    def nbytes(self) -> int:
        """Bytes that its tensors take in memory."""
        return self._state().nbytes

    @property
    def together(self) -> Processes:
        """The processes that must ask it the same questions, each of which has a part; by default this one alone."""
        return ALONE

    @property
    def stored_rows(self) -> tuple[Rows, float] | None:
        """J and s with F = s · JᵀJ, where there are such rows in memory; `_plus` of two stacks √s J, its own first."""
        return None

    @property
    def layout(self) -> LayerLayout | None:
        """The one layer's grid [outputs, inputs] that F's own factors or bases act on."""
        return None

    @property
    def factors(self) -> tuple[Float[Tensor, "J J"], Float[Tensor, "O O"]] | None:
        """A and G with F = G ⊗ A on its `layout`, where F is such a product."""
        return None

    @property
    def eigenbases(self) -> tuple[Float[Tensor, "J r"], Float[Tensor, "O s"], Float[Tensor, "s r"]] | None:
        """U_A, U_G and e with F (U_G ⊗ U_A) = (U_G ⊗ U_A) diag(e) on its `layout`, where such are cheap."""
        return None

    def _nearest_kronecker(self, layout: LayerLayout) -> tuple[Float[Tensor, "J J"], Float[Tensor, "O O"]] | None:
        """A and G, float64, of a Kronecker product on that layer's grid near F; None if there is no cheap one."""
        if not self.is_diagonal:
            return None
        on_outputs, on_inputs = marginals(layout.to_grid(self._diagonal().double().unsqueeze(-1))[0])
        return on_inputs.diag(), on_outputs.diag()

    def _approximate_inverse(self, damping: float) -> MatMat | None:
        """Product with an approximate inverse of F + damping·I for conjugate gradients; None for none."""
        if self.inversion == "cheap":
            return self._factorize(damping, DEFAULT_TOLERANCE, None)._solve
        return diagonal_inverse(self, damping)

    def _usual_damping(self) -> float:
        """A multiple of the mean eigenvalue that suits influence scores; see `usual_damping`."""
        if self.is_diagonal:
            return 0.01
        raise self._no_closed_form(
            "usual_damping", "what suits a structure is measured, and this one tells no such number",
            "damping=fk.RelativeDamping(...), or a _usual_damping of its own",
        )  # fmt: skip

    def _average(self) -> FisherOperator | None:
        """The average over a layer's outputs where the structure has its own; None to be made of `_moment`."""
        return None

    def _moment(self, places: Int[Tensor, "O J"]) -> Float[Tensor, "J J"]:
        """(1/O) Σ_o F[places[o], places[o]]; by default from O products with J columns."""
        total: Tensor | None = None
        for row in places:
            columns = torch.zeros(self.space.size, len(row), dtype=self.dtype, device=self.device)
            columns[row, torch.arange(len(row), device=self.device)] = 1
            part = self._matmat(columns)[row]
            total = part if total is None else total + part
        return torch.zeros(0, 0) if total is None else total / len(places)

    # -- shared by the operations --------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _unit_columns(self, start: int, stop: int) -> Float[Tensor, "D k"]:
        columns = torch.zeros(self.space.size, stop - start, dtype=self.dtype, device=self.device)
        columns[start:stop].fill_diagonal_(1)
        return columns

    def _no_closed_form(self, operation: str, why: str, try_: str) -> NoClosedFormError:
        return NoClosedFormError(
            f"{self._name}.{operation}", f"a {self._name} over D = {self.space.size:,} parameters",
            "a structure with a closed form", why=why, try_=try_,
        )  # fmt: skip

    @property
    def _recorded(self) -> dict[str, str]:
        """The metadata as far as they are known without computing anything."""
        return self.metadata

    @property
    def _title(self) -> str:
        recorded = self._recorded
        known = [recorded[key] for key in ("kind", "structure") if key in recorded]
        share = float(recorded.get("dropped_share", 0))
        note = f" without {100 * share:.3g}% of its trace" if share else ""
        return recorded.get("terms") or " ".join(known) + note or self._name

    def _inverse(
        self, damping: Damping, operation: str, tolerance: float | None, max_steps: int | None
    ) -> Factorization:
        if tolerance is None:
            tolerance = DEFAULT_TOLERANCE if self.dtype == torch.float64 else 1e-5
        resolved = self._resolve(damping, operation, tolerance=tolerance, max_steps=max_steps)
        try:
            return self._factorize(resolved, tolerance, max_steps)
        except SingularMatrixError as error:
            # The part that found out is not what the caller called.
            raise error.at(f"{self._name}.{operation}(damping={resolved:g})") from error

    def _columns(self, v: Vector, operation: str) -> tuple[Tensor, Callable[[Tensor], Vector]]:
        call = f"{self._name}.{operation}"
        return self.together.each(call, lambda: self.space.to_columns(v, call, dtype=self.dtype, device=self.device))

    def _resolve(self, damping: Damping, operation: str, **settings: object) -> float:
        self.together.require_same(f"{self._name}.{operation}", lambda: {"damping": damping, **settings})
        if isinstance(damping, RelativeDamping):
            return damping.scale * float(self._trace()) / self.space.size
        return check_damping(damping, f"{self._name}.{operation}")


HOOKS = (*FisherOperator.__abstractmethods__, *OPTIONAL_HOOKS)


def _grouped(count: str) -> str:
    """A number of the metadata, which may be anything in a file that others wrote."""
    return f"{int(count):,}" if str(count).isdecimal() else str(count)


Makers: TypeAlias = dict[tuple[str, ...], Callable[[], FisherOperator]]
"""A block's names to the block, made when called; in flat order of their first names."""


def fold(a: FisherOperator, b: FisherOperator) -> FisherOperator | None:
    """A + B as one operator of one structure if either knows how, else None; both over the same space."""
    if len(a._terms()) > 1 or len(b._terms()) > 1:
        return None
    (a,), (b,) = a._terms(), b._terms()
    folded = a._plus(b)
    return b._plus(a) if folded is None else folded


def convert(operator: FisherOperator, dtype: torch.dtype, device: torch.device) -> FisherOperator:
    """The same matrix in another dtype and on another device; itself where nothing changes.

    Sums of several Fishers with little damping cancel: they are solved in float64, whatever dtype they are kept in. A
    matrix that is positive semi-definite up to the rounding of its own dtype becomes so up to that of float64, which
    takes an eigen-decomposition of every dense matrix, and of Kronecker factors that are not positive definite.

    Raises:
        NoClosedFormError: the rows are streamed from the data and lie nowhere.
    """
    if operator.dtype == dtype and operator.device == device:
        return operator
    result = operator._converted(dtype, device)
    result.metadata = dict(operator.metadata)
    return result
