"""A Kronecker product of two factors of which leading eigenpairs are known, and the eigenpairs themselves.

What a factor's leading eigenvectors do not span gets the mean of its eigenvalues that are left, so that its trace is
kept. Leading eigenpairs by subspace iteration (Halko, Martinsson, Tropp, arXiv 0909.4061), from where the last ones
were. Low-rank Kronecker factors: Puiu, arXiv 2206.15397. Knows tensors, and nothing of rows or steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit import io
from fisherkit.arithmetic import all_finite
from fisherkit.errors import NonFiniteError, SingularMatrixError
from fisherkit.operators.base import FisherOperator
from fisherkit.operators.factorization import DirectFactorization, Factorization
from fisherkit.operators.layer_layout import LayerLayout
from fisherkit.operators.linalg import singular, spectrum
from fisherkit.space import ParameterSpace

FIRST, LATER, MORE = 4, 1, 16
"""Subspace iterations from random vectors, of which there are so many more, and from the last eigenvectors."""


@dataclass(frozen=True)
class Spectrum:
    """A factor as Q diag(values) Qᵀ + rest · (I − QQᵀ), Q the orthonormal columns ``basis``; ``rest`` None for 0."""

    values: Float[Tensor, "r"]
    basis: Float[Tensor, "w r"]
    rest: Float[Tensor, ""] | None = None

    @property
    def complete(self) -> bool:
        """Whether the factor is 0 on what the basis does not span."""
        return self.rest is None

    @property
    def others(self) -> Float[Tensor, ""]:
        """Eigenvalue of everything else."""
        return self.values.new_zeros(()) if self.rest is None else self.rest

    def scaled(self, scale: float) -> Spectrum:
        """Of a multiple of the factor."""
        if scale == 1:
            return self
        return replace(self, values=scale * self.values, rest=None if self.rest is None else scale * self.rest)

    def to(self, dtype: torch.dtype) -> Spectrum:
        """With the basis in a dtype, in one piece."""
        return replace(self, basis=self.basis.to(dtype).contiguous())

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What a file must hold; ``name`` is the factor's."""
        return {f"{name}_values": self.values, f"{name}_basis": self.basis, f"{name}_rest": self.others}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], name: str) -> Spectrum:
        """The inverse of `tensors`."""
        rest = tensors[f"{name}_rest"]
        return cls(tensors[f"{name}_values"], tensors[f"{name}_basis"], rest if bool(rest) else None)


def leading_spectrum(
    matrix: Float[Tensor, "w w"], rank: int | None, start: Float[Tensor, "w r"] | None, call: str
) -> Spectrum:
    """The leading eigenpairs of a factor, all if ``rank`` is None.

    Args:
        matrix: the factor.
        rank: how many.
        start: where to start from; None for random vectors from a fixed seed.
        call: for errors.

    Raises:
        NonFiniteError: NaN or infinite entries.
    """
    width = len(matrix)
    if rank is None or rank >= width:
        values, vectors = spectrum(matrix, call)
        return Spectrum(values, vectors.to(matrix.dtype).contiguous())
    if not all_finite(matrix):
        raise NonFiniteError(
            call=call, got="Kronecker factors with NaN or infinite entries", expected="finite ones",
            why="activations or gradients have grown out of range", try_="a smaller lr, or a trust_region",
        )  # fmt: skip
    if start is not None and start.shape == (width, rank):
        q, iterations = start, LATER
    else:
        shape, generator = (width, min(width, rank + MORE)), torch.Generator().manual_seed(0)
        q, iterations = torch.randn(shape, generator=generator, dtype=torch.float64).to(matrix), FIRST
    for _ in range(iterations):
        q = torch.linalg.qr(matrix @ q)[0]
    small = (q.mT @ (matrix @ q)).double()
    values, turn = torch.linalg.eigh((small + small.mT) / 2)
    values, turn = values[-rank:].clamp_min(0), turn[:, -rank:]
    rest = (matrix.diagonal().double().sum() - values.sum()).clamp_min(0) / (width - rank)
    return Spectrum(values, q @ turn.to(q.dtype), rest)


