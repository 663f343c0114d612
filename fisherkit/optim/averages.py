"""Running averages of Kronecker factors, eigenbases and diagonals: the structures that outlive a batch.

Owns one record of tensors for each unit, all that a file must hold. Knows rows and operators, and nothing of models,
kinds or steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.accumulators import LayerSums, Names, RotatedSquares, SecondMoment
from fisherkit.operators import Damping, DenseOperator, DiagonalOperator, FisherOperator, RelativeDamping
from fisherkit.operators.layer_layout import LayerLayout
from fisherkit.optim.layer_inverse import LayerInverse, Spectrum, leading_spectrum
from fisherkit.rows.chunks import Chunk
from fisherkit.rows.factored import FactoredRows
from fisherkit.space import ParameterSpace

Unit = dict[str, Tensor]


class Averages:
    """F in a structure of layers, averaged over updates: F ← ema · F + (1 − ema) · F_batch, the first as it is.

    Kronecker factors are averaged one by one, as is usual. An eigenbasis is renewed every ``refresh_every`` updates.

    Args:
        structure: "kfac", "ekfac" or "diagonal".
        ema: the weight of what was before, from 0 to below 1.
        refresh_every: updates between eigen-decompositions.
        reduce: Kronecker factors from sums over shared positions instead of each position.
        max_rank: eigenpairs of a factor that are kept; None for all.

    Attributes:
        units: the tensors of each unit.
        updates: how many there were.
    """

    def __init__(self, structure: str, *, ema: float, refresh_every: int, reduce: bool, max_rank: int | None) -> None:
        self.structure, self.ema, self.refresh_every, self.reduce = structure, ema, refresh_every, reduce
        self.max_rank = max_rank
        self.units: dict[Names, Unit] = {}
        self.updates = 0

    def update(self, chunks: Sequence[Chunk], examples: int) -> None:
        """With the rows of a batch of N examples."""
        layers = self.structure != "diagonal"
        fresh = self._factors(chunks, examples) if layers else self._diagonals(chunks, examples)
        self.units = {names: self._blend(self.units.get(names, {}), new) for names, new in fresh.items()}
        if self.structure == "ekfac":
            self._moments(chunks, examples)
        self.updates += 1

    def inverse(self, space: ParameterSpace, damping: Damping) -> Inverse:
        """(F + λI)⁻¹ over the parameters of the last update."""
        if isinstance(damping, RelativeDamping):
            damping = damping.scale * float(sum(_trace(unit) for unit in self.units.values())) / space.size
        parts: list[tuple[ParameterSpace, Callable[[Tensor], Tensor]]] = []
        for names, unit in self.units.items():
            own = space.restrict(names)
            if "transposed" in unit:
                layout = LayerLayout.of(own, bool(unit["transposed"]), "a step")
                sides = _spectrum(unit, "activation"), _spectrum(unit, "gradient")
                parts.append((own, LayerInverse(layout, *sides, unit.get("values"), damping).solve))
            else:
                whole = "matrix" in unit
                operator: FisherOperator = (
                    DenseOperator(own, unit["matrix"]) if whole else DiagonalOperator(own, unit["diagonal"])
                )
                parts.append((own, operator.factorize(damping).matvec))
        return Inverse(space, parts, float(damping))

    def _diagonals(self, chunks: Sequence[Chunk], examples: int) -> dict[Names, Unit]:
        found: dict[Names, Unit] = {}
        for chunk in chunks:
            for slot in chunk.rows.slots:
                new = slot.rows.squared_sum() / examples
                known = found.get(slot.names)
                found[slot.names] = {"diagonal": new if known is None else known["diagonal"] + new}
        return found

    def _factors(self, chunks: Sequence[Chunk], examples: int) -> dict[Names, Unit]:
        sums = LayerSums(False, self.reduce)
        for chunk in chunks:
            sums.add(chunk)
        found: dict[Names, Unit] = {}
        for slot in chunks[0].rows.slots:
            names = slot.names
            if names in sums.factors:
                factors = sums.factors[names]
                found[names] = {"transposed": torch.tensor(factors.transposed)}
                for name, moment, count in (
                    ("activation", factors.activation, max(factors.count, 1)),
                    ("gradient", factors.gradient, examples),
                ):
                    found[names] |= self._side(name, moment, count)
            elif names in sums.blocks:
                found[names] = {"matrix": sums.blocks[names].total / examples}
            else:
                found[names] = {"diagonal": sums.squares[names].total / examples}
        return found

    def _side(self, name: str, moment: SecondMoment, count: int) -> Unit:
        """A factor's matrix; without averages, the spectrum of few vectors takes its place."""
        if self.ema > 0 or moment.matrix is not None:
            return {name: moment.dense() / count}
        values, basis = moment.spectrum(self.structure)
        return {f"{name}_values": values / count, f"{name}_basis": basis, f"{name}_rest": values.new_zeros(())}

    def _blend(self, old: Unit, new: Unit) -> Unit:
        """The average with what was before, and its spectra if it is time for new ones."""
        averaged: Unit = {
            key: self.ema * old[key] + (1 - self.ema) * new[key]
            for key in ("activation", "gradient", "matrix", "diagonal")
            if key in old and key in new
        }
        unit: Unit = {**old, **new, **averaged}
        if "transposed" in unit and (not old or self.updates % self.refresh_every == 0):
            for name in ("activation", "gradient"):
                if name in new:
                    start = old.get(f"{name}_basis")
                    found = leading_spectrum(unit[name], self.max_rank, start, self.structure)
                    unit[f"{name}_values"], unit[f"{name}_basis"] = found.values, found.basis
                    unit[f"{name}_rest"] = found.rest
        if self.ema > 0 and "values" in old and unit["gradient_basis"] is not old["gradient_basis"]:
            unit["values"] = _turned(old, unit)
        return unit

    def _moments(self, chunks: Sequence[Chunk], examples: int) -> None:
        """EKFAC's eigenvalues: second moments of the rows in the current bases."""
        totals: dict[Names, RotatedSquares] = {}
        for chunk in chunks:
            for slot in chunk.rows.slots:
                if not isinstance(slot.rows, FactoredRows):
                    continue
                a, g = (self.units[slot.names][f"{side}_basis"] for side in ("activation", "gradient"))
                known = totals.get(slot.names) or RotatedSquares(a, g, a.new_zeros(g.shape[1], a.shape[1]))
                totals[slot.names] = known.add(slot.rows)
        for names, moments in totals.items():
            unit, new = self.units[names], moments.total / examples
            old = unit.get("values")
            unit["values"] = new if old is None or self.ema == 0 else self.ema * old + (1 - self.ema) * new

    def space(self, whole: ParameterSpace) -> ParameterSpace:
        """The parameters of the last update."""
        return whole.restrict(name for names in self.units for name in names)

    def state(self) -> list[dict[str, Any]]:
        """Of each unit, its names and tensors."""
        return [{"names": list(names), "tensors": dict(unit)} for names, unit in self.units.items()]

    def load(self, state: Sequence[Mapping[str, Any]], updates: int, own: Mapping[str, Tensor]) -> None:
        """The inverse of `state`, on the devices of the model's own parameters."""
        self.units = {
            tuple(unit["names"]): {
                key: (value.to(own[unit["names"][0]].device) if value.is_floating_point() else value).clone()
                for key, value in unit["tensors"].items()
            }
            for unit in state
        }
        self.updates = updates


