"""One batch linearised: a forward pass whose graph answers, for any output vectors, with the rows of every unit.

Only gradients with respect to the layers' outputs are asked for; weight gradients of rule-covered units are never
formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fisherkit.data import Batch
from fisherkit.errors import ModelError
from fisherkit.rows.base import UnitRows
from fisherkit.rows.collection import Rows, UnitSlot
from fisherkit.rows.differentiable import pulled_back
from fisherkit.rows.generic import dense_gradient
from fisherkit.rows.patches import Activations
from fisherkit.rows.plan import TOLERANCE, Plan, forward
from fisherkit.rows.rules import Use, in_dtype
from fisherkit.rows.selection import RowSelection
from fisherkit.rows.stored import StoredRows


@dataclass(frozen=True)
class Known:
    """Gradients of another backward pass, of which the wanted rows are multiples.

    Args:
        gradients: ``[k, *output]`` at each of the `Linearized.edges`; None where nothing depends on an output.
        scale: by example, what turns them into those of the wanted vectors.
    """

    gradients: Sequence[Tensor | None]
    scale: Float[Tensor, "B"]


class Linearized:
    """The model at one batch.

    Args:
        plan: how rows are made.
        batch: the examples.
        z: the model's outputs for them.
        uses: of the chosen parameters on the way.
    """

    def __init__(self, plan: Plan, batch: Batch, z: Tensor, uses: Sequence[Use]) -> None:
        self.plan, self.batch, self.z = plan, batch, z
        self._uses = [
            (unit, [in_dtype(use, plan.example_parameter.dtype) for use in unit.uses(uses)]) for unit in plan.ruled
        ]
        self._activations: dict[tuple[str, ...], Activations] = {}
        for unit, own in self._uses:
            if not own or any(unit.strange(use) for use in own):
                raise ModelError(
                    call="the model's forward pass",
                    got=f"parameter {unit.names[0]!r} {'used in a new way' if own else 'not used'} in this batch",
                    expected="the same layers for every batch",
                    why="rules are verified on the data's first examples",
                    try_="leave the parameter out with params=, make forward independent of the data, or checkpoint "
                    "activations with use_reentrant=False",
                )

    @classmethod
    def at(cls, plan: Plan, batch: Batch) -> Linearized:
        """By a forward pass."""
        z, uses, _ = forward(plan, batch)
        return cls(plan, batch, z, uses)

    @property
    def edges(self) -> list[GradientEdge]:
        """Where gradients are asked for: the outputs of all uses."""
        return [use.edge for _, own in self._uses for use in own]

    @property
    def numbers_per_vector(self) -> int:
        """Entries of all layer-output gradients for one output vector, what a backward pass must hold."""
        layers = sum(torch.Size(use.output_shape).numel() for _, own in self._uses for use in own)
        return self.z.numel() + layers + sum(unit.numbers for unit in self.plan.generic) * self.batch.size

    def rows(self, v: Float[Tensor, "k B ..."], selection: RowSelection, known: Known | None = None) -> Rows:
        """The rows Jᵀ v.

        Args:
            v: k vectors for each example, ``[k, *outputs]``.
            selection: which of them are rows.
            known: what a backward pass has brought already.
        """
        v, dtype = v.to(self.z.dtype), self.plan.example_parameter.dtype
        alone = self.plan.looped and self.batch.size == 1 and known is None
        if alone:
            found_at, flat = self._alone(v)
            gradients = iter(found_at)
        else:
            gradients = iter(self._backward(v) if known is None else known.gradients)
        found: dict[tuple[str, ...], UnitRows] = {}
        for unit, own in self._uses:
            if unit.names not in self._activations:
                self._activations[unit.names] = unit.activations(own, self.batch.size)
            g = unit.gradients(own, [next(gradients) for _ in own], v).to(dtype)
            g = g if known is None else g * known.scale.to(dtype)[:, None, None]
            found[unit.names] = unit.rows(own[0], self._activations[unit.names], selection.take(g), selection)
        if self.plan.generic:
            flat = flat if alone else self.plan.generic_rows(self.batch, v, self.z)
            parts = selection.take(flat.to(dtype)).split([unit.numbers for unit in self.plan.generic], 1)
            found.update({u.names: StoredRows(part) for u, part in zip(self.plan.generic, parts, strict=True)})
        return Rows(self.plan.space, [UnitSlot(unit.names, found[unit.names]) for unit in self.plan.units])

    @property
    def batched(self) -> bool:
        """Whether several vectors can go through one vectorised backward pass; tried once a plan."""
        if "batched" not in self.plan.tried:
            self.plan.tried["batched"] = self._batched_agrees()
        return self.plan.tried["batched"]

    def _batched_agrees(self) -> bool:
        """Tried with two, checked with one."""
        edges = self.edges
        if not edges:
            return True
        shape = (2, *self.z.shape)
        v = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(self.z)
        try:
            both = torch.autograd.grad(self.z, edges, v, retain_graph=True, allow_unused=True, is_grads_batched=True)
        except RuntimeError:  # an operation without a batching rule
            return False
        last = torch.autograd.grad(self.z, edges, v[1], retain_graph=True, allow_unused=True)
        tolerance = TOLERANCE.get(self.z.dtype, 5e-2)
        return all(
            (a is None) == (b is None)
            and (a is None or b is None or bool((a[1] - b).norm() <= tolerance * (b.norm() + 1e-30)))
            for a, b in zip(both, last, strict=True)
        )

    def _backward(self, v: Float[Tensor, "k B ..."]) -> list[Tensor | None]:
        """Gradients of Σ_n v_n · z_n in every use's output, for each of the k vectors."""
        edges = self.edges
        if not edges:
            return []
        if v.shape[0] > 1 and self.batched:
            return list(
                torch.autograd.grad(self.z, edges, v, retain_graph=True, allow_unused=True, is_grads_batched=True)
            )
        passes = [pulled_back(self.z, edges, one) for one in v]
        if len(passes) == 1:
            return [None if one is None else one.unsqueeze(0) for one in passes[0]]
        return [None if found[0] is None else torch.stack(found) for found in zip(*passes, strict=True)]

    def _alone(self, v: Float[Tensor, "k 1 ..."]) -> tuple[list[Tensor | None], Float[Tensor, "k 1 d"]]:
        """The same of one example, and the generic units' rows: one graph has both."""
        edges, generic = self.edges, [self.plan.parameters[name] for unit in self.plan.generic for name in unit.names]
        passes = [pulled_back(self.z, [*edges, *generic], one) for one in v]
        rows = [
            torch.cat([dense_gradient(p, g).flatten() for p, g in zip(generic, found[len(edges) :], strict=True)])
            for found in passes
        ]
        at_edges = list(zip(*passes, strict=True))[: len(edges)]
        stacked = [None if found[0] is None else torch.stack(found) for found in at_edges]
        return stacked, torch.stack(rows).unsqueeze(1)
