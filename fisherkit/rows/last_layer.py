"""The exact kind's rows in the last layer: sums over them from the outputs alone, without a backward pass.

Where the model's outputs z are a linear layer's own, the output gradient of a row is the output vector v itself, and
Σ_m v vᵀ is the loss Hessian H of a position. So the sums that structures are made of need H and the layer's inputs a:

    diagonal of the weight  Σ_t diag(H_t) ⊗ a_t²       second moment of output gradients  Σ_t H_t

over the positions t that count, each of which has rows of its own. For the layers below, z = W h + b: of H only

    K_t = Wᵀ H_t W

reaches the layer's inputs h, so that as many vectors as h has numbers, the columns of a root of K_t, take the place of
one for each output. Owns the proof that the outputs are the layer's, these sums and these vectors. Knows the loss by
its Hessian's products and sums, and no structure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fisherkit.outputs import Outputs, OutputVectors
from fisherkit.rows.base import UnitRows, spans
from fisherkit.rows.chunks import Chunk, Slots
from fisherkit.rows.collection import Rows, UnitSlot
from fisherkit.rows.factored import CACHED, FactoredRows
from fisherkit.rows.linearized import Linearized
from fisherkit.rows.plan import Plan
from fisherkit.rows.rules import ContractionRule, LinearRule, Use
from fisherkit.rows.units import RuledUnit
from fisherkit.space import ParameterSpace

_RESHAPES = {
    "AliasBackward0", "ReshapeAliasBackward0", "SqueezeBackward0", "SqueezeBackward1", "SqueezeBackward2",
    "UnsafeViewBackward0", "UnsqueezeBackward0", "ViewBackward0",
}  # fmt: skip
"""Nodes that give every number on in its place."""


class LastLayerRows(FactoredRows):
    """Rows of a batch ``[B, P, I]`` that are never made: what is asked of single ones fails for want of gradients."""

    form = "closed form"

    def __init__(self, activations: Float[Tensor, "B P I"], z: Outputs, *, bias: bool, transposed: bool) -> None:
        self.inputs, self.outputs = activations.shape[2], z.z.shape[2]
        count = int(z.mask.sum()) * z.likelihood.hessian_rank(z.z[:, 0])
        UnitRows.__init__(self, count, self.outputs * (self.inputs + bias))
        target = None if z.target is None else z.target.clone()  # the caller may refill it before a second pass
        self.activations, self.z, self.bias, self.transposed = activations, replace(z, target=target), bias, transposed

    def gradient_moment(self) -> Float[Tensor, "O O"]:
        """Σ g gᵀ over rows and positions: the sum of the Hessians."""
        return self.z.hessian_sum().to(self.floating.dtype)

    def squared_sum(self) -> Float[Tensor, "d"]:
        """Σ_r row_r²: as of one row a position, whose output gradients are the roots of the Hessian's diagonal."""
        diagonal = self.z.masked(self.z.hessian_diagonal())
        one = FactoredRows(
            self.floating.flatten(0, 1).unsqueeze(1), self._roots(diagonal), bias=self.bias,
            transposed=self.transposed,
        )  # fmt: skip
        return one.squared_sum()

    def rotated(self, on_inputs: Float[Tensor, "I1 r"], on_outputs: Float[Tensor, "O s"]) -> Iterator[FactoredRows]:
        """Rows with the same sum of squares in other bases: the roots of uᵀ H u for each output's direction u."""
        directions, found = on_outputs.mT.to(self.z.z.dtype), []
        for span in spans(len(directions), self.z.z.numel()):
            w = directions[span][:, None, None].expand(-1, *self.z.z.shape)
            found.append((w * self.z.masked(self.z.hessian_matmul(w))).sum(3))
        a = self.floating @ on_inputs[: self.inputs]
        a = a + on_inputs[-1] if self.bias else a
        yield FactoredRows(a.flatten(0, 1).unsqueeze(1), self._roots(torch.cat(found).movedim(0, 2)), bias=False)

    def _roots(self, squares: Float[Tensor, "B P o"]) -> Float[Tensor, "E 1 o"]:
        # Below 0 is rounding.
        return squares.clamp_min(0).sqrt().to(self.floating.dtype).flatten(0, 1).unsqueeze(1)

    @property
    def floating(self) -> Tensor:
        return self.activations[:]

    @property
    def numbers(self) -> tuple[Tensor, ...]:
        """The layer's inputs; the outputs have been looked at."""
        return (self.floating,)

    def tensors(self) -> dict[str, Tensor]:
        return {"activations": self.floating}


class WithoutHead(Rows):
    """Rows of the layers below, with the last layer's closed form in a batch's first chunk, in place of ``count``."""

    def __init__(self, space: ParameterSpace, slots: Sequence[UnitSlot], count: int) -> None:
        super().__init__(space, slots)
        self._count = count

    @property
    def count(self) -> int:
        """R, of one vector an output."""
        return self._count


