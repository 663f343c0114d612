"""One layer's Fisher matrix as a Kronecker product, and as a diagonal in a Kronecker product's eigenbasis.

F = G ⊗ A, with A the second moment of the layer's inputs (a 1 appended for the bias) and G that of the gradients at its
outputs (Martens and Grosse, arXiv 1503.05671); F = (U_G ⊗ U_A) diag(e) (U_G ⊗ U_A)ᵀ with e measured in that basis
(George et al., arXiv 1806.03884). Owns the algebra of both, which is the same: a damped inverse of the first is one of
the second. `layer_layout` owns which parameter lies where.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import ClassVar, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit import io
from fisherkit.errors import SingularMatrixError
from fisherkit.operators.base import FisherOperator
from fisherkit.operators.eigen_form import EigenForm, TurnedBackForm
from fisherkit.operators.factorization import Factorization
from fisherkit.operators.layer_layout import LayerLayout, marginals
from fisherkit.operators.linalg import (
    check_symmetric,
    check_tensor,
    damped_reciprocal,
    nearest_semidefinite,
    orthonormal,
    singular,
    spectrum,
)
from fisherkit.operators.row_forms import RowForm
from fisherkit.rows.base import aligned_product
from fisherkit.rows.collection import Rows
from fisherkit.rows.factored import FactoredRows
from fisherkit.space import ParameterSpace

Spectrum: TypeAlias = Callable[[], tuple[Tensor, Tensor]]
"""Eigenvalues [r] and eigenvectors [n, r] of a factor, when called."""


def scaled_spectrum(known: Spectrum, scale: float) -> Spectrum:
    """The spectrum of a multiple of a factor, from the factor's, which is decomposed once each time it is called."""

    def scaled() -> tuple[Tensor, Tensor]:
        values, vectors = known()
        return scale * values, vectors

    return scaled