@dataclass(frozen=True)
class Inverse:
    """(F + λI)⁻¹ layer by layer.

    Args:
        space: all parameters.
        parts: the parameters of each unit, and its own inverse.
        damping: λ.
    """

    space: ParameterSpace
    parts: Sequence[tuple[ParameterSpace, Callable[[Tensor], Tensor]]]
    damping: float

    def matvec(self, flat: Float[Tensor, "D"]) -> Float[Tensor, "D"]:
        """The inverse times a vector."""
        result, whole = torch.empty_like(flat), self.space.slices
        for own, solve in self.parts:
            part = solve(torch.cat([flat[whole[name]] for name in own.names]))
            for name, place in own.slices.items():
                result[whole[name]] = part[place]
        return result


def _spectrum(unit: Unit, name: str) -> Spectrum:
    return Spectrum(unit[f"{name}_values"], unit[f"{name}_basis"], unit[f"{name}_rest"])


def _trace(unit: Unit) -> Tensor:
    if "transposed" in unit:
        whole = _spectrum(unit, "activation").trace * _spectrum(unit, "gradient").trace
        if "values" not in unit:
            return whole
        # Where the bases span, the moments take the place of the factors' products.
        return whole + unit["values"].sum() - unit["activation_values"].sum() * unit["gradient_values"].sum()
    return unit["matrix"].diagonal().sum() if "matrix" in unit else unit["diagonal"].sum()


def _turned(old: Unit, new: Unit) -> Tensor:
    """EKFAC's moments carried over to new bases: the diagonal that their matrix has there."""
    g, a = ((new[f"{name}_basis"].mT @ old[f"{name}_basis"]).square() for name in ("gradient", "activation"))
    return g @ old["values"] @ a.mT
