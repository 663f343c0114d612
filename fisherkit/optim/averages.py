"""Running averages of Kronecker factors, eigenbases and diagonals: the structures that outlive a batch.

Owns one record of tensors for each unit, all that a file must hold. Knows rows and operators, and nothing of models,
kinds or steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fisherkit.accumulators import LayerSums, Names, RotatedSquares
from fisherkit.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalOperator,
    EigenKroneckerOperator,
    FisherOperator,
)
from fisherkit.operators.linalg import spectrum
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

    Attributes:
        units: the tensors of each unit.
        updates: how many there were.
    """

    def __init__(self, structure: str, *, ema: float, refresh_every: int, reduce: bool) -> None:
        self.structure, self.ema, self.refresh_every, self.reduce = structure, ema, refresh_every, reduce
        self.units: dict[Names, Unit] = {}
        self.updates = 0

    def update(self, chunks: Sequence[Chunk], examples: int) -> None:
        """With the rows of a batch of N examples."""
        layers = self.structure != "diagonal"
        fresh = self._factors(chunks, examples) if layers else self._diagonals(chunks, examples)
        self.units = {names: self._blend(self.units.get(names, {}), new) for names, new in fresh.items()}
        if layers and self.updates % self.refresh_every == 0:
            for unit in self.units.values():
                self._refresh(unit)
        if self.structure == "ekfac":
            self._moments(chunks, examples)
        self.updates += 1

    def operator(self, space: ParameterSpace) -> FisherOperator:
        """The average as an operator over the parameters of the last update."""
        return BlockDiagonalOperator(space, [_operator(space.restrict(n), unit) for n, unit in self.units.items()])

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
                found[names] = {
                    "activation": factors.activation.dense() / max(factors.count, 1),
                    "gradient": factors.gradient.dense() / examples,
                    "transposed": torch.tensor(factors.transposed),
                }
            elif names in sums.blocks:
                found[names] = {"matrix": sums.blocks[names].total / examples}
            else:
                found[names] = {"diagonal": sums.squares[names].total / examples}
        return found

    def _blend(self, old: Unit, new: Unit) -> Unit:
        averaged = {
            key: self.ema * old[key] + (1 - self.ema) * value
            for key, value in new.items()
            if key in old and value.is_floating_point()
        }
        return {**old, **new, **averaged}

    def _refresh(self, unit: Unit) -> None:
        """New eigenbases; EKFAC's moments are carried over as the diagonal that their matrix has in the new ones."""
        if "activation" not in unit:
            return
        (a_values, a), (g_values, g) = (spectrum(unit[name], self.structure) for name in ("activation", "gradient"))
        a, g = (basis.to(unit["activation"].dtype).contiguous() for basis in (a, g))
        if self.structure == "kfac":
            unit["values"] = g_values.unsqueeze(1) * a_values
        elif "values" in unit:
            g_turn, a_turn = (g.mT @ unit["gradient_basis"]).square(), (a.mT @ unit["activation_basis"]).square()
            unit["values"] = g_turn @ unit["values"] @ a_turn.mT
        unit["activation_basis"], unit["gradient_basis"] = a, g

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
            unit["values"] = self.ema * unit["values"] + (1 - self.ema) * new if "values" in unit else new

    def space(self, whole: ParameterSpace) -> ParameterSpace:
        """The parameters of the last update."""
        return whole.restrict(name for names in self.units for name in names)

    def state(self) -> list[dict[str, Any]]:
        """Of each unit, its names and tensors."""
        return [{"names": list(names), "tensors": dict(unit)} for names, unit in self.units.items()]

    def load(self, state: Sequence[Mapping[str, Any]], updates: int, own: Mapping[str, Tensor]) -> None:
        """The inverse of `state`, on the devices of the model's own parameters."""
        self.updates = updates
        self.units = {
            tuple(unit["names"]): {
                key: (value.to(own[unit["names"][0]].device) if value.is_floating_point() else value).clone()
                for key, value in unit["tensors"].items()
            }
            for unit in state
        }


def _operator(space: ParameterSpace, unit: Unit) -> FisherOperator:
    if "matrix" in unit:
        return DenseOperator(space, unit["matrix"])
    if "diagonal" in unit:
        return DiagonalOperator(space, unit["diagonal"])
    return EigenKroneckerOperator(
        space, unit["activation_basis"], unit["gradient_basis"], unit["values"], bool(unit["transposed"])
    )
