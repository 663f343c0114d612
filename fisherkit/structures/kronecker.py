"""Kronecker factors of each layer, and EKFAC's eigenvalues in their eigenbasis.

F = G ⊗ A of one layer, A the second moment of its inputs and G that of the gradients at its outputs (Martens and
Grosse, arXiv 1503.05671); eigenvalues measured in that basis by a second pass (George et al., arXiv 1806.03884).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.errors import listed
from fisherkit.memory import give_back
from fisherkit.operators import EigenKroneckerOperator, FisherOperator, KroneckerOperator
from fisherkit.operators.linalg import Spectrum, leading_spectrum, spectrum
from fisherkit.processes import Processes
from fisherkit.rows.base import UnitRows, lower_second_moment, mirrored, second_moment
from fisherkit.rows.chunks import Chunk
from fisherkit.rows.collection import UnitSlot
from fisherkit.rows.factored import FactoredRows
from fisherkit.rows.last_layer import LastLayerRows
from fisherkit.rows.problem import Problem
from fisherkit.rows.units import RuledUnit
from fisherkit.space import ParameterSpace
from fisherkit.structures.base import LayerStructure, LayerSums, Names, UnitSums
from fisherkit.structures.block import NormalMatrix
from fisherkit.structures.diagonal import Squares

SMALL_BLOCK = 256
"""Units without a Kronecker rule get an exact block up to this many parameters and an exact diagonal above."""

EIGH_BYTES = 32
"""For each entry of a matrix while it is decomposed in float64: itself, its eigenvectors, and twice as much work."""

LARGE = 512
"""Width of a factor from which on no vectors are kept that will be as many as it is wide: beside what passes take and
give back, they leave the memory in pieces."""

SPENT = "a sum that was added to or has become an operator: go on with what came of it"


@dataclass(frozen=True)
class SecondMoment:
    """Σ x xᵀ ``[w, w]``, kept as the vectors themselves, each ``[n, T, w]``, while they are fewer than their entries.

    ``thin`` says whether vectors may be kept. A matrix of this object's own, in `lower_second_moment`'s form, is the
    one entry of ``own``; `add` and `at` take it out to write to it, after which this object is refused.
    """

    width: int
    vectors: tuple[Tensor, ...] = ()
    matrix: Float[Tensor, "w w"] | None = None
    thin: bool = True
    own: list[Tensor] | None = None

    def add(self, *parts: Float[Tensor, "n T w"], spanning: bool = True) -> SecondMoment:
        """With more vectors, added to the matrix of this object in place, which is of no use then.

        Where they do not span what matters, their number says nothing about the rank that a basis must have.
        """
        few = self.matrix is None and self.own is None
        if few and self.thin and spanning and self._number(self.vectors) + self._number(parts) < self.width:
            return SecondMoment(self.width, (*self.vectors, *parts), None, self.thin)
        total = None if few else self._taken()
        for x in (self._stacked(), *parts) if self.vectors else parts:
            total = lower_second_moment(x, total)
        return SecondMoment(self.width, (), None, self.thin, None if total is None else [total])

    def scaled(self, weight: float) -> SecondMoment:
        """The sum times a number."""
        if self.few:
            return replace(self, vectors=tuple(x * weight**0.5 for x in self.vectors))
        return replace(self, matrix=weight * self.dense(), own=None)

    def merge(self, other: SecondMoment) -> SecondMoment:
        """With the sum of another pass."""
        if other.few:
            mine = self if self.few else replace(self, matrix=self.dense(), own=None)
            return mine.add(*other.vectors) if other.vectors else self
        total = other.dense()
        return replace(self, vectors=(), matrix=total if self.empty else self.dense() + total, own=None)

    def all_reduced(self, processes: Processes) -> SecondMoment:
        """Of all processes, as a matrix."""
        if self.matrix is not None:
            return replace(self, matrix=processes.total(self.matrix))
        return replace(self, vectors=(), own=[processes.total(self.dense() if self.few else mirrored(self._taken()))])

    @property
    def few(self) -> bool:
        """Whether there is no matrix, but vectors or nothing."""
        return self.matrix is None and self.own is None

    @property
    def empty(self) -> bool:
        """Whether nothing has been added."""
        return self.few and not self.vectors

    def dense(self) -> Float[Tensor, "w w"]:
        """Σ x xᵀ."""
        if self.own is not None:
            if not self.own:
                raise RuntimeError(SPENT)
            return mirrored(self.own[0])
        return second_moment(self._stacked()) if self.matrix is None else self.matrix

    def at(self, scale: float) -> tuple[Float[Tensor, "w w"], Callable[[], Spectrum] | None]:
        """``scale`` times the sum, and how to decompose it by its vectors where these are few.

        A matrix of this object's own is scaled in place, so that sums and operator need not exist beside each other.
        """
        if self.own is not None:
            return mirrored(self._taken()).mul_(scale), None
        if self.matrix is not None:
            return scale * self.matrix, None
        return self.dense().mul_(scale), lambda: self.spectrum("kfac").scaled(scale)

    def leading(self, rank: int | None, known: Spectrum | None, due: bool, scale: float) -> Spectrum:
        """The leading eigenpairs of ``scale`` times the sum, going on from those that are known.

        Few vectors give all of theirs, and always new ones, as they span no other vectors; a matrix gives ``rank``
        (None for all), new ones where it is ``due``.
        """
        if self.few:
            return self.spectrum("Kronecker factors").scaled(scale)
        if known is not None and not due:
            return known
        start = None if known is None else known.basis
        return leading_spectrum(self.dense(), rank, start, "Kronecker factors").scaled(scale)

    def spectrum(self, call: str) -> Spectrum:
        """Eigenvalues and orthonormal eigenvectors, without those of the null space of few vectors.

        A matrix of this object's own makes room for its basis.
        """
        if self.own is not None:
            matrix = mirrored(self._taken())
            if self.width >= LARGE:
                give_back(matrix.device)  # or the work space comes on top of what a pass has freed
            found = spectrum(matrix, call)
            return found._replace(basis=matrix.copy_(found.basis))
        if self.matrix is not None:
            return spectrum(self.matrix, call)
        # xᵀ = q r, so Σ x xᵀ = q (r rᵀ) qᵀ; forming no w × w matrix, and orthonormal at any condition.
        q, r = torch.linalg.qr(self._stacked().mT)
        values, vectors = torch.linalg.eigh(r.double() @ r.double().mT)
        return Spectrum(values.clamp_min(0), (q @ vectors.to(q.dtype)).contiguous())

    def _taken(self) -> Float[Tensor, "w w"]:
        """The matrix, to be written to."""
        if self.own is None:
            return self.dense().clone()
        if not self.own:
            raise RuntimeError(SPENT)
        return self.own.pop()

    def _stacked(self) -> Float[Tensor, "n w"]:
        parts = [x.reshape(-1, self.width) for x in self.vectors]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _number(self, parts: Sequence[Tensor]) -> int:
        return sum(x.numel() for x in parts) // self.width


@dataclass(frozen=True)
class KroneckerFactors(UnitSums):
    """Σ a aᵀ over examples and positions (the constant input of a bias appended), and Σ g gᵀ over rows and positions.

    Scaled, they are as of so much more data, so that merging weighs both factors alike.

    Args:
        activation: of the inputs.
        gradient: of the output gradients.
        count: number of (example, position) pairs in ``activation``, or their weight; 0 for one that is not known and
            already divided by.
        transposed: whether the weight is stored ``[I, O]``.
        spectra: of Σ a aᵀ / count and Σ g gᵀ, where they are kept from step to step; those of an earlier step perhaps.
    """

    label = "kfac"
    constant = ("transposed", "spectra")

    activation: SecondMoment
    gradient: SecondMoment
    count: float
    transposed: bool
    spectra: tuple[Spectrum, Spectrum] | None = None

    @classmethod
    def zeros(cls, rows: FactoredRows, *, thin: bool = True) -> KroneckerFactors:
        """Of the right sizes."""
        activation, gradient = (SecondMoment(width, thin=thin) for width in (rows.inputs + rows.bias, rows.outputs))
        return cls(activation, gradient, 0.0, rows.transposed)

    def added(self, slot: UnitSlot, chunk: Chunk, structure: LayerStructure) -> KroneckerFactors:
        """With the unit's rows of a chunk; what a batch made the slow way has no factors to add.

        Counted are, of layers with as many positions as the outputs or the inputs, those that count; of others, every
        position of examples that count; of each, only those that outputs that count depend on, if that is known.
        """
        rows, exists, counted = slot.rows, slot.exists, chunk.counted_positions
        token, reduce = structure.token, structure.reduce
        if not isinstance(rows, FactoredRows):
            return self
        # Rows lie in the span of the factors' vectors where each of their positions is one of those.
        spanning = chunk.whole and not reduce and (exists is None or bool(exists.all()))
        if isinstance(rows, LastLayerRows):
            # A row of a position is zero at all others, so that "reduce" has the same sum.
            gradient = self.gradient.merge(SecondMoment(rows.outputs, (), rows.gradient_moment()))
        else:
            g = rows.gradients.sum(1, keepdim=True) if reduce else rows.gradients
            gradient = self.gradient.add(g, spanning=spanning)
        if not chunk.first:
            return KroneckerFactors(self.activation, gradient, self.count, self.transposed)
        shape = rows.activations.shape[:2]
        own = counted[0].shape == shape
        chunks = rows.chunks(constant=True)
        if spanning and (exists is not None or own or not token):
            activation = self.activation.add(*(a for _, a in chunks))
            return KroneckerFactors(activation, gradient, self.count + shape.numel(), self.transposed)
        everywhere = counted[0].any(1, keepdim=True)
        if exists is None:
            mask = next((m for m in counted if m.shape == shape), everywhere).expand(shape)
        else:
            mask, own = everywhere & exists.to(everywhere.device), True
        # A token has its own position where the layer has the outputs'; elsewhere it shares all of its sequence's.
        examples = counted[0].sum(1) if token and not own else everywhere.squeeze(1).long()
        averaged = reduce and not (token and own)
        weight = examples.unsqueeze(1) * (mask.any(1, keepdim=True) if averaged else mask)
        activation = self.activation
        for span, a in chunks:
            if averaged:
                total = (a * mask[span].unsqueeze(-1)).sum(1, keepdim=True)
                a = total / mask[span].sum(1).clamp_min(1)[:, None, None]
            kept = weight[span] > 0
            weighed = a[kept] * weight[span][kept].to(a.dtype).sqrt().unsqueeze(1)
            activation = activation.add(weighed.unsqueeze(1), spanning=spanning)
        return KroneckerFactors(activation, gradient, self.count + int(weight.sum()), self.transposed)

    def averaged(self, known: Any, ema: float, weight: float) -> UnitSums:
        """As of every record; a count that is not known becomes that of the new sums."""
        if known is not None and known.count == 0 < self.count:
            per_example = self.count * weight
            known = replace(known, activation=known.activation.scaled(per_example), count=per_example)
        return super().averaged(known, ema, weight)

    @property
    def decomposition_cost(self) -> float:
        return float(self.activation.width**3 + self.gradient.width**3)

    def eigenpairs(self, known: Any, due: bool, rank: int | None) -> tuple[Spectrum, Spectrum]:
        """The factors': all of few vectors, or the leading ones of a matrix."""
        on_inputs, on_outputs = (None, None) if known is None or known.spectra is None else known.spectra
        return (
            self.activation.leading(rank, on_inputs, due, 1 / (self.count or 1)),
            self.gradient.leading(rank, on_outputs, due, 1.0),
        )

    def operator(self, space: ParameterSpace, scale: float) -> FisherOperator:
        """G ⊗ A; of spectra that are kept, the product of what they say."""
        if self.spectra is not None:
            return EigenKroneckerOperator.of_spectra(
                space, self.spectra[0], self.spectra[1].scaled(scale), None, self.transposed
            )
        (a, on_inputs), (g, on_outputs) = self.activation.at(1 / (self.count or 1)), self.gradient.at(scale)
        return KroneckerOperator(
            space, a, g, self.transposed, symmetric=True, activation_spectrum=on_inputs, gradient_spectrum=on_outputs
        )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """Of a factor its matrix, if there is one, and its spectrum, if it is kept."""
        found = {"transposed": torch.tensor(self.transposed), "count": torch.tensor(self.count, dtype=torch.float64)}
        for i, (name, moment) in enumerate(zip(_SIDES, (self.activation, self.gradient), strict=True)):
            found |= {} if moment.few else {name: moment.dense()}
            found |= {} if self.spectra is None else self.spectra[i].tensors(name)
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], before: UnitSums | None) -> KroneckerFactors:
        """The inverse of `tensors`, also of states that have no count."""
        spectra = [Spectrum.from_tensors(tensors, name) for name in _SIDES]
        a, g = (
            SecondMoment(len(one.basis), (), tensors.get(name), thin=False)
            for name, one in zip(_SIDES, spectra, strict=True)
        )
        return cls(a, g, float(tensors.get("count", 0)), bool(tensors["transposed"]), (spectra[0], spectra[1]))