class KroneckerOperator(FisherOperator):
    """F = G ⊗ A over one layer's weight, or weight and then bias.

    Args:
        space: the layer's weight [O, I] (or [O, I, k...], taken as [O, I·k...]), and its bias [O] if it has one.
        activation: A [I, I], or [I+1, I+1] with a bias, whose row and column are the last; symmetric and finite.
        gradient: G [O, O], likewise; of the same dtype and device.
        transposed: the weight is stored as [I, O].
        symmetric: the factors are known to be symmetric up to rounding and not checked.
        activation_spectrum: a cheaper way than from the matrix to A's eigenvalues [r] and orthonormal eigenvectors
            [I, r], r the rank; used when they are first needed.
        gradient_spectrum: the same for G.
    """

    tag: ClassVar[str] = "kronecker"

    def __init__(
        self, space: ParameterSpace, activation: Float[Tensor, "..."], gradient: Float[Tensor, "..."],
        transposed: bool = False, *, symmetric: bool = False, activation_spectrum: Spectrum | None = None,
        gradient_spectrum: Spectrum | None = None,
    ) -> None:  # fmt: skip
        name = "KroneckerOperator"
        self._layout = LayerLayout.of(space, transposed, f"{name}(space)")
        width, outputs = self._layout.width, self._layout.outputs
        activation = check_tensor(activation, [width, width], f"{name}(activation)")
        gradient = check_tensor(
            gradient, [outputs, outputs], f"{name}(gradient)", dtypes=(activation.dtype,), device=activation.device
        )
        super().__init__(space, dtype=activation.dtype, device=activation.device)
        if not symmetric:
            check_symmetric(activation, f"{name}(activation)")
            check_symmetric(gradient, f"{name}(gradient)")
        self._activation, self._gradient = activation, gradient
        self._spectra = activation_spectrum, gradient_spectrum

    @cached_property
    def _eigen(self) -> EigenKroneckerOperator:
        # The product of the factors' eigenvalues stays in float64: its reciprocals are what a solve consists of.
        (on_inputs, activation_basis), (on_outputs, gradient_basis) = (
            spectrum(matrix, f"KroneckerOperator({name})") if known is None else known()
            for known, matrix, name in zip(
                self._spectra, (self._activation, self._gradient), ("activation", "gradient"), strict=True
            )
        )
        return EigenKroneckerOperator(
            self.space, activation_basis.to(self.dtype), gradient_basis.to(self.dtype),
            torch.outer(on_outputs, on_inputs), self._layout.transposed,
        )  # fmt: skip

    @property
    def activation(self) -> Float[Tensor, "J J"]:
        """A; not to be changed."""
        return self._activation

    @property
    def gradient(self) -> Float[Tensor, "O O"]:
        """G; not to be changed."""
        return self._gradient

    @property
    def layout(self) -> LayerLayout:
        """Which parameter lies where on the grid that the factors act on."""
        return self._layout

    def eigen(self) -> EigenKroneckerOperator:
        """The same matrix in its eigenbasis; computed once, O(O³ + I³)."""
        return self._eigen

    def _matmat(self, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        return self._layout.to_flat(self._gradient @ self._layout.to_grid(columns) @ self._activation)

    def _diagonal(self) -> Float[Tensor, "D"]:
        grid = torch.outer(self._gradient.diagonal(), self._activation.diagonal())
        return self._layout.to_flat(grid.unsqueeze(0)).squeeze(-1)

    def _trace(self) -> Float[Tensor, ""]:
        return self._gradient.diagonal().double().sum() * self._activation.diagonal().double().sum()

    def _factorize(self, damping: float, tolerance: float, max_steps: int | None) -> Factorization:
        return _EigenKroneckerFactorization(self, self._eigen, damping)

    def _draw(self, generator: torch.Generator | None, count: int) -> Float[Tensor, "D n"]:
        return self._eigen._draw(generator, count)

    def _scaled(self, scale: float) -> KroneckerOperator:
        on_inputs, on_outputs = self._spectra
        return KroneckerOperator(
            self.space, self._activation, scale * self._gradient, self._layout.transposed, symmetric=True,
            activation_spectrum=on_inputs,
            gradient_spectrum=None if on_outputs is None else scaled_spectrum(on_outputs, scale),
        )  # fmt: skip

    def _plus(self, other: FisherOperator) -> FisherOperator | None:
        # A sum of Kronecker products is one only if one factor is the same in both, up to a number.
        if other.factors is None or other.layout != self._layout:
            return None
        (a, g), (b, h) = self.factors, other.factors
        if (ratio := _ratio(g, h)) is not None:
            return KroneckerOperator(self.space, a + ratio * b, g, self._layout.transposed, symmetric=True)
        if (ratio := _ratio(a, b)) is not None:
            return KroneckerOperator(self.space, a, g + ratio * h, self._layout.transposed, symmetric=True)
        return None

    def _frobenius(self) -> Float[Tensor, ""]:
        return self._activation.double().norm() * self._gradient.double().norm()

    def _converted(self, dtype: torch.dtype, device: torch.device) -> FisherOperator:
        a, on_inputs = nearest_semidefinite(self._activation, "KroneckerOperator(activation)")
        g, on_outputs = nearest_semidefinite(self._gradient, "KroneckerOperator(gradient)")
        return KroneckerOperator(
            self.space, a.to(device, dtype), g.to(device, dtype), self._layout.transposed, symmetric=True,
            activation_spectrum=lambda: (on_inputs[0].to(device), on_inputs[1].to(device)),
            gradient_spectrum=lambda: (on_outputs[0].to(device), on_outputs[1].to(device)),
        )  # fmt: skip

    @property
    def factors(self) -> tuple[Float[Tensor, "J J"], Float[Tensor, "O O"]]:
        """A and G; not to be changed."""
        return self._activation, self._gradient

    inversion = "cheap"

    @property
    def decomposed_side(self) -> int:
        """The larger factor's."""
        return max(len(self._activation), len(self._gradient))

    def _nearest_kronecker(self, layout: LayerLayout) -> tuple[Float[Tensor, "J J"], Float[Tensor, "O O"]]:
        return self._activation.double(), self._gradient.double()

    def _usual_damping(self) -> float:
        return 0.1

    def _average(self) -> FisherOperator:
        identity = torch.eye(len(self._gradient), dtype=self.dtype, device=self.device)
        mean = self._gradient.diagonal().mean()
        return KroneckerOperator(self.space, self._activation, mean * identity, self._layout.transposed, symmetric=True)

    def _eigenvalues(self, k: int) -> Float[Tensor, "k"]:
        return self._eigen._eigenvalues(k)

    def _eigenvectors(self, k: int) -> Float[Tensor, "D k"]:
        return self._eigen._eigenvectors(k)

    @property
    def _rank_bound(self) -> int:
        return self._eigen._rank_bound

    def _to_dense(self) -> Float[Tensor, "D D"]:
        layout = self._layout
        # Entry (o, j) of the grid is parameter place[o, j]; both sides of the product are put in that order.
        grid = torch.arange(self.size, device=self.device).reshape(1, layout.outputs, layout.width)
        order = layout.to_flat(grid).squeeze(-1)
        return torch.kron(self._gradient, self._activation)[order][:, order]

    def _state(self) -> io.State:
        tensors = {"activation": self._activation, "gradient": self._gradient}
        return io.State(self.tag, self.space.names, tensors, {"transposed": self._layout.transposed})

    @classmethod
    def _from_state(cls, space: ParameterSpace, state: io.State) -> KroneckerOperator:
        tensors = state.tensors
        return cls(space, tensors["activation"], tensors["gradient"], bool(state.options["transposed"]))


class EigenKroneckerOperator(FisherOperator):
    """F = (U_G ⊗ U_A) diag(e) (U_G ⊗ U_A)ᵀ over one layer's weight, or weight and then bias.

    Args:
        space: as in `KroneckerOperator`.
        activation_basis: U_A [I, r], or [I+1, r] with a bias; r orthonormal eigenvectors in columns. F is 0 on what
            they do not span.
        gradient_basis: U_G [O, s], likewise; of the same dtype and device.
        eigenvalues: e [s, r], 0 or more, in the bases' dtype or in float64.
        transposed: the weight is stored as [I, O].
        decomposed: all of these come from a decomposition of finite matrices, and are not checked.
    """

    tag: ClassVar[str] = "eigen_kronecker"

    def __init__(
        self, space: ParameterSpace, activation_basis: Float[Tensor, "..."], gradient_basis: Float[Tensor, "..."],
        eigenvalues: Float[Tensor, "..."], transposed: bool = False, *, decomposed: bool = False,
    ) -> None:  # fmt: skip
        name = "EigenKroneckerOperator"
        self._layout = LayerLayout.of(space, transposed, f"{name}(space)")
        if decomposed:
            super().__init__(space, dtype=activation_basis.dtype, device=activation_basis.device)
            self.activation_basis, self.gradient_basis, self._values = activation_basis, gradient_basis, eigenvalues
            return
        width, outputs = self._layout.width, self._layout.outputs
        rank_in, rank_out = _columns(activation_basis, width), _columns(gradient_basis, outputs)
        basis = check_tensor(activation_basis, [width, rank_in], f"{name}(activation_basis)")
        dtype, device = basis.dtype, basis.device
        super().__init__(space, dtype=dtype, device=device)
        self.activation_basis = basis
        self.gradient_basis = check_tensor(
            gradient_basis, [outputs, rank_out], f"{name}(gradient_basis)", dtypes=(dtype,), device=device
        )
        self._values = check_tensor(
            eigenvalues, [rank_out, rank_in], f"{name}(eigenvalues)", dtypes=(dtype, torch.float64), device=device,
            nonnegative=True,
        )  # fmt: skip

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as [I, O]."""
        return self._layout.transposed

    @property
    def layout(self) -> LayerLayout:
        """Which parameter lies where on the grid that the bases act on."""
        return self._layout

    @property
    def eigenvalue_grid(self) -> Float[Tensor, "s r"]:
        """e, one for each pair of basis vectors; not to be changed."""
        return self._values

    def _rotate_scale_rotate(self, columns: Float[Tensor, "D K"], scales: Float[Tensor, "O J"]) -> Float[Tensor, "D K"]:
        """(U_G ⊗ U_A) diag(scales) (U_G ⊗ U_A)ᵀ V."""
        inner = aligned_product(self.gradient_basis.mT @ self._layout.to_grid(columns), self.activation_basis)
        return self._rotate_back(scales * inner)

    def _rotate_back(self, grid: Float[Tensor, "K O J"]) -> Float[Tensor, "D K"]:
        return self._layout.to_flat(aligned_product(self.gradient_basis @ grid, self.activation_basis.mT))

    def _matmat(self, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        return self._rotate_scale_rotate(columns, self._values.to(self.dtype))

    def _diagonal(self) -> Float[Tensor, "D"]:
        grid = self.gradient_basis.square() @ self._values.to(self.dtype) @ self.activation_basis.square().mT
        return self._layout.to_flat(grid.unsqueeze(0)).squeeze(-1)

    def _trace(self) -> Float[Tensor, ""]:
        return self._values.double().sum()

    def _factorize(self, damping: float, tolerance: float, max_steps: int | None) -> Factorization:
        return _EigenKroneckerFactorization(self, self, damping)

    def _draw(self, generator: torch.Generator | None, count: int) -> Float[Tensor, "D n"]:
        noise = torch.randn(count, *self._values.shape, dtype=self.dtype, device=self.device, generator=generator)
        return self._rotate_back(self._values.sqrt().to(self.dtype) * noise)

    def _scaled(self, scale: float) -> EigenKroneckerOperator:
        return self._with_values(scale * self._values)

    def _plus(self, other: FisherOperator) -> FisherOperator | None:
        # Of one eigenbasis, as a matrix and its average over outputs are.
        if not isinstance(other, EigenKroneckerOperator) or other._layout != self._layout:
            return None
        shared = self.activation_basis is other.activation_basis and self.gradient_basis is other.gradient_basis
        return self._with_values(self._values + other._values) if shared else None

    def _with_values(self, values: Float[Tensor, "s r"]) -> EigenKroneckerOperator:
        return EigenKroneckerOperator(
            self.space, self.activation_basis, self.gradient_basis, values, self._layout.transposed
        )

    def _frobenius(self) -> Float[Tensor, ""]:
        return self._values.double().norm()

    inversion = "cheap"

    def _nearest_kronecker(self, layout: LayerLayout) -> tuple[Float[Tensor, "J J"], Float[Tensor, "O O"]]:
        """With F's eigenvectors, and eigenvalues whose outer product has the marginals of F's."""
        on_outputs, on_inputs = marginals(self._values.double())
        u_a, u_g = self.activation_basis.double(), self.gradient_basis.double()
        return (u_a * on_inputs) @ u_a.mT, (u_g * on_outputs) @ u_g.mT

    def _usual_damping(self) -> float:
        return 0.1

    def _average(self) -> FisherOperator:
        outputs = self._layout.outputs
        if len(self._values) == outputs:
            return self._with_values(self._values.mean(0).expand_as(self._values))
        u = self.activation_basis
        moment = (u * (self._values.to(self.dtype).sum(0) / outputs)) @ u.mT
        identity = torch.eye(outputs, dtype=self.dtype, device=self.device)
        return KroneckerOperator(
            self.space, (moment + moment.mT) / 2, identity, self._layout.transposed, symmetric=True
        )

    def _eigenvalues(self, k: int) -> Float[Tensor, "k"]:
        values = self._values.double().flatten()
        known = values.topk(min(k, len(values))).values
        return torch.nn.functional.pad(known, (0, k - len(known)))

    def _eigenvectors(self, k: int) -> Float[Tensor, "D k"]:
        places = self._values.double().flatten().topk(min(k, self._values.numel())).indices
        on_outputs = self.gradient_basis.mT[places // self._values.shape[1]]
        on_inputs = self.activation_basis.mT[places % self._values.shape[1]]
        columns = self._layout.to_flat(on_outputs.unsqueeze(2) * on_inputs.unsqueeze(1))
        return columns if len(places) == k else orthonormal(columns.double(), k).to(self.dtype)

    @property
    def _rank_bound(self) -> int:
        return self._values.numel()

    @property
    def _null(self) -> int:
        """Dimensions of the null space that the bases do not span."""
        return self.size - self._values.numel()

    def _state(self) -> io.State:
        tensors = {
            "activation_basis": self.activation_basis,
            "gradient_basis": self.gradient_basis,
            "eigenvalues": self._values,
        }
        return io.State(self.tag, self.space.names, tensors, {"transposed": self._layout.transposed})

    @classmethod
    def _from_state(cls, space: ParameterSpace, state: io.State) -> EigenKroneckerOperator:
        tensors = state.tensors
        return cls(
            space, tensors["activation_basis"], tensors["gradient_basis"], tensors["eigenvalues"],
            bool(state.options["transposed"]),
        )  # fmt: skip


class _EigenKroneckerFactorization(Factorization):
    """(U_G ⊗ U_A) diag(1 / (e + λ)) (U_G ⊗ U_A)ᵀ, for an operator that is, or can be brought to, this form."""

    def __init__(self, operator: FisherOperator, eigen: EigenKroneckerOperator, damping: float) -> None:
        super().__init__(operator, damping)
        self._eigen = eigen
        values = eigen._values.double()
        call = f"{operator._name}.factorize"
        if damping == 0.0 and eigen._null:
            raise SingularMatrixError(**singular(call, damping, f"{eigen._null:,} of its eigenvalues are 0"))
        if damping == 0.0:
            # Eigenvalues are squares of projections that carry the bases' rounding: below its square they are nothing.
            noise = values.numel() * torch.finfo(eigen.dtype).eps ** 2 * values.max()
            values = torch.where(values > noise, values, 0)
        self._reciprocal = damped_reciprocal(values, damping, eigen.dtype, call)

    def _solve(self, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        eigen = self._eigen
        if not eigen._null:
            return eigen._rotate_scale_rotate(columns, self._reciprocal)
        # What the bases do not span is divided by λ.
        return columns / self.damping + eigen._rotate_scale_rotate(columns, self._reciprocal - 1 / self.damping)

    @property
    def _empty(self) -> bool:
        """Whether there is no eigenvalue above zero, as of a Fisher without rows: there is nothing to turn into."""
        return self._eigen._values.numel() == 0

    @cached_property
    def _eigen_form(self) -> EigenForm:
        eigen = self._eigen
        outside = 1 / self.damping if eigen._null else 0.0
        return EigenForm(eigen.activation_basis, eigen.gradient_basis, self._reciprocal, outside, self._solve)

    def _row_form(self, probe: Rows, queries: int, others: int) -> RowForm:
        if self._empty:
            return super()._row_form(probe, queries, others)
        if EigenForm.worthwhile(probe, queries, others):
            return self._eigen_form
        return self._turned_back_form

    def _column_form(self, probe: Rows) -> RowForm:
        if self._empty:
            return super()._column_form(probe)
        # Where the bases leave something out, a solution is not turned columns alone.
        turned = len(probe.slots) == 1 and isinstance(probe.slots[0].rows, FactoredRows) and not self._eigen._null
        return self._eigen_form if turned else self._turned_back_form

    @property
    def _turned_back_form(self) -> TurnedBackForm:
        return TurnedBackForm(self._eigen_form, self._turned_back, self.operator.size)

    def _turned_back(self, columns: Float[Tensor, "e Q"]) -> Float[Tensor, "D Q"]:
        return self._eigen._rotate_back(columns.mT.unflatten(1, self._eigen.eigenvalue_grid.shape))

    def _row_squares(self, rows: Rows) -> Float[Tensor, "R"]:
        slot, *others = rows.slots
        if others or self._empty or not isinstance(slot.rows, FactoredRows):
            return super()._row_squares(rows)
        return self._eigen_form.squares(slot.rows)

    def _logdet(self) -> Float[Tensor, ""]:
        values = self._eigen._values.double()
        null = self._eigen._null * math.log(self.damping) if self._eigen._null else 0.0
        return (values + self.damping).log().sum() + null


def _ratio(a: Float[Tensor, "n n"], b: Float[Tensor, "n n"]) -> float | None:
    """The number r with b = r a up to rounding; None if there is none."""
    trace = float(a.trace())
    if trace <= 0:
        return None if bool(b.any()) else 0.0
    ratio = float(b.trace()) / trace
    rounding = 8 * torch.finfo(a.dtype).eps * float(b.diagonal().max())
    return ratio if bool(((ratio * a - b).abs() <= rounding).all()) else None


def _columns(basis: object, rows: int) -> int:
    """How many columns a basis may have: its own number, up to a full basis."""
    own = basis.shape[1] if isinstance(basis, Tensor) and basis.ndim == 2 else rows
    return min(own, rows)
