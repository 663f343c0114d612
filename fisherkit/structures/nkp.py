"""The best rank-one Kronecker approximation of each layer's block: nearest Kronecker products.

Of all G ⊗ A, the one that is closest to the layer's exact block F = Σ_r vec(R_r) vec(R_r)ᵀ in Frobenius norm; unlike
K-FAC's, no independence of inputs and gradients is assumed. It is the leading singular pair of F rearranged (Van Loan
and Pitsianis, "Approximation with Kronecker products", 1993), found by power iteration, of which a half-step is a pass
over the rows: A ← Σ_r R_rᵀ G R_r, G ← Σ_r R_r A R_rᵀ. Both maps keep matrices positive semi-definite, and from G = I
the iteration ends at the leading pair, which is. F itself is never formed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.arithmetic import all_finite, overflow
from fisherkit.errors import NotConvergedWarning, warn
from fisherkit.operators import FisherOperator
from fisherkit.operators.layer_layout import LayerLayout
from fisherkit.rows.base import spans
from fisherkit.rows.chunks import Chunk
from fisherkit.rows.collection import UnitSlot
from fisherkit.rows.factored import FactoredRows
from fisherkit.rows.problem import Problem
from fisherkit.space import ParameterSpace
from fisherkit.structures.base import LayerStructure, LayerSums, UnitSums
from fisherkit.structures.kronecker import KFAC, KroneckerFactors, SecondMoment, _sides

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Of a factor of norm 1, how far it may be from that of the half-steps before."""

MOST = 200
"""Passes over the rows, at most."""


class NearestProduct(KroneckerFactors):
    """A product that was found. Sums of two are the product that is nearest to their sum."""

    label = "nkp"

    def merge(self, other: KroneckerFactors) -> NearestProduct:
        """Nearest to G₁ ⊗ A₁ + G₂ ⊗ A₂: the leading pair lies in the span of both, so that two by two numbers tell."""
        pairs = [(one.activation.dense() / (one.count or 1), one.gradient.dense()) for one in (self, other)]
        a, g = (torch.stack([pair[i].flatten() for pair in pairs]) for i in (0, 1))
        left, right = (x.double() @ x.double().mT for x in (g, a))
        if not all_finite(left, right):
            raise overflow('structure="nkp"', "the sum of two products", a.dtype)
        values, vectors = torch.linalg.eig(left @ right)
        mix = vectors[:, values.real.argmax()].real.abs().to(a.dtype)  # of numbers that are 0 or more
        on_inputs = mix @ a
        on_inputs = _unit(on_inputs)
        on_outputs = (a @ on_inputs) @ g
        return replace(
            self, activation=_moment(on_inputs.reshape_as(pairs[0][0])),
            gradient=_moment(on_outputs.reshape_as(pairs[0][1])), count=1.0, spectra=None,
        )  # fmt: skip


@dataclass(frozen=True)
class HalfStep(UnitSums):
    """One factor's sum with the other one ``fixed``, of norm 1: G in even passes, A in odd ones.

    ``before`` is what the sum was two passes ago, of norm 1; ``passes`` how many there were before this one.
    """

    label = "nkp"
    constant = ("layout", "fixed", "before", "passes")

    layout: LayerLayout
    fixed: Float[Tensor, "k k"]
    total: Float[Tensor, "j j"]
    before: Float[Tensor, "j j"] | None = None
    passes: int = 0

    @classmethod
    def first(cls, rows: FactoredRows) -> HalfStep:
        """From G = I."""
        layout = LayerLayout(rows.outputs, rows.inputs, rows.bias, rows.transposed)
        like = rows.floating
        fixed = torch.eye(layout.outputs, dtype=like.dtype, device=like.device) / layout.outputs**0.5
        return cls(layout, fixed, like.new_zeros(layout.width, layout.width))

    def added(self, slot: UnitSlot, chunk: Chunk, structure: LayerStructure) -> HalfStep:
        if not isinstance(slot.rows, FactoredRows):
            return self
        return replace(self, total=self.total + _contracted(slot.rows, self.fixed, self.layout, self.passes % 2 == 1))

    @property
    def unit(self) -> Float[Tensor, "j j"]:
        """The total of norm 1; zero stays zero."""
        return _unit(self.total)

    @property
    def converged(self) -> bool:
        """Whether two more passes would change nothing that matters."""
        if self.before is None:
            return not bool(self.total.any())
        # What is not finite changes no more; it is refused as an operator.
        return not float((self.unit - self.before).norm()) > TOLERANCE[self.total.dtype]

    @property
    def over(self) -> bool:
        """Whether no pass is to follow."""
        return self.passes + 1 >= MOST or self.converged

    def following(self) -> HalfStep:
        """The next half-step."""
        zero = torch.zeros_like(self.fixed)
        return HalfStep(self.layout, self.unit, zero, None if self.passes == 0 else self.fixed, self.passes + 1)

    def product(self) -> NearestProduct:
        """What has been found; with a warning if it has not converged."""
        if not self.converged:
            change = float("nan") if self.before is None else float((self.unit - self.before).norm())
            warn(
                f'structure="nkp": after {MOST} passes a layer\'s factor of norm 1 still changes by {change:.2g}; '
                "the product is near the nearest one, and not it.", NotConvergedWarning
            )  # fmt: skip
        a, g = (self.fixed, self.total) if self.passes % 2 else (self.total, self.fixed)
        return NearestProduct(_moment(a), _moment(g), 1.0, self.layout.transposed)

    def averaged(self, known: Any, ema: float, weight: float) -> UnitSums:
        """Itself until it is over; then the nearest product to ema · the one before + (1 − ema) · the new one."""
        return self.product().averaged(known, ema, weight) if self.over else self

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], before: UnitSums | None) -> Any:
        """Only what is over outlives a step."""
        return NearestProduct.from_tensors(tensors, before)

    def operator(self, space: ParameterSpace, scale: float) -> FisherOperator:
        return self.product().operator(space, scale)