_SIDES = ("activation", "gradient")


@dataclass(frozen=True)
class RotatedSquares(UnitSums):
    """Σ_r of the squares of row_r's matrix in a Kronecker eigenbasis: EKFAC's eigenvalues.

    The spectra are those whose bases it is in; their values serve what the bases do not span.
    """

    label = "ekfac"
    constant = ("activation", "gradient", "transposed")

    activation: Spectrum
    gradient: Spectrum
    transposed: bool
    total: Float[Tensor, "s r"]

    @classmethod
    def zeros(cls, factors: KroneckerFactors, dtype: torch.dtype, names: Names) -> RotatedSquares:
        """Nothing yet, in the eigenbasis of a unit's factors, whose matrices are let go."""
        call = f"Kronecker factors of {listed(map(repr, names))}"
        found = factors.spectra or (m.spectrum(call) for m in (factors.activation, factors.gradient))
        a, g = (one.to(dtype) for one in found)
        nothing = a.basis.new_zeros(()).expand(g.basis.shape[1], a.basis.shape[1])  # which takes no memory
        return cls(a, g, factors.transposed, nothing)

    def add(self, rows: FactoredRows, *, own: bool = False) -> RotatedSquares:
        """With more rows, added in place where the sums are its ``own`` and nobody else has them."""
        total = (self.total if own else self.total.clone(memory_format=torch.contiguous_format)).flatten()
        for rotated in rows.rotated(self.activation.basis, self.gradient.basis):
            total += rotated.squared_sum()
        return replace(self, total=total.reshape(self.total.shape))

    def added(self, slot: UnitSlot, chunk: Chunk, structure: LayerStructure) -> RotatedSquares:
        return self.add(slot.rows) if isinstance(slot.rows, FactoredRows) else self

    def grown(self, slot: UnitSlot, chunk: Chunk, structure: LayerStructure) -> RotatedSquares:
        """In place, so that sums that grow leave no pieces of memory behind."""
        return self.add(slot.rows, own=True) if isinstance(slot.rows, FactoredRows) else self

    def merge(self, other: RotatedSquares) -> RotatedSquares:
        """With another pass's, in the other's basis: of a matrix in another one, the diagonal that it has there."""
        total = self.total
        if self.gradient.basis is not other.gradient.basis or self.activation.basis is not other.activation.basis:
            on_g, on_a = (
                (theirs.basis.mT @ mine.basis).square()
                for mine, theirs in ((self.gradient, other.gradient), (self.activation, other.activation))
            )
            total = on_g @ total @ on_a.mT
        return replace(other, total=total + other.total)

    def operator(self, space: ParameterSpace, scale: float) -> FisherOperator:
        """Diagonal in the eigenbasis."""
        return EigenKroneckerOperator.of_spectra(
            space, self.activation, self.gradient.scaled(scale), scale * self.total, self.transposed
        )

    def tensors(self) -> dict[str, Tensor]:
        """The bases are the factors' own."""
        return {"values": self.total}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], before: UnitSums | None) -> RotatedSquares:
        if not isinstance(before, KroneckerFactors) or before.spectra is None:
            raise ValueError("eigenvalues without the factors whose basis they are in")
        return cls(*before.spectra, before.transposed, tensors["values"])