@dataclass(frozen=True)
class _Eigenvalues:
    """Where both bases span, where one of them does, and where neither does; float64."""

    both: Float[Tensor, "s r"]
    on_g: Float[Tensor, "s"]
    on_a: Float[Tensor, "r"]
    neither: Float[Tensor, ""]

    def map(self, function: Callable[[Tensor], Tensor]) -> _Eigenvalues:
        """A function of each."""
        return _Eigenvalues(*map(function, (self.both, self.on_g, self.on_a, self.neither)))

    def total(self, operator: TruncatedKroneckerOperator) -> Float[Tensor, ""]:
        """The sum over all D."""
        left, right = (one.basis.shape[0] - one.basis.shape[1] for one in (operator.gradient, operator.activation))
        return self.both.sum() + right * self.on_g.sum() + left * self.on_a.sum() + left * right * self.neither

    def steps(self, dtype: torch.dtype) -> _Eigenvalues:
        """What the bases add to ``neither``, alone and then together."""
        both = self.both - self.on_g.unsqueeze(1) - self.on_a + self.neither
        parts = both, self.on_g - self.neither, self.on_a - self.neither, self.neither
        return _Eigenvalues(*(part.to(dtype) for part in parts))


class TruncatedKroneckerOperator(FisherOperator):
    """F = G ⊗ A over one layer, each factor a `Spectrum`.

    ``values`` are the eigenvalues ``[s, r]`` where both bases span, if they are not the factors' products (EKFAC).
    """

    tag: ClassVar[str] = "truncated_kronecker"

    def __init__(
        self, space: ParameterSpace, activation: Spectrum, gradient: Spectrum,
        values: Float[Tensor, "s r"] | None = None, transposed: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(space, dtype=activation.basis.dtype, device=activation.basis.device)
        self._layout = LayerLayout.of(space, transposed, "TruncatedKroneckerOperator(space)")
        self.activation, self.gradient, self.measured = activation, gradient, values
        products = gradient.values.unsqueeze(1) * activation.values if values is None else values
        self._values = _Eigenvalues(
            products.double(), (gradient.values * activation.others).double(),
            (gradient.others * activation.values).double(), (gradient.others * activation.others).double(),
        )  # fmt: skip

    def _apply(self, columns: Float[Tensor, "D K"], steps: _Eigenvalues) -> Float[Tensor, "D K"]:
        a, g = self.activation.basis, self.gradient.basis

        def one(v: Float[Tensor, "O J"]) -> Float[Tensor, "O J"]:
            on_g = g.mT @ v
            inner = torch.addmm(steps.on_g.unsqueeze(1) * on_g, steps.both * (on_g @ a), a.mT)
            return torch.addmm(g @ inner, (v @ a) * steps.on_a, a.mT).add_(steps.neither * v)

        return self._layout.to_flat(torch.stack([one(v) for v in self._layout.to_grid(columns)]))

    def _matmat(self, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        return self._apply(columns, self._values.steps(self.dtype))

    def _diagonal(self) -> Float[Tensor, "D"]:
        steps, a, g = self._values.steps(self.dtype), self.activation.basis.square(), self.gradient.basis.square()
        grid = (g @ steps.both + steps.on_a) @ a.mT + (g @ steps.on_g).unsqueeze(1) + steps.neither
        return self._layout.to_flat(grid.unsqueeze(0)).squeeze(1)

    def _trace(self) -> Float[Tensor, ""]:
        return self._values.total(self)

    def _factorize(self, damping: float, tolerance: float, max_steps: int | None) -> Factorization:
        damped = self._values.map(lambda v: v + damping)
        reciprocals = damped.map(torch.reciprocal)
        parts = torch.cat([part.flatten() for part in vars(reciprocals).values()])
        if not bool(parts.isfinite().all()):
            call = "TruncatedKroneckerOperator.factorize"
            raise SingularMatrixError(**singular(call, damping, "some of a layer's eigenvalues are 0"))
        steps = reciprocals.steps(self.dtype)
        return DirectFactorization(
            self, damping, lambda v: self._apply(v, steps), lambda: damped.map(torch.log).total(self)
        )

    def _draw(self, generator: torch.Generator | None, count: int) -> Float[Tensor, "D n"]:
        noise = torch.randn(self.size, count, dtype=self.dtype, device=self.device, generator=generator)
        return self._apply(noise, self._values.map(torch.sqrt).steps(self.dtype))

    def _scaled(self, scale: float) -> TruncatedKroneckerOperator:
        values = None if self.measured is None else scale * self.measured
        gradient = self.gradient.scaled(scale)
        return TruncatedKroneckerOperator(self.space, self.activation, gradient, values, self._layout.transposed)

    def _state(self) -> io.State:
        tensors = self.activation.tensors("activation") | self.gradient.tensors("gradient")
        tensors |= {} if self.measured is None else {"values": self.measured}
        return io.State(self.tag, self.space.names, tensors, {"transposed": self._layout.transposed})

    @classmethod
    def _from_state(cls, space: ParameterSpace, state: io.State) -> TruncatedKroneckerOperator:
        a, g = (Spectrum.from_tensors(state.tensors, name) for name in ("activation", "gradient"))
        return cls(space, a, g, state.tensors.get("values"), bool(state.options["transposed"]))