class NKP(KFAC):
    """The nearest Kronecker product of each block; what kfac gives to units without factored rows.

    The state is a few matrices of the factors' sizes a layer. Passes over the rows: 4 to some tens, until the factors
    change by less than `TOLERANCE`; rows that fit beside them in the memory budget are kept, else the data are read
    again. A running average is, at each update, the product nearest to ema · (the average before) + (1 − ema) · (the
    batch's nearest product): exact for the first batch, and for one product after another an approximation, since no
    product holds the sum of two.
    """

    name = "nkp"
    meaning = "the Kronecker product nearest to each layer's exact block"
    needs_rows = True
    passes = 10

    def peak(self, problem: Problem) -> int:
        """What is there in a pass, and two float64 copies of a factor, by which it gets norm 1."""
        widest = max((max(side) for side in _sides(problem)), default=0)
        return self.summed(problem) + 2 * torch.finfo(torch.float64).bits // 8 * widest**2

    def summed(self, problem: Problem) -> int:
        """A half-step beside the next one, and what was found two passes ago."""
        return 3 * self.bytes(problem) * self.item // self.kept_item

    def start(self, slot: UnitSlot, chunk: Chunk) -> UnitSums:
        """A first half-step of factored rows."""
        if not isinstance(slot.rows, FactoredRows):
            return self.record(slot.rows)
        return HalfStep.first(slot.rows).added(slot, chunk, self)

    def next_pass(self, sums: LayerSums) -> LayerSums | None:
        """The next half-step of every layer that has not converged."""
        going = {n: u.following() for n, u in sums.units.items() if isinstance(u, HalfStep) and not u.over}
        done = {names: unit for names, unit in sums.whole.items() if names not in going}
        return LayerSums(self, going, done) if going else None


def _unit(matrix: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Of norm 1; zero stays zero. The norm is in float64: squares of sums of squares leave float32 early."""
    norm = torch.linalg.vector_norm(matrix, dtype=torch.float64)
    return (matrix.double() / norm.clamp_min(torch.finfo(norm.dtype).tiny)).to(matrix.dtype)


def _moment(matrix: Float[Tensor, "w w"]) -> SecondMoment:
    return SecondMoment(len(matrix), (), (matrix + matrix.mT) / 2, thin=False)


def _contracted(
    rows: FactoredRows, fixed: Float[Tensor, "k k"], layout: LayerLayout, on_outputs: bool
) -> Float[Tensor, "j j"]:
    """Σ_r R_r A R_rᵀ on outputs, Σ_r R_rᵀ G R_r on inputs, of rows R_r = Σ_t g_t a_tᵀ.

    Each position's gradients are divided by a power of two that is about their size, and its activations' products
    multiplied by it: a square of either may be beyond the dtype where R's is not.
    """
    t = rows.positions
    if t * t > layout.outputs * layout.width:  # a row written out is smaller than its positions' products
        total = fixed.new_zeros(())
        for span in spans(rows.count, 2 * rows.size):
            grid = layout.to_grid(rows.some(span).dense().mT)
            grid = grid.mT if on_outputs else grid
            total = total + grid.flatten(0, 1).mT @ (fixed @ grid).flatten(0, 1)
        return total
    size = _sizes(rows)
    g, activations = rows.gradients / rows._to_rows(size), rows.chunks(constant=True)
    if on_outputs:
        parts = [((a @ fixed).mul_(size[s]) @ a.mT).mul_(size[s].mT) for s, a in activations]
        inner = rows._to_rows(torch.cat(parts))
        return g.flatten(0, 1).mT @ (inner @ g).flatten(0, 1)
    inner = rows._to_examples((g @ fixed) @ g.mT).mul_(size.mT)
    parts = [a.flatten(0, 1).mT @ (inner[s] @ a).mul_(size[s]).flatten(0, 1) for s, a in activations]
    return torch.stack(parts).sum(0)


def _sizes(rows: FactoredRows) -> Float[Tensor, "N T 1"]:
    """Powers of two about as large as the largest gradient at each position of an example."""
    of_rows = rows.gradients.abs().amax(-1)  # in kernels that are fast, unlike those of an infinite norm
    largest = of_rows.new_zeros(rows.activations.shape[:2])
    largest.scatter_reduce_(0, rows._owner().unsqueeze(1).expand_as(of_rows), of_rows, "amax")
    exponent = torch.frexp(largest).exponent.clamp(-126, 126)
    return torch.ldexp(torch.ones_like(largest), exponent).unsqueeze(2)