class KFAC(LayerStructure):
    """Kronecker factors where the unit's rows are factored, else an exact block or diagonal."""

    name = "kfac"
    meaning = "a Kronecker product a layer: activations' factor ⊗ output gradients' factor"
    needs_rows = False
    counts_positions = True
    has_eigenbases = True
    in_parts = True
    packs = True
    instead = 'structure="diagonal", or params= without the widest layers'

    def bytes(self, problem: Problem) -> int:
        """The factors, packed ones with their eigenvalues in float64, and what units without factors have."""
        sides = _sides(problem)
        values = 8 * sum(i + o + 2 for i, o in sides) if self.kept_item < self.item else 0
        return self.kept_item * sum(i**2 + o**2 for i, o in sides) + values + self._others(problem)

    def peak(self, problem: Problem) -> int:
        """All factors, which become the operators' in place; those of a layer make room for their packed form."""
        others, (turned, kept) = self._others(problem), self._vectors(problem)
        made = self._work(problem) if self.kept_item < self.item else 0
        return self._factors(problem) + others + max(turned, kept + others + made)

    def summed(self, problem: Problem) -> int:
        """All factors, and the vectors that one of them has been until then."""
        return self._factors(problem) + self._others(problem) + self._vectors(problem)[0]

    def _work(self, problem: Problem) -> int:
        """Bytes that decomposing the largest factor takes."""
        return EIGH_BYTES * max((max(side) for side in _sides(problem)), default=0) ** 2

    def _vectors(self, problem: Problem) -> tuple[int, int]:
        """Bytes of vectors beside the matrix that is made of them, once they are as many as it is wide, or in the end.

        A layer's are put side by side for the first, one factor's after the other's, and kept for the second.
        """
        turned = kept = 0
        examples, first, vectors = self.expected() or 0, problem.first_size, problem.vectors_per_example // problem.fold
        for unit in problem.plan.ruled:
            if (shape := unit.shape) is None or LARGE <= max(shape[1:]) <= examples * shape[0]:
                continue
            (positions, *sides), turning = shape, list[int]()
            for side, rows in zip(sides, (1, vectors), strict=True):
                if examples * positions * rows < side:
                    kept += examples * positions * rows * side
                elif first * positions * rows < side:
                    turning.append(side**2)
            turned = max(turned, sum(turning) + max(turning, default=0))
        return self.item * turned, self.item * kept

    @staticmethod
    def _many(vectors: float, *sides: int) -> bool:
        return max(sides) >= LARGE and vectors >= max(sides)

    def _factors(self, problem: Problem) -> int:
        return self.item * sum(i**2 + o**2 for i, o in _sides(problem))

    def _others(self, problem: Problem) -> int:
        """Bytes of blocks and diagonals of units without factors."""
        sizes = [
            sum(self.space.restrict(unit.names).sizes)
            for unit in problem.plan.units
            if not (isinstance(unit, RuledUnit) and unit.shape)
        ]
        return sum(self.item * size**2 if size <= SMALL_BLOCK else self.kept_item * size for size in sizes)

    def record(self, rows: UnitRows) -> UnitSums:
        """Of a unit without factors: its block, or its diagonal."""
        return SmallBlock.of(rows) if rows.size <= SMALL_BLOCK else LargeDiagonal(rows.squared_sum())

    def start(self, slot: UnitSlot, chunk: Chunk) -> UnitSums:
        """Factors of factored rows."""
        if not isinstance(slot.rows, FactoredRows):
            return self.record(slot.rows)
        thin, widest = not self.averaged, max(slot.rows.inputs + slot.rows.bias, slot.rows.outputs)
        if thin and widest >= LARGE:
            each = slot.rows.activations.shape[:2].numel() / max(1, chunk.counted)
            # Where not all positions count, perhaps half of them do.
            thin = not self._many((self.expected() or 0) * each * (1.0 if chunk.whole else 0.5), widest)
        return KroneckerFactors.zeros(slot.rows, thin=thin).added(slot, chunk, self)


