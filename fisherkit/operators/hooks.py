"""What a structure supplies to be an operator: hooks that see only checked columns ``[D, K]``.

Owns the hooks' contract, their defaults and the checks that the public operations of `operators.base` share. Knows
neither models nor data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit import io
from fisherkit.errors import FileFormatError, NoClosedFormError, SingularMatrixError
from fisherkit.operators.damping import Damping, RelativeDamping, check_damping
from fisherkit.operators.factorization import Factorization
from fisherkit.space import ParameterSpace, Vector

if TYPE_CHECKING:
    from fisherkit.operators.base import FisherOperator


class OperatorHooks(ABC):
    """The private half of `FisherOperator`.

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

    def _draws(self, generator: torch.Generator | None, count: int) -> Float[Tensor, "D n"]:
        """Independent draws side by side; one after the other where a structure does not draw them at once."""
        return torch.cat([self._draw(generator) for _ in range(count)], dim=1)

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

    def _eigenvectors(self, k: int) -> Float[Tensor, "D k"]:
        raise self._no_closed_form(
            "eigenvectors",
            "its parts do not share eigenvectors",
            "scipy.sparse.linalg.eigsh(fisher.to_scipy(), k), which needs products alone",
        )

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
        return self._matmat(torch.eye(self.space.size, dtype=self.dtype, device=self.device))

    def _made_of(self) -> str:
        """What an operator holds, for its repr; empty where the class says it all."""
        return ""

    @abstractmethod
    def _unwrap(self) -> FisherOperator:
        """The operator that does the algebra; a wrapper returns what it holds."""

    # -- shared by the public operations -----------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def _title(self) -> str:
        known = [self.metadata[key] for key in ("kind", "structure") if key in self.metadata]
        share = float(self.metadata.get("dropped_share", 0))
        note = f" without {100 * share:.3g}% of its trace" if share else ""
        return self.metadata.get("terms") or " ".join(known) + note or self._name

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
            return damping.scale * float(self._trace()) / self.space.size
        return check_damping(damping, f"{self._name}.{operation}")

    def _no_closed_form(self, operation: str, why: str, try_: str) -> NoClosedFormError:
        return NoClosedFormError(
            call=f"{self._name}.{operation}",
            got=f"a {self._name} over D = {self.space.size:,} parameters",
            expected="a structure with a closed form",
            why=why,
            try_=try_,
        )