@dataclass(frozen=True)
class Head:
    """A batch at which the model ends in a linear layer of many outputs, of which ``slot`` is the closed form.

    ``below`` is the rest of the model, whose outputs are the layer's inputs ``[n, P, I]``.
    """

    slot: UnitSlot
    below: Linearized
    outputs: Outputs
    weight: Float[Tensor, "O I"]

    @classmethod
    def of(cls, linearized: Linearized, outputs: Outputs) -> Head | None:
        """Of a batch; None where the outputs are not the layer's, or are used beside."""
        found = _closed_form(linearized, outputs, only=False)
        if found is None:
            return None
        (use, slot), plan, watched = found, linearized.plan, linearized.watched
        h = use.input.reshape(*outputs.z.shape[:2], -1)
        rest = plan.restricted([name for name in plan.space.names if name not in use.names])
        uses = [one for one in watched.uses if one is not use]
        below = Linearized(rest, linearized.batch, replace(watched, z=h, uses=uses))
        weight = plan.parameters[use.names[0]].detach()
        transposed = isinstance(use.rule, ContractionRule)
        return cls(slot, below, outputs, weight.mT if transposed else weight)

    def slots(self, counts: tuple[int, int]) -> Slots:
        """Columns of a root of Wᵀ H W for every position, not the outputs' vectors; ``counts`` as in `Slots.of`."""
        forms, positions = self.outputs.hessian_forms(self.weight, CACHED), self.outputs.z.shape[1]
        values, basis = torch.linalg.eigh((forms + forms.mT) / 2)
        root = basis * values.clamp_min(0).sqrt().unsqueeze(1)  # below 0 is rounding
        found = OutputVectors(root.mT.unsqueeze(2))  # [n·P, I, 1, I]
        number, several = found.number * positions, positions > 1
        return Slots(found, self.outputs.mask, several, number, counts[0], self.outputs.whole, None)

    def joined(self, chunk: Chunk, plan: Plan) -> Chunk:
        """A chunk of the rows below; the first one with the layer's, all of which stand for those of all outputs."""
        slots = {slot.names: slot for slot in chunk.rows.slots}
        if chunk.first:
            slots[self.slot.names] = self.slot
        own = [slots[unit.names] for unit in plan.units if unit.names in slots]
        rows = WithoutHead(plan.space, own, self.slot.rows.count if chunk.first else 0)
        return replace(chunk, rows=rows, squares=math.inf)


def last_layer_rows(linearized: Linearized, outputs: Outputs) -> Rows | None:
    """The rows, if all chosen parameters are in a linear layer whose outputs are the model's; None if not."""
    found = _closed_form(linearized, outputs, only=True)
    return None if found is None else Rows(linearized.plan.space, [found[1]])


def last_width(linearized: Linearized, *, only: bool) -> int:
    """Inputs of a last layer whose closed form is known, as `_last_use` finds it; 0 if there is none.

    Cost: a backward pass. A gradient that arrives unchanged says what the graph cannot: that no hook changes it.
    """
    use, z = _last_use(linearized, only=only), linearized.z
    if use is None:
        return 0
    v = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
    found = linearized.watched.backward(v.unsqueeze(0))[list(linearized.watched.uses).index(use)]
    return use.input.shape[-1] if found is not None and torch.equal(found.flatten(), v.flatten()) else 0


def _last_use(linearized: Linearized, *, only: bool) -> Use | None:
    """The use of a linear layer, as its unit has it, whose outputs are z, if nothing else acts on gradients.

    It is the ``only`` one of chosen parameters, or above others that all have a rule, and in whose dtype all is.
    """
    plan, watched, z = linearized.plan, linearized.watched, linearized.z
    last = [use for use in watched.uses if use.edge.node is not None and _reshaped(z, use.edge)]
    if len(last) != 1 or plan.generic or linearized.unruled or watched.hooked:
        return None
    use, count = last[0], len(watched.uses)
    if (len(plan.units) != 1 or count != 1) if only else count < 2:
        return None
    # Weights that are made of parameters, seen transposed or in another shape, have rows of another form.
    unit = next((unit for unit in plan.ruled if unit.names == use.names), None)
    if type(unit) is not RuledUnit or not use.plain or use.turned or unit.shape is None or use.weight is None:
        return None
    if sum(use.names[0] in other.names for other in watched.uses) != 1:
        return None
    linear = type(use.rule) is LinearRule or (isinstance(use.rule, ContractionRule) and use.rule.name == "addmm")
    alike = only or (use.input.dtype == z.dtype == plan.dtype and use.input.requires_grad)
    return use if linear and alike else None


def _closed_form(linearized: Linearized, outputs: Outputs, *, only: bool) -> tuple[Use, UnitSlot] | None:
    """The last layer and its rows in a batch; None where the outputs are not the layer's, or are used beside."""
    use = _last_use(linearized, only=only)
    if use is None or outputs.z.shape[-1] != use.output_shape[-1] or not _in_order(linearized.z, outputs):
        return None
    a = use.rule.activations(use)[:].reshape(*outputs.z.shape[:2], -1)
    transposed = isinstance(use.rule, ContractionRule)
    return use, UnitSlot(use.names, LastLayerRows(a, outputs, bias=use.bias is not None, transposed=transposed))


def _reshaped(z: Tensor, edge: GradientEdge) -> bool:
    """Whether nothing but a reshape lies between a layer's output and z."""
    node = z.grad_fn
    while node is not None and node is not edge.node and node.name() in _RESHAPES:
        node = node.next_functions[0][0]
    return node is edge.node


def _in_order(z: Tensor, outputs: Outputs) -> bool:
    """Whether the likelihood's positions and classes lie as the outputs do, classes last."""
    index = torch.arange(z.numel(), dtype=torch.float64, device=z.device)
    found = outputs.likelihood.positions(index.reshape(z.shape), "the model's outputs")
    return torch.equal(found.flatten(), index)