class EKFAC(KFAC):
    """Kfac's eigenbases, then second moments of the rows in them."""

    name = "ekfac"
    meaning = "kfac's eigenvectors with eigenvalues measured along them"
    passes = 2

    def bytes(self, problem: Problem) -> int:
        """Two eigenbases and the values of each layer."""
        ranks = self._ranks(problem)
        values = sum(on_inputs * on_outputs for (_, on_inputs), (_, on_outputs) in ranks)
        return self.kept_item * (sum(w * r for sides in ranks for w, r in sides) + values) + self._others(problem)

    def peak(self, problem: Problem) -> int:
        """Bases and values beside the float64 work on a basis, or the values, or the packed form, of the operator."""
        own, others = self.summed(problem), self._others(problem)
        values = self.bytes(problem) - others
        if self.kept_item == self.item:
            values -= self._factors(problem)
        return own + max(self._work(problem), values + others)

    def summed(self, problem: Problem) -> int:
        """Factors, each of which makes room for its basis, and values."""
        values = self.item * sum(i * o for (_, i), (_, o) in self._ranks(problem))
        turned = self._vectors(problem)[0]
        return self._factors(problem) + self._others(problem) + max(values, turned)

    def _factors(self, problem: Problem) -> int:
        return self.item * sum(w * r for sides in self._ranks(problem) for w, r in sides)

    def _work(self, problem: Problem) -> int:
        """Of few vectors, all bases are beside them, and of one factor they are put together and decomposed."""
        sides = [side for sides in self._ranks(problem) for side in sides]
        few = sum(w * r for w, r in sides if r < w)
        work = [self.item * w * r + EIGH_BYTES * r**2 if r < w else EIGH_BYTES * w**2 for w, r in sides]
        return self.item * few + max(work, default=0)

    def _ranks(self, problem: Problem) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Of both factors of every unit that has them, the width, and how many eigenvectors there will be."""
        examples, found = self.expected() or 0, list[tuple[tuple[int, int], tuple[int, int]]]()
        thin = examples > 0 and self.processes.size == 1 and not self.reduce and problem.whole
        each = 0 if problem.rowless or problem.head else problem.vectors_per_example // problem.fold
        for unit in problem.plan.ruled:
            if unit.shape is not None:
                positions, i, o = unit.shape
                number = examples * positions if thin else 0
                few, rows = number and not self._many(number, i, o), number * each
                found.append(((i, min(i, number) if few else i), (o, min(o, rows) if few and rows else o)))
        return found

    def next_pass(self, sums: LayerSums) -> LayerSums | None:
        """The moments, after the factors."""
        if sums.done is not None:
            return None
        factors = {names: u for names, u in sums.units.items() if isinstance(u, KroneckerFactors)}
        others = {names: u for names, u in sums.units.items() if names not in factors}

        def moments(names: Names) -> RotatedSquares:
            return RotatedSquares.zeros(factors[names], self.dtype, names)

        new = {names: u.decomposition_cost for names, u in factors.items() if u.spectra is None}
        sent = self.processes.shared_out(new, moments)
        return LayerSums(self, {names: sent[names] if names in sent else moments(names) for names in factors}, others)


def _sides(problem: Problem) -> list[tuple[int, int]]:
    """Widths of both factors of every unit that has them."""
    return [unit.shape[1:] for unit in problem.plan.ruled if unit.shape is not None]


class SmallBlock(NormalMatrix):
    """The block of a unit without a Kronecker rule."""

    reason = f"no Kronecker rule, d <= {SMALL_BLOCK}"


class LargeDiagonal(Squares):
    """The diagonal of a unit without a Kronecker rule."""

    label = "exact diagonal"
    reason = f"no Kronecker rule, d > {SMALL_BLOCK}"
