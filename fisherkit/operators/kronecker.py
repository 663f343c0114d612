"""One layer's Fisher matrix as a Kronecker product, and as a diagonal in a Kronecker product's eigenbasis.

F = G ⊗ A, with A the second moment of the layer's inputs (a 1 appended for the bias) and G that of the gradients at its
outputs (Martens and Grosse, arXiv 1503.05671); F = (U_G ⊗ U_A) diag(e) (U_G ⊗ U_A)ᵀ with e measured in that basis
(George et al., arXiv 1806.03884). Owns the algebra of both, which is the same: a function of the first, its damped
inverse above all, is one of the second. `layer_layout` owns which parameter lies where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit import io
from fisherkit.operators.base import FisherOperator
from fisherkit.operators.factorization import Bases, Factorization, RowProducts, RowSolution, UnitSummand
from fisherkit.operators.layer_layout import LayerLayout, marginals
from fisherkit.operators.linalg import (
    Spectrum,
    check_symmetric,
    check_tensor,
    damped_reciprocal,
    nearest_semidefinite,
    orthonormal,
    singular,
    spectrum,
)
from fisherkit.rows.base import aligned_product
from fisherkit.rows.collection import Rows
from fisherkit.rows.factored import FactoredRows
from fisherkit.space import ParameterSpace


class LayerOperator(FisherOperator):
    """Over one layer's weight, or weight and bias, diagonal in a Kronecker product's eigenbasis."""

    _layout: LayerLayout
    inversion = "cheap"

    @property
    def layout(self) -> LayerLayout:
        return self._layout

    def _usual_damping(self) -> float:
        return 0.1


class KroneckerOperator(LayerOperator):
    """F = G ⊗ A over one layer's weight, or weight and then bias.

    Args:
        space: the layer's weight [O, I] (or [O, I, k...], taken as [O, I·k...]), and its bias [O] if it has one.
        activation: A [I, I], or [I+1, I+1] with a bias, whose row and column are the last; symmetric and finite.
        gradient: G [O, O], likewise; of the same dtype and device.
        transposed: the weight is stored as [I, O].
        symmetric: the factors are known to be symmetric up to rounding and not checked.
        activation_spectrum: a cheaper way than from the matrix to A's eigenvalues [r] and orthonormal eigenvectors
            [I, r], r the rank, as a pair; used when they are first needed.
        gradient_spectrum: the same for G.
    """

    tag: ClassVar[str] = "kronecker"

    def __init__(
        self, space: ParameterSpace, activation: Float[Tensor, "..."], gradient: Float[Tensor, "..."],
        transposed: bool = False, *, symmetric: bool = False,
        activation_spectrum: Callable[[], tuple[Tensor, Tensor] | Spectrum] | None = None,
        gradient_spectrum: Callable[[], tuple[Tensor, Tensor] | Spectrum] | None = None,
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
        self.activation, self.gradient = activation, gradient
        self._spectra = activation_spectrum, gradient_spectrum

    @cached_property
    def _eigen(self) -> EigenKroneckerOperator:
        # The product of the factors' eigenvalues stays in float64: its reciprocals are what a solve consists of.
        on_inputs, on_outputs = (found.to(self.dtype) for found in self._spectra_of_factors())
        return EigenKroneckerOperator.of_spectra(self.space, on_inputs, on_outputs, None, self._layout.transposed)

    def _spectra_of_factors(self) -> tuple[Spectrum, Spectrum]:
        on_inputs, on_outputs = (
            spectrum(matrix, f"KroneckerOperator({name})") if known is None else Spectrum(*known())
            for known, matrix, name in zip(
                self._spectra, (self.activation, self.gradient), ("activation", "gradient"), strict=True
            )
        )
        return on_inputs, on_outputs

    def eigen(self) -> EigenKroneckerOperator:
        """The same matrix in its eigenbasis; computed once, O(O³ + I³)."""
        return self._eigen

    def _matmat(self, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        grids = self._layout.to_grid(columns)
        # One matrix needs no batched products, which are many calls.
        result = self.gradient @ (grids[0] if len(grids) == 1 else grids) @ self.activation
        return self._layout.to_flat(result.reshape(grids.shape))

    def _diagonal(self) -> Float[Tensor, "D"]:
        grid = torch.outer(self.gradient.diagonal(), self.activation.diagonal())
        return self._layout.to_flat(grid.unsqueeze(0)).squeeze(-1)

    def _trace(self) -> Float[Tensor, ""]:
        return self.gradient.diagonal().double().sum() * self.activation.diagonal().double().sum()

    def _factorize(self, damping: float, tolerance: float, max_steps: int | None) -> Factorization:
        return _EigenKroneckerFactorization(self, self._eigen, damping)

    def _draw(self, generator: torch.Generator | None, count: int) -> Float[Tensor, "D n"]:
        return self._eigen._draw(generator, count)

    def _scaled(self, scale: float) -> KroneckerOperator:
        on_inputs, on_outputs = self._spectra
        return KroneckerOperator(
            self.space, self.activation, scale * self.gradient, self._layout.transposed, symmetric=True,
            activation_spectrum=on_inputs,
            gradient_spectrum=on_outputs and (lambda: Spectrum(*on_outputs()).scaled(scale)),
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
        return self.activation.double().norm() * self.gradient.double().norm()

    def _converted(self, dtype: torch.dtype, device: torch.device) -> FisherOperator:
        found, spectra = [], list[Callable[[], Spectrum] | None]([None, None])
        for side, (factor, name) in enumerate(zip(self.factors, ("activation", "gradient"), strict=True)):
            matrix = factor.to(device, torch.float64)
            if int(torch.linalg.cholesky_ex(matrix)[1]):  # else it is positive definite as it is
                matrix, pairs = nearest_semidefinite(factor.to(device), f"KroneckerOperator({name})")
                spectra[side] = partial(Spectrum, *pairs)
            found.append(matrix.to(dtype))
        return KroneckerOperator(
            self.space, found[0], found[1], self._layout.transposed, symmetric=True, activation_spectrum=spectra[0],
            gradient_spectrum=spectra[1],
        )  # fmt: skip

    @property
    def factors(self) -> tuple[Float[Tensor, "J J"], Float[Tensor, "O O"]]:
        """A and G; not to be changed."""
        return self.activation, self.gradient

    @property
    def eigenbases(self) -> tuple[Float[Tensor, "J r"], Float[Tensor, "O s"], Float[Tensor, "s r"]]:
        """U_A, U_G and e, computed once."""
        return self._eigen.eigenbases

    @property
    def decomposed_side(self) -> int:
        return max(len(self.activation), len(self.gradient))

    def _nearest_kronecker(self, layout: LayerLayout) -> tuple[Float[Tensor, "J J"], Float[Tensor, "O O"]]:
        return self.activation.double(), self.gradient.double()

    def _average(self) -> FisherOperator:
        identity = torch.eye(len(self.gradient), dtype=self.dtype, device=self.device)
        mean = self.gradient.diagonal().mean()
        return KroneckerOperator(self.space, self.activation, mean * identity, self._layout.transposed, symmetric=True)

    def _eigenvalues(self, k: int) -> Float[Tensor, "k"]:
        return self._eigen._eigenvalues(k)

    def _eigenvectors(self, k: int) -> Float[Tensor, "D k"]:
        return self._eigen._eigenvectors(k)

    @property
    def _rank_bound(self) -> int:
        return self._eigen._rank_bound

    def _state(self) -> io.State:
        tensors = {"activation": self.activation, "gradient": self.gradient}
        return io.State(self.tag, self.space.names, tensors, {"transposed": self._layout.transposed})

    def _packed(self, dtype: torch.dtype) -> io.State:
        a, g = (found.to(dtype) for found in self._spectra_of_factors())
        tensors = a.tensors("activation") | g.tensors("gradient")
        return io.State(self.tag, self.space.names, tensors, {"transposed": self._layout.transposed})

    @classmethod
    def _from_state(cls, space: ParameterSpace, state: io.State) -> KroneckerOperator:
        tensors, transposed = state.tensors, bool(state.options["transposed"])
        if "activation" in tensors:
            return cls(space, tensors["activation"], tensors["gradient"], transposed)
        a, g = (Spectrum.from_tensors(tensors, name) for name in ("activation", "gradient"))
        return cls(
            space, a.dense(), g.dense(), transposed, symmetric=True,
            activation_spectrum=lambda: a, gradient_spectrum=lambda: g,
        )  # fmt: skip


class _Weights(NamedTuple):
    """A function of F by what it has in the eigenbasis.

    ``outside`` times I, and what is added where both bases span, where U_G alone does and where U_A alone does; None
    where that adds nothing.
    """

    both: Float[Tensor, "s r"]
    outside: float | Float[Tensor, ""] = 0.0
    on_outputs: Float[Tensor, "s"] | None = None
    on_inputs: Float[Tensor, "r"] | None = None


class EigenKroneckerOperator(LayerOperator):
    """F = (U_G ⊗ U_A) diag(e) (U_G ⊗ U_A)ᵀ over one layer's weight, or weight and then bias.

    Args:
        space: as in `KroneckerOperator`.
        activation_basis: U_A [I, r], or [I+1, r] with a bias; r orthonormal eigenvectors in columns. F is 0 on what
            they do not span.
        gradient_basis: U_G [O, s], likewise; of the same dtype and device.
        eigenvalues: e [s, r], 0 or more, in the bases' dtype or in float64.
        transposed: the weight is stored as [I, O].
        decomposed: all of these come from a decomposition of finite matrices, and are not checked.
        leading: A's and G's leading eigenpairs, where F is not 0 on what the bases do not span, but what these say.
    """

    tag: ClassVar[str] = "eigen_kronecker"
    truncated_tag: ClassVar[str] = "truncated_kronecker"
    other_tags: ClassVar[tuple[str, ...]] = (truncated_tag,)

    def __init__(
        self, space: ParameterSpace, activation_basis: Float[Tensor, "..."], gradient_basis: Float[Tensor, "..."],
        eigenvalues: Float[Tensor, "..."], transposed: bool = False, *, decomposed: bool = False,
        leading: tuple[Spectrum, Spectrum] | None = None,
    ) -> None:  # fmt: skip
        name = "EigenKroneckerOperator"
        self._layout = LayerLayout.of(space, transposed, f"{name}(space)")
        if not decomposed:
            width, outputs = self._layout.width, self._layout.outputs
            rank_in, rank_out = _columns(activation_basis, width), _columns(gradient_basis, outputs)
            activation_basis = check_tensor(activation_basis, [width, rank_in], f"{name}(activation_basis)")
            dtype, device = activation_basis.dtype, activation_basis.device
            gradient_basis = check_tensor(
                gradient_basis, [outputs, rank_out], f"{name}(gradient_basis)", dtypes=(dtype,), device=device
            )
            eigenvalues = check_tensor(
                eigenvalues, [rank_out, rank_in], f"{name}(eigenvalues)", dtypes=(dtype, torch.float64), device=device,
                nonnegative=True,
            )  # fmt: skip
        super().__init__(space, dtype=activation_basis.dtype, device=activation_basis.device)
        self.activation_basis, self.gradient_basis, self.eigenvalue_grid = activation_basis, gradient_basis, eigenvalues
        self._leading = leading

    @classmethod
    def of_spectra(
        cls, space: ParameterSpace, activation: Spectrum, gradient: Spectrum, values: Float[Tensor, "s r"] | None,
        transposed: bool,
    ) -> EigenKroneckerOperator:  # fmt: skip
        """G ⊗ A of two factors' eigenpairs, which may be the leading ones alone.

        ``values`` are the eigenvalues where both bases span, if they are not the factors' products (ekfac).
        """
        grid = torch.outer(gradient.values, activation.values) if values is None else values
        whole = activation.rest is None and gradient.rest is None
        leading = None if whole else (activation, gradient)
        return cls(space, activation.basis, gradient.basis, grid, transposed, decomposed=True, leading=leading)

    @property
    def eigenbases(self) -> tuple[Float[Tensor, "J r"], Float[Tensor, "O s"], Float[Tensor, "s r"]]:
        """U_A, U_G and e; not to be changed."""
        return self.activation_basis, self.gradient_basis, self.eigenvalue_grid

    @property
    def _outer_values(self) -> tuple[Float[Tensor, "s"], Float[Tensor, "r"], Float[Tensor, ""]] | None:
        """F's eigenvalues where U_G alone spans, where U_A alone does, and where neither does; None where all are 0."""
        if self._leading is None:
            return None
        a, g = self._leading
        return (g.values * a.others).double(), (a.values * g.others).double(), (a.others * g.others).double()

    def _weights(self, function: Callable[[Tensor], Tensor]) -> _Weights:
        """A function of F, by that of its eigenvalues, in the operator's dtype."""
        values = self.eigenvalue_grid.double()
        if self._outer_values is None:
            outside = float(function(torch.zeros((), dtype=torch.float64))) if self._null else 0.0
            return _Weights((function(values) - outside).to(self.dtype), outside)
        known = values, *self._outer_values
        found = function(torch.cat([part.flatten() for part in known])).split([part.numel() for part in known])
        both, on_outputs, on_inputs, beyond = (f.reshape(part.shape) for f, part in zip(found, known, strict=True))
        parts = both - on_outputs.unsqueeze(1) - on_inputs + beyond, beyond, on_outputs - beyond, on_inputs - beyond
        return _Weights(*(part.to(self.dtype) for part in parts))

    def _trace_of(self, function: Callable[[Tensor], Tensor]) -> Float[Tensor, ""]:
        """The trace of a function of F, float64."""
        both = function(self.eigenvalue_grid.double()).sum()
        if not self._null:
            return both
        if self._outer_values is None:
            return both + self._null * float(function(torch.zeros((), dtype=torch.float64)))
        on_outputs, on_inputs, beyond = map(function, self._outer_values)
        rows, columns = (side - rank for side, rank in zip(self._grid_shape, self.eigenvalue_grid.shape, strict=True))
        return both + columns * on_outputs.sum() + rows * on_inputs.sum() + rows * columns * beyond

    def _apply(self, columns: Float[Tensor, "D K"], weights: _Weights) -> Float[Tensor, "D K"]:
        grids, u_a, u_g = self._layout.to_grid(columns), self.activation_basis, self.gradient_basis
        grid = grids[0] if len(grids) == 1 else grids  # as in `KroneckerOperator`
        turned = u_g.mT @ grid
        inner = aligned_product(weights.both * aligned_product(turned, u_a), u_a.mT)
        if weights.on_outputs is not None:
            inner = inner + weights.on_outputs.unsqueeze(1) * turned
        result = u_g @ inner
        if weights.on_inputs is not None:
            result += aligned_product(weights.on_inputs * aligned_product(grid, u_a), u_a.mT)
        if weights.on_inputs is not None or weights.outside:
            result += weights.outside * grid
        return self._layout.to_flat(result.reshape(grids.shape))

    def _turned_back(self, grid: Float[Tensor, "K s r"]) -> Float[Tensor, "D K"]:
        """(U_G ⊗ U_A) times columns over the eigenvectors."""
        return self._layout.to_flat(aligned_product(self.gradient_basis @ grid, self.activation_basis.mT))

    def _matmat(self, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        return self._apply(columns, self._weights(_identity))

    def _diagonal(self) -> Float[Tensor, "D"]:
        weights, a, g = self._weights(_identity), self.activation_basis.square(), self.gradient_basis.square()
        grid = g @ weights.both @ a.mT
        if weights.on_outputs is not None and weights.on_inputs is not None:
            grid += (g @ weights.on_outputs).unsqueeze(1) + a @ weights.on_inputs + weights.outside
        return self._layout.to_flat(grid.unsqueeze(0)).squeeze(-1)

    def _trace(self) -> Float[Tensor, ""]:
        return self._trace_of(_identity)

    def _factorize(self, damping: float, tolerance: float, max_steps: int | None) -> Factorization:
        return _EigenKroneckerFactorization(self, self, damping)

    def _draw(self, generator: torch.Generator | None, count: int) -> Float[Tensor, "D n"]:
        noise = torch.randn(self.size, count, dtype=self.dtype, device=self.device, generator=generator)
        return self._apply(noise, self._weights(torch.sqrt))

    def _scaled(self, scale: float) -> EigenKroneckerOperator:
        if self._leading is None:
            return self._with_values(scale * self.eigenvalue_grid)
        a, g = self._leading
        return self.of_spectra(self.space, a, g.scaled(scale), scale * self.eigenvalue_grid, self._layout.transposed)

    def _plus(self, other: FisherOperator) -> FisherOperator | None:
        # Of one eigenbasis, as a matrix and its average over outputs are.
        if not isinstance(other, EigenKroneckerOperator) or other._layout != self._layout:
            return None
        shared = self.activation_basis is other.activation_basis and self.gradient_basis is other.gradient_basis
        alike = shared and self._leading is None and other._leading is None
        return self._with_values(self.eigenvalue_grid + other.eigenvalue_grid) if alike else None

    def _with_values(self, values: Float[Tensor, "s r"]) -> EigenKroneckerOperator:
        return EigenKroneckerOperator(
            self.space, self.activation_basis, self.gradient_basis, values, self._layout.transposed, decomposed=True
        )

    def _frobenius(self) -> Float[Tensor, ""]:
        return self._trace_of(torch.square).sqrt()

    def _nearest_kronecker(self, layout: LayerLayout) -> tuple[Float[Tensor, "J J"], Float[Tensor, "O O"]] | None:
        """With F's eigenvectors, and eigenvalues whose outer product has the marginals of F's."""
        if self._leading is not None:
            return None
        on_outputs, on_inputs = marginals(self.eigenvalue_grid.double())
        u_a, u_g = self.activation_basis.double(), self.gradient_basis.double()
        return (u_a * on_inputs) @ u_a.mT, (u_g * on_outputs) @ u_g.mT

    def _average(self) -> FisherOperator:
        outputs = self._layout.outputs
        if len(self.eigenvalue_grid) == outputs and self._leading is None:
            return self._with_values(self.eigenvalue_grid.mean(0).expand_as(self.eigenvalue_grid))
        weights, u = self._weights(_identity), self.activation_basis
        mean = weights.both.sum(0) / outputs
        if weights.on_inputs is not None:
            mean = mean + weights.on_inputs
        moment = (u * mean) @ u.mT
        if weights.on_outputs is not None:
            moment.diagonal().add_(weights.outside + weights.on_outputs.sum() / outputs)
        identity = torch.eye(outputs, dtype=self.dtype, device=self.device)
        return KroneckerOperator(
            self.space, (moment + moment.mT) / 2, identity, self._layout.transposed, symmetric=True
        )

    def _eigenvalues(self, k: int) -> Float[Tensor, "k"]:
        values = self._full_grid().flatten()
        known = values.topk(min(k, len(values))).values
        return torch.nn.functional.pad(known, (0, k - len(known)))

    def _eigenvectors(self, k: int) -> Float[Tensor, "D k"]:
        u_a, u_g, values = self.activation_basis, self.gradient_basis, self._full_grid()
        if self._leading is not None:
            u_g, u_a = (orthonormal(u.double(), len(u)) for u in (u_g, u_a))
        places = values.flatten().topk(min(k, values.numel())).indices
        on_outputs, on_inputs = u_g.mT[places // values.shape[1]], u_a.mT[places % values.shape[1]]
        columns = self._layout.to_flat(on_outputs.unsqueeze(2) * on_inputs.unsqueeze(1))
        return (columns if len(places) == k else orthonormal(columns.double(), k)).to(self.dtype)

    def _full_grid(self) -> Float[Tensor, "_ _"]:
        """Eigenvalues on the grid of bases that are filled up; as they are where F is 0 on what is filled up."""
        if self._outer_values is None:
            return self.eigenvalue_grid.double()
        on_outputs, on_inputs, beyond = self._outer_values
        grid, (s, r) = beyond.repeat(self._grid_shape), self.eigenvalue_grid.shape
        grid[:s], grid[:, :r] = on_outputs.unsqueeze(1), on_inputs
        grid[:s, :r] = self.eigenvalue_grid
        return grid

    @property
    def _rank_bound(self) -> int:
        return self.eigenvalue_grid.numel() if self._leading is None else self.size

    @property
    def _grid_shape(self) -> tuple[int, int]:
        return self._layout.outputs, self._layout.width

    @property
    def _null(self) -> int:
        """Dimensions that the bases do not span together."""
        return self.size - self.eigenvalue_grid.numel()

    def _state(self) -> io.State:
        options = {"transposed": self._layout.transposed}
        if self._leading is not None:
            a, g = self._leading
            tensors = a.tensors("activation") | g.tensors("gradient") | {"values": self.eigenvalue_grid}
            return io.State(self.truncated_tag, self.space.names, tensors, options)
        tensors = {
            "activation_basis": self.activation_basis,
            "gradient_basis": self.gradient_basis,
            "eigenvalues": self.eigenvalue_grid,
        }
        return io.State(self.tag, self.space.names, tensors, options)

    def _packed(self, dtype: torch.dtype) -> io.State:
        def rounded(name: str, tensor: Tensor) -> Tensor:
            kept = name.endswith("_basis") or name in ("eigenvalues", "values")
            return tensor.to(dtype).contiguous() if kept else tensor

        state = self._state()
        return replace(state, tensors={name: rounded(name, tensor) for name, tensor in state.tensors.items()})

    @classmethod
    def _from_state(cls, space: ParameterSpace, state: io.State) -> EigenKroneckerOperator:
        tensors, transposed = state.tensors, bool(state.options["transposed"])
        if state.tag == cls.truncated_tag:
            a, g = (Spectrum.from_tensors(tensors, name) for name in ("activation", "gradient"))
            return cls.of_spectra(space, a, g, tensors.get("values"), transposed)
        return cls(space, tensors["activation_basis"], tensors["gradient_basis"], tensors["eigenvalues"], transposed)


def _identity(values: Tensor) -> Tensor:
    return values


class _EigenKroneckerFactorization(Factorization):
    """(U_G ⊗ U_A) diag(1 / (e + λ)) (U_G ⊗ U_A)ᵀ, for an operator that is, or can be brought to, this form."""

    def __init__(self, operator: FisherOperator, eigen: EigenKroneckerOperator, damping: float) -> None:
        super().__init__(operator, damping)
        self._eigen = eigen
        call = f"{operator._name}.factorize"
        if damping == 0.0 and eigen._null and eigen._leading is None:
            raise singular(call, damping, f"{eigen._null:,} of its eigenvalues are 0")

        def reciprocal(values: Tensor) -> Tensor:
            if damping == 0.0:
                # Eigenvalues are squares of projections that carry the bases' rounding: below its square they are 0.
                noise = eigen.eigenvalue_grid.numel() * torch.finfo(eigen.dtype).eps ** 2 * eigen.eigenvalue_grid.max()
                values = torch.where(values > noise, values, 0)
            return damped_reciprocal(values, damping, eigen.dtype, call)

        self._weights = eigen._weights(reciprocal)

    def _solve(self, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        return self._eigen._apply(columns, self._weights)

    def _logdet(self) -> Float[Tensor, ""]:
        return self._eigen._trace_of(lambda values: (values + self.damping).log())

    # Rows that are kept as two factors are turned into the eigenbasis factor by factor, which takes far less than
    # turning solutions [outputs, inputs] there and back.

    @property
    def _outside(self) -> float:
        return float(self._weights.outside)

    def _factored(self, rows: Rows) -> FactoredRows | None:
        """The rows, if they can be turned so and F is what its bases tell."""
        found, eigen = rows.slots[0].rows, self._eigen
        turns = len(rows.slots) == 1 and eigen._leading is None and eigen.eigenvalue_grid.numel() > 0
        return found if turns and isinstance(found, FactoredRows) else None

    def _turned(self, rows: FactoredRows) -> Iterator[FactoredRows]:
        return rows.rotated(self._eigen.activation_basis, self._eigen.gradient_basis)

    def _weighed(self, rows: FactoredRows) -> Float[Tensor, "e Q"]:
        """diag(w) (U_G ⊗ U_A)ᵀ Q, over the eigenvectors."""
        parts = [part.dense() for part in self._turned(rows)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).mul_(self._weights.both.flatten()).mT

    def _solve_rows(self, queries: Rows) -> Float[Tensor, "D Q"]:
        rows = self._factored(queries)
        if rows is None:
            return super()._solve_rows(queries)
        columns = self._eigen._turned_back(self._weighed(rows).mT.unflatten(1, self._eigen.eigenvalue_grid.shape))
        return columns.add_(rows.dense().mT, alpha=self._outside) if self._outside else columns

    def _row_products(self, probe: Rows, queries: int, others: int) -> RowProducts:
        rows = self._factored(probe)
        turned = rows is not None and EigenProducts.worthwhile(rows, queries, others)
        return EigenProducts(self) if turned else super()._row_products(probe, queries, others)

    def _unit_products(self, probe: Rows) -> RowProducts:
        # Where the bases leave something out, a solution is not turned columns alone.
        turned = self._factored(probe) is not None and not self._outside
        return EigenProducts(self) if turned else super()._unit_products(probe)

    def _row_squares(self, rows: Rows) -> Float[Tensor, "R"]:
        factored = self._factored(rows)
        if factored is None:
            return super()._row_squares(rows)
        weights = self._weights.both.flatten()
        within = torch.cat([part.weighted_squares(weights) for part in self._turned(factored)])
        if not self._outside:
            return within
        return within + self._outside * factored.weighted_squares(weights.new_ones(factored.size))


class EigenProducts(RowProducts):
    """rᵀ(F + λI)⁻¹q by queries that are turned into the eigenbasis and weighed, and other rows that are turned."""

    def __init__(self, inverse: _EigenKroneckerFactorization) -> None:
        numbers = inverse._weights.both.numel()
        super().__init__(numbers, 2 * numbers)
        self.solve = partial(_EigenSolution, inverse)

    @staticmethod
    def worthwhile(rows: FactoredRows, queries: int, others: int) -> bool:
        """Whether turning the others' rows takes fewer multiplications than turning the queries' solutions back."""
        width, outputs = rows.inputs + rows.bias, rows.outputs
        turned = others * rows.positions * (width**2 + outputs**2)
        return turned <= queries * width * outputs * (width + outputs)


class _EigenSolution(RowSolution):
    """Queries turned, written out and weighed."""

    def __init__(self, inverse: _EigenKroneckerFactorization, queries: Rows) -> None:
        self._inverse, self._queries, self._factored = inverse, queries, inverse._factored(queries)
        self._weighed = None if self._factored is None else inverse._weighed(self._factored)

    @cached_property
    def _solved(self) -> Float[Tensor, "D Q"]:
        """For rows that are not factored, if there are such."""
        return self._inverse._solve_rows(self._queries)

    def parts(self, rows: Rows) -> Iterator[UnitSummand]:
        (slot,), factored, outside = rows.slots, self._inverse._factored(rows), self._inverse._outside
        if self._weighed is None or factored is None:
            yield slot.names, slot.rows.matmul(self._solved)
            return
        within = torch.cat([part.matmul(self._weighed) for part in self._inverse._turned(factored)])
        if outside and self._factored is not None:
            within += outside * factored.gram(self._factored, precise=False).to(within.dtype)
        yield slot.names, within

    def unit(self, space: ParameterSpace, names: tuple[str, ...]) -> tuple[Float[Tensor, "d Q"], Bases | None]:
        if self._weighed is None:
            return self._solved, None
        return self._weighed, (self._inverse._eigen.gradient_basis, self._inverse._eigen.activation_basis)


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
